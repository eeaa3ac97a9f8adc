"""Fixtures of the merge tests."""

from pathlib import Path
from typing import Any

import pytest
import torch

from squisher_mergekit.merging import execution, fused
from tests.merging.reference import give_fisher, llama


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Any]:
    """Return the configuration of a merge of two models with Fishers."""
    for i in range(2):
        give_fisher(tmp_path / f"m{i}", llama(tmp_path / f"m{i}", i), i)
    return {
        "merge_method": "squisher",
        "models": [{"model": str(tmp_path / f"m{i}"), "parameters": {"weight": 1.0}} for i in range(2)],
        "parameters": {},
    }


@pytest.fixture
def small_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small blocks, because each operation on a tile is slow in Triton's interpreter."""
    if device.type == "cpu":
        monkeypatch.setattr(fused, "BLOCK", 2048)


@pytest.fixture
def by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the accelerator path without the fused kernel, also on the CPU."""
    monkeypatch.setattr(execution.Operands, "on_accelerator", property(lambda self: True))
    monkeypatch.setattr(fused, "runs_on", lambda device: False)


@pytest.fixture
def by_kernel(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the accelerator path, also on the CPU, and fail if the fused kernel is not used."""
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    monkeypatch.setattr(execution.Operands, "on_accelerator", property(lambda self: True))
    monkeypatch.setattr(execution, "compiled", lambda *_: pytest.fail("the fused kernel was not used"))


@pytest.fixture(params=["by_kernel", "by_formula"])
def as_accelerator(request: pytest.FixtureRequest) -> None:
    """Run the accelerator path, also on the CPU, once with the kernel and once with the formula."""
    request.getfixturevalue(request.param)
