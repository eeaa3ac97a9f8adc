"""The whole document of a merge is validated, for the methods of this package alone."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.merging.mergekit import document
from tests.merging.reference import assert_config_refused, assert_refused, merge

SOURCE = {"model": "a", "layer_range": [0, 2]}
HEAD: dict[str, Any] = {"merge_method": "squisher", "models": [{"model": "a"}, {"model": "b"}]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": [{"model": "a", "parametres": {}}]}, ["models[0]", "'parametres'", "did you mean parameters?"]),
        ({"models": [{"model": "a", "density": 0.5}]}, ["models[0]", "parameters: {density: ...}"]),
        ({"tokenizer": {"sources": "union"}}, ["tokenizer has no key 'sources'", "did you mean source?"]),
        ({"tokenizer": {"tokens": {"<pad>": {"forced": True}}}}, ["tokenizer.tokens.<pad>", "did you mean force?"]),
        ({"scaling": "raw"}, ["the configuration", "parameters: {scaling: ...}"]),
        ({"out_type": "float16"}, ["'out_type'", "did you mean out_dtype?"]),
        (
            {"parameters": {"weight": [{"filtre": "mlp", "value": 1}]}},
            ["parameters.weight[0]", "did you mean filter?"],
        ),
        ({"parameters": {"weight": [{"filter": "mlp", "value": []}]}}, ["parameters.weight[0].value", "not be empty"]),
        ({"parameters": {"floor": []}}, ["parameters.floor must not be empty"]),
    ],
)
def test_a_key_that_mergekit_would_ignore(changes: dict[str, Any], words: list[str]) -> None:
    """An unknown key at any level is an error with its place and the nearest valid key, and so is an empty list."""
    with pytest.raises(ConfigError) as caught:
        document.check_document(HEAD | changes, MergeConfiguration)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("place", ["slices", "modules"])
def test_keys_of_slices_and_modules(place: str) -> None:
    """Sources of slices are validated as models are, in modules as well."""
    piece = {"sources": [SOURCE, SOURCE | {"layer_rnage": [0, 2]}]}
    wrong = {"slices": [piece]} if place == "slices" else {"modules": {"text": {"slices": [piece]}}}
    with pytest.raises(
        ConfigError, match=r"slices\[0\]\.sources\[1\] has no key 'layer_rnage'.*did you mean layer_ran"
    ):
        document.check_document({"merge_method": "squisher"} | wrong, MergeConfiguration)


@pytest.mark.parametrize("schema", [MergeConfiguration, RawPyTorchMergeConfig])
def test_valid_documents_pass(schema: Any) -> None:
    """Documents that mergekit reads pass, with the name that mergekit-multi gives them."""
    given = HEAD | {"name": "first", "dtype": "float32", "parameters": {"weight": [0.1, {"value": 1, "filter": "mlp"}]}}
    document.check_document(given, schema)


def test_every_field_of_mergekit_passes() -> None:
    """No valid key of mergekit's own class is refused."""
    tokenizer = {"source": "union", "tokens": {"<a>": {"source": {"kind": "zero"}, "force": True}}}
    reference = {"model": {"path": "a", "revision": "main"}, "lora": "c", "override_architecture": "X"}
    given = {
        "merge_method": "ubgm_squisher",
        "base_model": reference,
        "slices": [{"sources": [SOURCE], "base_model": "a", "residual_weight": 1.0, "parameters": {"floor": 0.1}}],
        "tokenizer": tokenizer | {"pad_to_multiple_of": 8},
        "chat_template": "auto",
        "out_dtype": "bfloat16",
    }
    document.check_document(given, MergeConfiguration)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameters": {"normalize": None}}, ["parameters.normalize must be a value", "found None", "remove the key"]),
        (
            {"parameters": {"weight": [{"filter": "mlp", "value": 1}, 0.5]}},
            ["parameters.weight must be a value", "{value: ...}, at the end"],
        ),
        ({"models": ["a", "b"]}, ["models[0] must be an entry with model: PATH, found a"]),
        ({"models": [{"model": None}]}, ["models[0].model must be a path or a Hub id, found None"]),
        ({"models": {"model": "a"}}, ["models must be a list, found {'model': 'a'}"]),
        ({"dtype": 5}, ["dtype must be a text, found 5"]),
        (
            {"models": None, "slices": [{"sources": [{"model": "a", "layer_range": "0-3"}]}]},
            ["slices[0].sources[0].layer_range must be a list of two numbers, [first, end], found 0-3"],
        ),
    ],
)
def test_a_value_of_another_form(changes: dict[str, Any], words: list[str]) -> None:
    """A value that mergekit cannot read is named with its place in the YAML and with the form that it must have."""
    with pytest.raises(ConfigError) as caught:
        MergeConfiguration.model_validate(HEAD | changes)
    assert [word for word in words if word not in str(caught.value)] == []


def test_stock_commands_refuse_a_misplaced_key(tmp_path: Path, pair: dict[str, Any]) -> None:
    """`mergekit-yaml` refuses for our methods a key that it ignores for its own."""
    pair["models"][1]["fisher_scale"] = 2.0
    assert_config_refused(tmp_path, pair, "models[1] has no key 'fisher_scale'", "parameters: {fisher_scale: ...}")


@pytest.mark.parametrize(
    ("method", "meant"), [("squishr", "squisher"), ("ubgm-squisher", "ubgm_squisher"), ("Fisher", "squisher")]
)
def test_a_misspelt_method(tmp_path: Path, pair: dict[str, Any], method: str, meant: str) -> None:
    """A name close to one of our methods is an error that names it."""
    pair["merge_method"] = method
    assert_config_refused(tmp_path, pair, repr(method), f"did you mean {meant}?")


def test_a_document_that_mergekit_cannot_read(tmp_path: Path, pair: dict[str, Any]) -> None:
    """For our methods, an error of mergekit's own validation is one line."""
    pair["slices"] = [{"sources": [SOURCE]}]
    assert_config_refused(tmp_path, pair, "one that mergekit reads", "Exactly one of")


@pytest.mark.parametrize("line", ["models: [{model: b}]", "dtype: float32"])
def test_a_key_that_stands_twice(line: str) -> None:
    """YAML keeps the last of two equal keys; a document with both is refused."""
    text = f"merge_method: squisher\ndtype: bfloat16\nmodels:\n- model: a\n{line}\n"
    with pytest.raises(ConfigError, match=f"{line.split(':')[0]}: stands twice"):
        document.read_yaml(text)


def test_anchors_and_merge_keys_are_no_repetition() -> None:
    """YAML's own way of sharing settings stays valid."""
    text = "a: &x {p: 1, q: 2}\nb: {<<: *x, p: 3}\n"
    assert document.read_yaml(text)["b"] == {"p": 3, "q": 2}


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text"])
def test_no_mapping(text: str) -> None:
    """A text that is no mapping is refused in one line."""
    with pytest.raises(ConfigError, match="must be a mapping"):
        document.read_yaml(text)


@pytest.mark.parametrize("wanted", ["self_atn", "model.layers.9.", "*.mlp"])
def test_a_filter_that_matches_no_tensor(tmp_path: Path, pair: dict[str, Any], wanted: str) -> None:
    """A filter is a part of a name; one that decides about no tensor is refused with its place."""
    pair["models"][1]["parameters"]["weight"] = [{"filter": wanted, "value": 0.5}, {"value": 1.0}]
    assert_config_refused(tmp_path, pair, "models[1].parameters.weight", repr(wanted))


def test_a_filter_behind_one_that_takes_its_tensors(tmp_path: Path, pair: dict[str, Any]) -> None:
    """The first filter that matches applies; one that never applies is refused."""
    pair["parameters"]["floor"] = [{"filter": "mlp", "value": 0.1}, {"filter": "mlp.up_proj", "value": 0.2}]
    assert_config_refused(tmp_path, pair, "parameters.floor", "'mlp.up_proj' never applies")


@pytest.mark.parametrize("first", [{"value": 1.0}, {"filter": "*", "value": 0.2}, {"filter": "", "value": 0.2}])
def test_an_entry_behind_one_for_all_tensors(tmp_path: Path, pair: dict[str, Any], first: dict[str, Any]) -> None:
    """An entry that follows one without a filter never applies, whether it has a filter itself or not."""
    pair["models"][0]["parameters"]["weight"] = [first, {"value": 0.5}]
    assert_config_refused(tmp_path, pair, "models[0].parameters.weight", "never applies")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "fp16"}, ["dtype must be one of", "'fp16'"]),
        ({"dtype": "int64"}, ["dtype must be one of", "'int64'"]),
        ({"out_dtype": "torch.bfloat61"}, ["out_dtype must be one of", "did you mean bfloat16?"]),
        ({"chat_template": "lama3"}, ["chat_template must be", "did you mean llama3?"]),
        ({"chat_template": "a text without a placeholder"}, ["chat_template must be", "alpaca, chatml"]),
    ],
)
def test_values_that_mergekit_refuses_late_or_never(
    tmp_path: Path, pair: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    """Stock ``mergekit-yaml`` refuses a wrong choice in one line with the valid ones, before it merges."""
    assert_config_refused(tmp_path, pair | changes, *words)


@pytest.mark.parametrize("template", ["auto", "chatml", "{{ messages }} with a text"])
def test_valid_chat_templates(template: str) -> None:
    """A known name and the text of a template pass."""
    document.check_document(HEAD | {"chat_template": template, "dtype": "torch.bfloat16"}, MergeConfiguration)


def test_a_model_that_is_listed_twice(tmp_path: Path, pair: dict[str, Any]) -> None:
    """The refusal names both places."""
    pair["models"].append({"model": pair["models"][0]["model"]})
    assert_config_refused(tmp_path, pair, "models[0] and models[2] are both")


@pytest.mark.parametrize("line", ["dtype: float64", "parameters: {normalize: l2, normalize: none}"])
def test_stock_commands_refuse_a_key_that_stands_twice(tmp_path: Path, pair: dict[str, Any], line: str) -> None:
    """``mergekit-yaml`` hands over its text, so that repetitions are seen."""
    from mergekit.scripts.run_yaml import main

    pair.pop("parameters")
    (tmp_path / "twice.yml").write_text(yaml.safe_dump(pair | {"dtype": "float32"}) + line + "\n")
    result = CliRunner().invoke(main, [str(tmp_path / "twice.yml"), str(tmp_path / "out"), "--no-copy-tokenizer"])
    assert_refused(result, tmp_path / "out", "stands twice in one mapping")


def test_single_files_have_no_layers_for_a_gradient(tmp_path: Path) -> None:
    """``mergekit-pytorch`` would take the first value of a gradient."""
    from tests.merging.models import nets
    from tests.merging.reference import merge_raw

    nets(tmp_path, 2)
    models = [{"model": str(tmp_path / f"n{i}" / "net.safetensors")} for i in range(2)]
    config = {"merge_method": "squisher", "models": models, "parameters": {"weight": [0.1, 0.9]}}
    assert_refused(merge_raw(tmp_path, config), tmp_path / "out", "parameters.weight must be one value")


def test_other_methods_keep_what_they_ignore(tmp_path: Path, pair: dict[str, Any]) -> None:
    """Documents for mergekit's own methods are not validated."""
    pair |= {"merge_method": "linear", "base_mode": "x", "parameters": {}}
    assert merge(pair, tmp_path / "out").exit_code == 0
    assert not document.is_ours(yaml.safe_load("{merge_method: linear, note: squish}"))
