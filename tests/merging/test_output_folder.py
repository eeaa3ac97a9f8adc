"""Output folder after a failed merge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from squisher_mergekit.errors import OutputError
from squisher_mergekit.merging.output_folder import output_folder
from tests.merging.reference import (
    assert_refused,
    give_fisher,
    llama,
    merge,
    store_fisher,
)


def test_new_folders_are_removed(tmp_path: Path) -> None:
    """The output folder and the parent folders made for it are removed."""
    _fail_in(tmp_path / "runs" / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_content_of_other_processes_stays(tmp_path: Path) -> None:
    """A parent folder with other new content stays with that content."""
    _fail_in(tmp_path / "runs" / "out", lambda: (tmp_path / "runs" / "other").mkdir())
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]


def test_an_existing_folder_keeps_its_files(tmp_path: Path) -> None:
    """Existing files and new files of other processes stay, and files of the merge are removed."""
    (tmp_path / "notes.txt").touch()
    (tmp_path / "model.safetensors").write_text("older")
    _fail_in(tmp_path, lambda: (tmp_path / "train.log").touch())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "notes.txt", "train.log"]
    assert (tmp_path / "model.safetensors").read_text() == "older"


def _fail_in(out: Path, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Write a tensor file into an output folder, and fail."""

    def write() -> None:
        with output_folder(out) as output:
            (output.path / "model.safetensors").write_text("newer")
            (output.path / "more").mkdir()
            meanwhile()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write()


def test_two_merges_into_one_folder_do_not_both_succeed(tmp_path: Path, pair: dict[str, Any]) -> None:
    """The merge that ends second is refused in one line; the output of the first stays."""
    out = tmp_path / "out"

    def other() -> None:
        with output_folder(out) as output:
            (output.path / "model.safetensors").write_text("second")
            assert merge(pair, out).exit_code == 0

    with pytest.raises(OutputError, match=r"one writer, but another process has written model.safetensors meanwhile"):
        other()
    assert len((out / "model.safetensors").read_bytes()) > len("second")


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-1.0, "negative")])
@pytest.mark.parametrize("flags", [[], ["--out-shard-size", "1K"], ["--async-write", "--out-shard-size", "1K"]])
def test_invalid_entries(tmp_path: Path, pair: dict[str, Any], value: float, word: str, flags: list[str]) -> None:
    """NaN, infinite and negative entries are found while merging, and all output is removed."""
    fisher = give_fisher(tmp_path / "m1", llama(tmp_path / "m1", 1), 1)
    fisher["model.norm.weight"][7] = value
    store_fisher(tmp_path / "m1", fisher)
    out = tmp_path / "deep" / "out"
    (tmp_path / "deep").mkdir()
    assert_refused(merge(pair, out, *flags), out, "model.norm.weight", f"1 {word} of 33")


def test_invalid_entries_leave_an_existing_folder_unchanged(tmp_path: Path, pair: dict[str, Any]) -> None:
    """An existing folder keeps exactly its earlier content."""
    fisher = give_fisher(tmp_path / "m1", llama(tmp_path / "m1", 1), 1)
    fisher["model.norm.weight"][7] = float("nan")
    store_fisher(tmp_path / "m1", fisher)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    assert merge(pair, out, "--out-shard-size", "1K").exit_code == 1
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
