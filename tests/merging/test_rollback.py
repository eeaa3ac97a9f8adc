"""Output folder after a failed merge."""

from pathlib import Path
from typing import Any

import pytest

from squisher_mergekit.merging.rollback import OutputFolder
from tests.merging.reference import (
    assert_refused,
    give_fisher,
    llama,
    merge,
    store_fisher,
)


def test_new_folders_are_removed(tmp_path: Path) -> None:
    """The output folder and the parent folders made for it are removed."""
    output = OutputFolder(tmp_path / "runs" / "deep" / "out")
    output.folder.mkdir(parents=True)
    (output.folder / "model.safetensors").touch()
    output.restore()
    assert list(tmp_path.iterdir()) == []


def test_content_of_other_processes_stays(tmp_path: Path) -> None:
    """A parent folder with other new content stays with that content."""
    output = OutputFolder(tmp_path / "runs" / "out")
    output.folder.mkdir(parents=True)
    (tmp_path / "runs" / "other").mkdir()
    output.restore()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]


def test_an_existing_folder_keeps_its_files(tmp_path: Path) -> None:
    """Existing files of the folder stay, and new files and folders are removed."""
    (tmp_path / "notes.txt").touch()
    output = OutputFolder(tmp_path)
    (tmp_path / "model-1.safetensors").touch()
    (tmp_path / "more").mkdir()
    output.restore()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


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
