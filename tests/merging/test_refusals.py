"""Wrong input under stock commands: one line, exit code 1, no output folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from squisher_mergekit.errors import RefusedError
from tests.merging.reference import give_fisher, llama, merge, store_fisher


def _assert_refused(result: Result, out: Path, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[0], lines[0]
    assert not out.exists()


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Any]:
    """Two models with Fishers, and the configuration that merges them."""
    for i in range(2):
        give_fisher(tmp_path / f"m{i}", llama(tmp_path / f"m{i}", i), i)
    return {
        "merge_method": "squisher",
        "models": [{"model": str(tmp_path / f"m{i}"), "parameters": {"weight": 1.0}} for i in range(2)],
        "parameters": {},
    }


def _remove_fisher(folder: Path) -> None:
    for file in folder.glob("fisher*"):
        file.unlink()


def test_no_fisher(tmp_path: Path, pair: dict[str, Any]) -> None:
    """Without Fisher and optimizer state the folder and what was looked for are named."""
    _remove_fisher(tmp_path / "m1")
    _assert_refused(
        merge(pair, tmp_path / "out"), tmp_path / "out", str(tmp_path / "m1"), "optimizer.pt", "fisher: PATH"
    )


def test_a_path_that_does_not_exist(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A mistyped path is named, not looked for on the Hub."""
    pair["models"][0]["parameters"]["fisher"] = str(tmp_path / "nowhere")
    _assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "nowhere", "working directory")


@pytest.mark.parametrize(
    ("key", "hint"), [("wieght", "did you mean weight?"), ("fishers", "fisher"), ("qqq", "valid are fisher, weight")]
)
def test_a_misspelt_parameter(tmp_path: Path, pair: dict[str, Any], key: str, hint: str) -> None:
    """A misspelt key is an error that names the place and the nearest valid key."""
    pair["models"][1]["parameters"][key] = 0.5
    _assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "models[1].parameters", repr(key), hint)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("scaling", "debaised", "one of debiased, raw, per_example"),
        ("normalize", "L3", "one of auto"),
        ("floor", -0.1, "a finite number >= 0"),
        ("missing", "zero", "one of error, average"),
        ("prior", 0.1, "belongs to ubgm_squisher"),
    ],
)
def test_a_wrong_value(tmp_path: Path, pair: dict[str, Any], key: str, value: object, word: str) -> None:
    """A value that a parameter does not accept is named with its place and what is accepted."""
    pair["parameters"][key] = value
    _assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "parameters", key, word)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), True, "much"])
def test_a_wrong_weight(tmp_path: Path, pair: dict[str, Any], value: object) -> None:
    """Weights are finite and not negative."""
    pair["models"][0]["parameters"]["weight"] = value
    _assert_refused(
        merge(pair, tmp_path / "out"), tmp_path / "out", "models[0].parameters.weight", "finite number >= 0"
    )


def test_weights_all_zero(tmp_path: Path, pair: dict[str, Any]) -> None:
    """Weights that are all 0 are refused with a tensor's name."""
    for model in pair["models"]:
        model["parameters"]["weight"] = 0.0
    _assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "must not all be 0", "model.embed_tokens.weight")


def test_a_global_parameter_of_one_model(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A parameter for all models that stands under one model, where mergekit would ignore it, is refused."""
    pair["models"][0]["parameters"]["scaling"] = "raw"
    _assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "models[0].parameters.scaling", "top-level")


def test_a_list_of_fishers(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A list of paths, which mergekit would read as a gradient over the layers, is refused."""
    pair["parameters"]["fisher"] = [str(tmp_path / "m0"), str(tmp_path / "m1")]
    _assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "parameters.fisher must be one value", "gradient")


def test_fisher_none_outside_a_base(tmp_path: Path, pair: dict[str, Any]) -> None:
    """`fisher: none` is for the base of UBGM alone."""
    pair["models"][0]["parameters"]["fisher"] = "none"
    _assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "base of ubgm_squisher alone")


def test_ubgm_without_a_base(tmp_path: Path, pair: dict[str, Any]) -> None:
    """UBGM without a base says what is needed."""
    pair["merge_method"] = "ubgm_squisher"
    _assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "ubgm_squisher needs base_model:")


def test_names_that_do_not_fit(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A Fisher with other names than the weights' is refused, whatever `missing` says."""
    store_fisher(tmp_path / "other", {"encoder.weight": torch.ones(3, 5)})
    pair["models"][1]["parameters"]["fisher"] = str(tmp_path / "other")
    pair["parameters"]["missing"] = "average"
    _assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "encoder.weight", str(tmp_path / "m1"))


def test_shapes_that_do_not_fit(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A Fisher of another size is refused with tensor and both shapes."""
    wide = llama(tmp_path / "wide", 5, intermediate_size=19)
    give_fisher(tmp_path / "wide", wide, 5)
    pair["models"][1]["parameters"]["fisher"] = str(tmp_path / "wide")
    _assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "[17, 33]", "[19, 33]", "mlp")


def test_a_tensor_missing(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A tensor without a Fisher is refused by name, with how many are covered and the cure."""
    weights = llama(tmp_path / "m0", 0)
    give_fisher(tmp_path / "m0", {n: t for n, t in weights.items() if n != "model.norm.weight"}, 0)
    _assert_refused(
        merge(pair, tmp_path / "out"), tmp_path / "out", "covers 29 of 30", "model.norm.weight", "missing: average"
    )


def test_a_truncated_file(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A truncated Fisher is found by its header."""
    file = tmp_path / "m0" / "fisher.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    _assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", str(file), "whole safetensors file")


def test_metadata_missing(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A Fisher without its metadata has no scale, and is refused."""
    (tmp_path / "m0" / "fisher_config.json").unlink()
    _assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "fisher_config.json", str(tmp_path / "m0"))


def test_steps_unknown(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A moving average of unknown age cannot be debiased: refused, with `scaling: raw` as the cure."""
    weights = llama(tmp_path / "m0", 0)
    store_fisher(tmp_path / "m0", weights, statistic="ema", optimizer={"beta2": 0.999})
    _assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "steps", "scaling: raw")


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-1.0, "negative")])
@pytest.mark.parametrize("flags", [[], ["--out-shard-size", "1K"], ["--async-write", "--out-shard-size", "1K"]])
def test_invalid_entries(tmp_path: Path, pair: dict[str, Any], value: float, word: str, flags: list[str]) -> None:
    """NaN, infinite and negative entries are found while merging; all that was written is removed."""
    fisher = give_fisher(tmp_path / "m1", llama(tmp_path / "m1", 1), 1)
    fisher["model.norm.weight"][7] = value
    store_fisher(tmp_path / "m1", fisher)
    out = tmp_path / "deep" / "out"
    (tmp_path / "deep").mkdir()
    _assert_refused(merge(pair, out, *flags), out, "model.norm.weight", f"1 {word} of 33")


def test_invalid_entries_leave_an_existing_folder_as_it_was(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A folder that existed before keeps what it held, and nothing else."""
    fisher = give_fisher(tmp_path / "m1", llama(tmp_path / "m1", 1), 1)
    fisher["model.norm.weight"][7] = float("nan")
    store_fisher(tmp_path / "m1", fisher)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    assert merge(pair, out, "--out-shard-size", "1K").exit_code == 1
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_another_models_fisher_is_a_warning(
    tmp_path: Path, pair: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A Fisher of fitting names, made at other weights, is warned about and says what differs."""
    pair["models"][1]["parameters"]["fisher"] = str(tmp_path / "m0")
    assert merge(pair, tmp_path / "out").exit_code == 0
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert str(tmp_path / "m1") in warning
    assert "same names, shapes and dtypes, but other values" in warning


def test_stock_methods_keep_their_ways(tmp_path: Path, pair: dict[str, Any]) -> None:
    """Other methods still ignore unknown keys, as mergekit does."""
    pair["merge_method"] = "linear"
    pair["parameters"]["wieght"] = 3
    assert merge(pair, tmp_path / "out").exit_code == 0


def test_messages_are_one_line() -> None:
    """Line breaks in a message become spaces, and every refusal is a click error with exit code 1."""
    error = RefusedError("one\n two")
    assert (error.message, error.exit_code) == ("one two", 1)
