"""Wrong parameters under stock commands: one line, exit code 1, no output folder."""

from pathlib import Path
from typing import Any

import pytest

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.merging.parameters import of_method
from tests.merging.models import base_and_models, density_config, nets
from tests.merging.reference import assert_config_refused, assert_refused, merge, merge_raw


@pytest.mark.parametrize(
    ("key", "hint"), [("wieght", "did you mean weight?"), ("fishers", "fisher"), ("qqq", "valid are fisher, weight")]
)
def test_a_misspelt_parameter(tmp_path: Path, pair: dict[str, Any], key: str, hint: str) -> None:
    """A misspelt key is refused with its place and the nearest valid key."""
    pair["models"][1]["parameters"][key] = 0.5
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "models[1].parameters", repr(key), hint)


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
    """An invalid value is refused with its place and the accepted values."""
    pair["parameters"][key] = value
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "parameters", key, word)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), True, "much"])
def test_a_wrong_weight(tmp_path: Path, pair: dict[str, Any], value: object) -> None:
    """A weight that is negative or not finite is refused."""
    pair["models"][0]["parameters"]["weight"] = value
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "models[0].parameters.weight", "finite number >= 0")


def test_a_global_parameter_of_one_model(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A parameter for all models under one model, where mergekit would ignore it, is refused."""
    pair["models"][0]["parameters"]["scaling"] = "raw"
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "models[0].parameters.scaling", "top-level")


def test_a_list_of_fishers(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A list of paths, which mergekit would read as a gradient over the layers, is refused."""
    pair["parameters"]["fisher"] = [str(tmp_path / "m0"), str(tmp_path / "m1")]
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "parameters.fisher must be one value", "gradient")


@pytest.mark.parametrize("value", [0, -0.2, 1.5, float("nan"), True, "half", [1.0, 0.0]])
def test_a_wrong_density(tmp_path: Path, value: object) -> None:
    """A density must be above 0 and at most 1. A density of 0 is refused with the cure of leaving the model out."""
    base_and_models(tmp_path, 3)
    assert_config_refused(
        tmp_path,
        density_config(tmp_path, [0.5, value]),
        "models[1].parameters.density",
        "> 0 and <= 1",
        "leave the model out",
    )


def test_mergekit_pytorch_refuses(tmp_path: Path) -> None:
    """`mergekit-pytorch` names misspelt keys and missing tensors like `mergekit-yaml`."""
    nets(tmp_path, 2)
    entries = [{"model": str(tmp_path / f"n{i}" / "net.safetensors")} for i in range(2)]
    entries[1]["parameters"] = {"wieght": 1.0}  # type: ignore[assignment]
    result = merge_raw(tmp_path, {"merge_method": "squisher", "models": entries})
    assert (result.exit_code, "did you mean weight?" in result.output) == (1, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("weight", 1e31), ("weight", 1e-40), ("fisher_scale", 3e38), ("fisher_scale", 1e-300)]
)
def test_a_factor_out_of_range(tmp_path: Path, pair: dict[str, Any], key: str, value: float) -> None:
    """Factors whose products leave float64, or whose ratios leave float32, are refused with the range."""
    pair["models"][0]["parameters"][key] = value
    assert_config_refused(tmp_path, pair, f"models[0].parameters.{key}", "1e-30", "<= 1e+30")


@pytest.mark.parametrize(("method", "key"), [("squisher", "floor"), ("ubgm_squisher", "prior")])
def test_a_share_of_the_mean_out_of_range(method: str, key: str) -> None:
    """A floor or prior that swamps every F is refused; the largest accepted one is used."""
    parameter = next(item for item in of_method(method) if item.name == key)
    assert parameter.validate(1e9) == 1e9
    with pytest.raises(ConfigError, match=r"<= 1e\+09"):
        parameter.validate(1.1e9)
