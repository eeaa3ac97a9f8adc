"""Parts of files that whole merges read ahead."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import CorruptFileError
from squisher_mergekit.tensors import read_ahead
from squisher_mergekit.tensors.safetensors import read_header
from tests.merging.reference import give_fisher, llama

Piece = tuple[int, int, int]


def _merge(root: Path, out: Path, method: str) -> dict[str, torch.Tensor]:
    models = [{"model": str(root / f"m{i}"), "parameters": {"fisher": str(root / f"f{i}")}} for i in range(2)]
    base = {"base_model": str(root / "m0")} if method == "ubgm_squisher" else {}
    config = MergeConfiguration.model_validate({"merge_method": method, **base, "models": models})
    run_merge(config, str(out), MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False))
    return load_file(out / "model.safetensors")


def _record(monkeypatch: pytest.MonkeyPatch) -> list[Piece]:
    """Record the pieces that a thread asks for: inode, first byte, length."""
    pieces: list[Piece] = []

    def advise(file: int, start: int, length: int, _: int) -> None:
        pieces.append((os.fstat(file).st_ino, start, length))

    monkeypatch.setattr(read_ahead.os, "posix_fadvise", advise)
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
    without = _merge(tmp_path, tmp_path / "without", method)
    assert pieces == []
    monkeypatch.delenv(read_ahead.SWITCH)
    found = _merge(tmp_path, tmp_path / "with", method)
    assert all(torch.equal(found[name], without[name]) for name in without)
    files = [file for i in range(2) for file in (tmp_path / f"m{i}/model.safetensors", *tmp_path.glob(f"f{i}/*.saf*"))]
    # A tiny merge can end before the thread does, which then stops.
    assert pieces
    assert len(set(pieces)) == len(pieces)
    assert set(pieces) <= {part for file in files for part in _contents(file)}
    inodes = {inode for inode, _, _ in pieces}
    assert inodes <= {file.stat().st_ino for file in files}


def test_a_damaged_fisher_is_refused_by_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread stays silent on a file that lost its end; the merge refuses it, and no thread is left."""
    import threading

    for i in range(2):
        give_fisher(tmp_path / f"m{i}", llama(tmp_path / f"m{i}", i), i, tmp_path / f"f{i}")
    file = tmp_path / "f1" / "fisher.safetensors"

    def advise(*_: int) -> None:
        os.truncate(file, file.stat().st_size - 4)

    monkeypatch.setattr(read_ahead.os, "posix_fadvise", advise)
    with pytest.raises(CorruptFileError, match="changed since its header was read"):
        _merge(tmp_path, tmp_path / "out", "squisher")
    assert all(thread.name != "read-ahead" for thread in threading.enumerate())
    assert not (tmp_path / "out" / "model.safetensors").exists()
