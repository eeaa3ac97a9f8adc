"""Fixtures of the merge tests."""

from pathlib import Path
from typing import Any

import pytest

from tests.merging.reference import give_fisher, llama


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
