"""Missing, unreadable or foreign Fishers: one line, exit code 1, no output folder."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.merging.reference import assert_refused, merge, store_fisher


def _remove_fisher(folder: Path) -> None:
    for file in folder.glob("fisher*"):
        file.unlink()


def test_no_fisher(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A folder without a Fisher or optimizer state is refused with its name and the expected files."""
    _remove_fisher(tmp_path / "m1")
    assert_refused(
        merge(pair, tmp_path / "out"), tmp_path / "out", str(tmp_path / "m1"), "optimizer.pt", "fisher: PATH"
    )


def test_a_path_that_does_not_exist(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A mistyped path is refused by name, without a look-up on the Hub."""
    pair["models"][0]["parameters"]["fisher"] = str(tmp_path / "nowhere")
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "nowhere", "working directory")


def test_names_that_do_not_fit(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A Fisher with other names than the weights is refused for any value of `missing`."""
    store_fisher(tmp_path / "other", {"encoder.weight": torch.ones(3, 5)})
    pair["models"][1]["parameters"]["fisher"] = str(tmp_path / "other")
    pair["parameters"]["missing"] = "average"
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "encoder.weight", str(tmp_path / "m1"))


def test_a_truncated_file(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A truncated Fisher is refused from its header."""
    file = tmp_path / "m0" / "fisher.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", str(file), "whole safetensors file")


def test_metadata_missing(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A Fisher without metadata is refused, because its scale is unknown."""
    (tmp_path / "m0" / "fisher_config.json").unlink()
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "fisher_config.json", str(tmp_path / "m0"))


def test_another_models_fisher_is_a_warning(
    tmp_path: Path, pair: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A Fisher with the right names, made at other weights, gives a warning that states the difference."""
    pair["models"][1]["parameters"]["fisher"] = str(tmp_path / "m0")
    assert merge(pair, tmp_path / "out").exit_code == 0
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert str(tmp_path / "m1") in warning
    assert "same names, shapes and dtypes, but other values" in warning
