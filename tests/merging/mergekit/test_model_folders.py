"""Models that a merge document names are folders with a model, checkpoints of runs, or models on the Hub."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.config import MergeConfiguration
from safetensors.torch import load_file

from squisher_mergekit.errors import ConfigError, NotFoundError
from squisher_mergekit.merging.mergekit import model_folders
from tests.merging.models import EMBEDDING, nets, word_tokenizer
from tests.merging.reference import assert_config_refused, assert_refused, merge, merge_raw, merged


def test_a_path_that_does_not_exist(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A mistyped folder is named with its place and the neighbour of the nearest name, not asked for on the Hub."""
    pair["models"][1]["model"] = str(tmp_path / "mm1")
    assert_config_refused(tmp_path, pair, "models[1].model", f"there is no {tmp_path / 'mm1'}", "did you mean", "m1?")


@pytest.mark.parametrize("path", ["x" * 5000, f"/tmp/{'x' * 5000}/a", "/tmp" + "/a" * 3000])
@pytest.mark.parametrize("key", ["model", "base_model", "fisher"])
def test_a_path_that_no_file_system_can_have(tmp_path: Path, pair: dict[str, Any], key: str, path: str) -> None:
    """A path that is too long is refused as one that does not exist, by mergekit's own command too."""
    if key == "base_model":
        pair[key] = path
    elif key == "model":
        pair["models"][1][key] = path
    else:
        pair["models"][1]["parameters"] = {key: path}
    assert_config_refused(tmp_path, pair, path[:50])


def test_a_base_path_that_does_not_exist(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A missing parent folder is named as well."""
    pair["base_model"] = str(tmp_path / "no" / "such" / "base")
    assert_config_refused(tmp_path, pair, "base_model", f"nor {tmp_path / 'no'}")


def test_a_file_where_a_folder_is_wanted(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A single file is for another command of mergekit, which is named."""
    pair["models"][0]["model"] = str(tmp_path / "m0" / "model.safetensors")
    assert_config_refused(tmp_path, pair, "models[0].model must be a model's folder", "mergekit-pytorch")


def test_the_folder_of_a_run_is_its_last_checkpoint(
    tmp_path: Path, pair: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A run's folder merges as its last checkpoint, and a warning says so."""
    reference = merged(pair, tmp_path / "plain")
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "m0").rename(run / "checkpoint-7")
    (run / "checkpoint-3").mkdir()
    pair["models"][0]["model"] = str(run)
    with caplog.at_level(logging.WARNING, "squisher_mergekit"):
        found = merged(pair, tmp_path / "out")
    assert all((found[name] == reference[name]).all() for name in reference)
    assert any("taking its last checkpoint" in record.message for record in caplog.records)


@pytest.mark.parametrize(("file", "word"), [("adapter_config.json", "LoRA adapter"), ("notes.txt", "no config.json")])
def test_a_folder_without_a_model(tmp_path: Path, file: str, word: str) -> None:
    """The folder of an adapter, and one of anything else, are refused with the cure."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / file).write_text("{}", encoding="utf-8")
    config = MergeConfiguration.model_validate({"merge_method": "squisher", "models": [{"model": str(tmp_path / "x")}]})
    with pytest.raises(NotFoundError, match=word):
        model_folders.resolve_models(config)


def test_hub_ids_are_left_to_the_hub() -> None:
    """A name or org/name that is no local path is not refused before the Hub was asked."""
    config = MergeConfiguration.model_validate(
        {"merge_method": "squisher", "models": [{"model": "org/name@main"}, {"model": "gpt2"}]}
    )
    model_folders.resolve_models(config)
    assert [str(item.model) for item in config.models or []] == ["org/name@main", "gpt2"]


def test_mergekit_pytorch_names_its_missing_file(tmp_path: Path) -> None:
    """A missing file is named with its place, not with mergekit's traceback."""
    from tests.merging.reference import merge_raw

    config = {"merge_method": "squisher", "models": [{"model": str(tmp_path / "a.safetensors")}]}
    assert_refused(merge_raw(tmp_path, config), tmp_path / "out", "models[0].model", "a.safetensors")


def test_files_that_lack_a_tensor_of_another(tmp_path: Path) -> None:
    """``mergekit-pytorch`` names the file and the tensor, and its own two flags as the cure."""
    from safetensors.torch import load_file, save_file

    from tests.merging.models import nets
    from tests.merging.reference import merge_raw

    nets(tmp_path, 2)
    files = [tmp_path / f"n{i}" / "net.safetensors" for i in range(2)]
    save_file({n: t for n, t in load_file(files[1]).items() if n != "stem.bias"}, files[1])
    config = {"merge_method": "squisher", "models": [{"model": str(file)} for file in files]}
    assert_refused(merge_raw(tmp_path, config), tmp_path / "out", str(files[1]), "stem.bias", "--tensor-intersection")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": {"source": "unoin"}}, ["tokenizer.source must be", "did you mean union?"]),
        ({"tokenizer_source": "bse"}, ["tokenizer_source must be", "did you mean base?"]),
        ({"tokenizer_source": "./nowhere"}, ["tokenizer_source must be", "there is no nowhere"]),
        ({"tokenizer": {"source": "union"}}, ["tokenizer.source needs the tokenizer of every model", "tokenizer.json"]),
    ],
)
def test_a_tokenizer_that_is_not_there(
    tmp_path: Path, pair: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    """The source is a known word or a model, and every local model has a tokenizer."""
    assert_config_refused(tmp_path, pair | changes, *words)


def test_a_lora_without_a_folder_for_the_model_with_it(tmp_path: Path, pair: dict[str, Any]) -> None:
    """Mergekit's option is named as the cure."""
    (tmp_path / "lora").mkdir()
    pair["models"][1]["model"] += f"+{tmp_path / 'lora'}"
    assert_config_refused(tmp_path, pair, "--lora-merge-cache DIR")


def test_a_config_without_a_class(tmp_path: Path, pair: dict[str, Any]) -> None:
    """The name of the class is what the plan of the whole model rests on."""
    file = tmp_path / "m1" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": None}))
    assert_config_refused(tmp_path, pair, "models[1].model must name the class", "has no architectures")


@pytest.mark.parametrize("name", ["model.gguf", "tf_model.h5"])
def test_weights_in_a_form_that_mergekit_does_not_read(tmp_path: Path, pair: dict[str, Any], name: str) -> None:
    """The refusal lists the files that are there."""
    (tmp_path / "m0" / "model.safetensors").rename(tmp_path / "m0" / name)
    (tmp_path / "m0" / "fisher.safetensors").unlink()
    assert_config_refused(tmp_path, pair, "models[0].model must have weights as model.safetensors", name)


@pytest.mark.parametrize("layers", [(3, 70_000), (3, 5 * 10**9), (2, 2), (3, 1), (-1, 2)])
def test_a_range_of_layers_that_no_model_has(layers: tuple[int, int]) -> None:
    """A range without layers, or beyond any model, is refused at once; mergekit would list the layers one by one."""
    sources = [{"model": name, "layer_range": layers} for name in ("org/a", "org/b")]
    config = MergeConfiguration.model_validate({"merge_method": "squisher", "slices": [{"sources": sources}]})
    with pytest.raises(ConfigError) as found:
        model_folders.resolve_models(config)
    wanted = "slices[0].sources[0].layer_range must be [first, end] with 0 <= first < end <= 10000"
    assert str(found.value).startswith(wanted)
    assert str(found.value).endswith(f"found {list(layers)}")


def _slices(tmp_path: Path, pair: dict[str, Any], *ranges: list[int]) -> dict[str, Any]:
    models = [item["model"] for item in pair["models"]]
    sources = [{"model": model, "layer_range": layers} for model, layers in zip(models, ranges, strict=True)]
    return {"merge_method": "squisher", "slices": [{"sources": sources}]}


def test_layers_beyond_the_last_one(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A range that ends beyond the last layer of a local model is refused with the number of its layers."""
    config = _slices(tmp_path, pair, [0, 2], [0, 9])
    config["slices"][0]["sources"][0]["layer_range"] = [0, 9]
    assert_config_refused(
        tmp_path, config, "slices[0].sources[0].layer_range must end at 3 at most", "m0 has 3 layers, found [0, 9]"
    )


def test_sources_of_different_lengths(tmp_path: Path, pair: dict[str, Any]) -> None:
    """Sources of a slice with different numbers of layers are refused with their ranges."""
    config = _slices(tmp_path, pair, [0, 3], [0, 2])
    assert_config_refused(tmp_path, config, "slices[0].sources must have equal numbers", "[0, 3] and [0, 2]")


@pytest.mark.parametrize("spelling", ["{}/", "link", "{}/../m0"])
def test_one_folder_under_two_names(tmp_path: Path, pair: dict[str, Any], spelling: str) -> None:
    """A folder that is listed twice, with a slash, through a link or through its parent, is refused."""
    (tmp_path / "link").symlink_to(tmp_path / "m0")
    other = str(tmp_path / "link") if spelling == "link" else spelling.format(tmp_path / "m0")
    pair["models"][1]["model"] = other
    assert_config_refused(tmp_path, pair, "models must list each model once", f"models[1] ({other}) are one folder")


@pytest.mark.parametrize("spelling", ["{}/", "link", "{}/../m0"])
def test_a_base_under_two_names(tmp_path: Path, pair: dict[str, Any], spelling: str) -> None:
    """A base that models: lists under another name of its folder counts once, as under one name."""
    (tmp_path / "link").symlink_to(tmp_path / "m0")
    pair |= {"merge_method": "ubgm_squisher", "base_model": str(tmp_path / "m0")}
    wanted = merged(pair, tmp_path / "out")
    pair["models"][0]["model"] = str(tmp_path / "link") if spelling == "link" else spelling.format(tmp_path / "m0")
    found = merged(pair, tmp_path / "other")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_single_files_under_two_names(tmp_path: Path) -> None:
    """A file that is listed twice is refused; a base under another name of its file is that file."""
    nets(tmp_path, 2)
    files = [str(tmp_path / f"n{i}" / "net.safetensors") for i in range(2)]
    other = str(tmp_path / "n1" / ".." / "n0" / "net.safetensors")
    twice = {"merge_method": "squisher", "models": [{"model": file} for file in (*files, other)]}
    done = merge_raw(tmp_path, twice)
    assert (done.exit_code, f"models[2] ({other}) is {files[0]} as well" in done.output) == (1, True)
    found = []
    for base in (files[0], other):
        config = {"merge_method": "ubgm_squisher", "base_model": base, "models": [{"model": file} for file in files]}
        assert merge_raw(tmp_path, config).exit_code == 0
        found.append(load_file(tmp_path / "out" / "model.safetensors"))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("place", ["models[1].model", "base_model"])
def test_the_output_is_no_model_of_the_merge(tmp_path: Path, pair: dict[str, Any], place: str) -> None:
    """A merge into the folder of one of its models is refused, and the model stays."""
    if place == "base_model":
        pair["base_model"] = pair["models"].pop()["model"]
    before = {path.name: path.read_bytes() for path in (tmp_path / "m1").iterdir()}
    (tmp_path / "out").symlink_to(tmp_path / "m1")
    result = merge(pair, tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: the output must be another folder than the models")
    assert f"is {place}, whose weights it would replace" in result.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "m1").iterdir()} == before


@pytest.mark.parametrize("form", ["{}/", "{}/../m1"])
@pytest.mark.parametrize("kind", ["model", "model_token"])
def test_a_token_from_another_spelling_of_a_folder(tmp_path: Path, pair: dict[str, Any], form: str, kind: str) -> None:
    """The row of a token comes from a model of the merge, however `tokenizer:` spells its folder."""
    for i in range(2):
        word_tokenizer(tmp_path / f"m{i}", [f"word{j}" for j in range(28)])
    path = form.format(tmp_path / "m1")
    source = path if kind == "model" else {"kind": kind, "model": path, "token": "word7"}
    pair["tokenizer"] = {"source": "union", "tokens": {"word3": {"source": source, "force": True}}}
    out = merged(pair, tmp_path / "out")[EMBEDDING]
    own = load_file(tmp_path / "m1" / "model.safetensors")[EMBEDDING]
    assert torch.equal(out[4], own[4 if kind == "model" else 8])


def test_a_token_from_the_folder_of_a_run(tmp_path: Path, pair: dict[str, Any]) -> None:
    """The folder of a run in `tokenizer:` stands for the same checkpoint as under `models:`."""
    for i in range(2):
        word_tokenizer(tmp_path / f"m{i}", [f"word{j}" for j in range(28)])
    (tmp_path / "run").mkdir()
    (tmp_path / "m1").rename(tmp_path / "run" / "checkpoint-7")
    pair["models"][1]["model"] = str(tmp_path / "run")
    tokens = {"word3": {"source": str(tmp_path / "run"), "force": True}}
    own = load_file(tmp_path / "run" / "checkpoint-7" / "model.safetensors")[EMBEDDING]
    for i, source in enumerate(("union", str(tmp_path / "run"))):
        tokenizer = {"source": source, "tokens": tokens}
        assert torch.equal(merged(pair | {"tokenizer": tokenizer}, tmp_path / f"out{i}")[EMBEDDING][4], own[4])
    plain = merged(pair | {"tokenizer_source": str(tmp_path / "run")}, tmp_path / "out")
    assert plain[EMBEDDING].shape[0] == 29


def test_a_token_from_no_model_of_the_merge(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A token's source must be a listed model, which is refused before anything is merged."""
    for i in range(2):
        word_tokenizer(tmp_path / f"m{i}", [f"word{j}" for j in range(28)])
    tokens = {"word3": {"source": str(tmp_path / "m2")}}
    pair["tokenizer"] = {"source": "union", "tokens": tokens}
    assert_config_refused(tmp_path, pair, "tokenizer.tokens.word3.source must be a model of the merge", "m2")
