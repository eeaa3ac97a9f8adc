"""Atomic output: a file or folder appears completely, or not at all."""

import json

import pytest

from squisher_mergekit.tensors import atomic
from squisher_mergekit.tensors.atomic import write_json, written_beside


def test_an_error_leaves_the_folder_unchanged(tmp_path):
    """An error inside leaves an existing folder unchanged."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("kept")

    def fail():
        with written_beside(tmp_path / "out") as folder:
            assert folder.name == "out"
            (folder / "kept").write_text("lost")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "kept").read_text() == "kept"


def test_a_report_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    """A file is replaced after its data is on disk. An earlier failure leaves the old file and no temporary one."""
    file = tmp_path / "new" / "report.json"
    write_json(file, {"a": 1})
    assert json.loads(file.read_text()) == {"a": 1}

    def fail(_):
        raise OSError("no room")

    monkeypatch.setattr(atomic.os, "fsync", fail)
    with pytest.raises(OSError, match="no room"):
        write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in file.parent.iterdir()] == ["report.json"]
