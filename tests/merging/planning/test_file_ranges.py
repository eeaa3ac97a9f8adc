"""Parts of files that whole merges read ahead."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.tensors import read_ahead
from squisher_mergekit.tensors.safetensors import read_header
from tests.merging.reference import assert_refused, give_fisher, llama, merge, merged, store_fisher

Piece = tuple[int, int, int]


def _config(root: Path, method: str) -> dict[str, Any]:
    models = [{"model": str(root / f"m{i}"), "parameters": {"fisher": str(root / f"f{i}")}} for i in range(2)]
    base = {"base_model": str(root / "m0")} if method == "ubgm_squisher" else {}
    return {"merge_method": method, **base, "models": models}


def _record(monkeypatch: pytest.MonkeyPatch) -> list[Piece]:
    """Record the pieces that a thread asks for: inode, first byte, length."""
    pieces: list[Piece] = []

    def advise(file: int, start: int, length: int, _: int) -> None:
        pieces.append((os.fstat(file).st_ino, start, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return pieces


def _contents(file: Path) -> list[Piece]:
    """Return the parts of a file with tensors, in order."""
    header = read_header(file)
    spans = sorted(entry["data_offsets"] for entry in header.entries.values())
    return [(file.stat().st_ino, header.start + begin, end - begin) for begin, end in spans]


@pytest.mark.parametrize(("method", "compress"), [("squisher", "log8"), ("ubgm_squisher", None)])
def test_a_merge_asks_once_for_the_bytes_of_its_tensors(
    tmp_path: Path, method: str, compress: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread asks for weights and Fishers, compact ones too; the result has the bits of a merge without it."""
    for i in range(2):
        give_fisher(tmp_path / f"m{i}", llama(tmp_path / f"m{i}", i), i)
        load_fisher(tmp_path / f"m{i}").save(tmp_path / f"f{i}", compress=compress)
    monkeypatch.setenv(read_ahead.SWITCH, "0")
    pieces = _record(monkeypatch)
    without = merged(_config(tmp_path, method), tmp_path / "without")
    assert pieces == []
    monkeypatch.delenv(read_ahead.SWITCH)
    found = merged(_config(tmp_path, method), tmp_path / "with")
    assert all(torch.equal(found[name], without[name]) for name in without)
    files = [file for i in range(2) for file in (tmp_path / f"m{i}/model.safetensors", *tmp_path.glob(f"f{i}/*.saf*"))]
    # A tiny merge can end before the thread does, which then stops.
    assert pieces
    assert len(set(pieces)) == len(pieces)
    assert set(pieces) <= {part for file in files for part in _contents(file)}


@pytest.mark.parametrize(("value", "method"), [(float("nan"), "squisher"), (-1.0, "ubgm_squisher")])
def test_a_merge_that_is_refused_midway_leaves_no_thread(tmp_path: Path, value: float, method: str) -> None:
    """An invalid entry in the last tensor stops the merge in one line, and its thread with it."""
    for i in range(2):
        tensors = give_fisher(tmp_path / f"m{i}", llama(tmp_path / f"m{i}", i), i)
        tensors[max(tensors)].flatten()[-1] = value if i else 1.0
        store_fisher(tmp_path / f"f{i}", tensors)
    refused = merge(_config(tmp_path, method), tmp_path / "out")
    assert_refused(refused, tmp_path / "out", "must be finite and not negative", max(tensors))
    assert all(thread.name != "read-ahead" for thread in threading.enumerate())
