"""Moves of folders: one rename, additions that a crash undoes, replacements that a crash completes."""

import os

import pytest

from squisher_mergekit.errors import OutputError
from squisher_mergekit.tensors import folder_moves
from squisher_mergekit.tensors.atomic import written_beside
from squisher_mergekit.tensors.folder_moves import is_new, recover, settled

NAMES = ["config.json", "fisher-00001-of-00002.safetensors", "fisher.safetensors.index.json"]


def _write(out, existing, text="new", names=NAMES, **options):
    with written_beside(out, existing, **options) as folder:
        for name in names:
            (folder / name).write_text(text)


def _cut(monkeypatch, after):
    """Fork a child that dies after so many links, as by SIGKILL."""
    link, seen = folder_moves.link, []

    def cut(*arguments):
        if len(seen) == after:
            os._exit(9)
        seen.append(1)
        link(*arguments)

    monkeypatch.setattr(folder_moves, "link", cut)


def _in_child(work):
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_an_empty_folder_keeps_its_mode(tmp_path):
    """The folder that replaces an empty one has the same permissions."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o770)
    _write(tmp_path / "out", "refuse")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o770
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == NAMES


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_addition_that_is_cut_is_undone(tmp_path, monkeypatch, after):
    """After a crash in an addition, the index is not there, and the next run finds the folder as it was."""
    (tmp_path / "notes.txt").touch()
    with monkeypatch.context() as patch:
        _cut(patch, after)
        assert _in_child(lambda: _write(tmp_path, "keep")) == 9
    assert not (tmp_path / NAMES[-1]).exists()
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_replacement_that_is_cut_is_complete_to_readers(tmp_path, monkeypatch, after):
    """Readers find all new files at once; the next run gives them their names and removes the obsolete file."""
    _write(tmp_path, "keep", "old", [*NAMES, "fisher-00002-of-00002.safetensors"])
    with monkeypatch.context() as patch:
        _cut(patch, after)
        obsolete = {"obsolete": lambda out: list(out.glob("fisher-*"))}
        assert _in_child(lambda: _write(tmp_path, "replace", **obsolete)) == 9
    assert {(settled(tmp_path) / name).read_text() for name in NAMES} == {"new"}
    recover(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(NAMES, "new")


def test_a_file_of_the_same_name_is_not_replaced(tmp_path):
    """An addition is refused if another process wrote one of its names, which keeps its contents; nothing is added."""

    def write():
        with written_beside(tmp_path, "keep") as folder:
            for name in NAMES:
                (folder / name).write_text("new")
            (tmp_path / "config.json").write_text("theirs")

    with pytest.raises(OutputError, match=r"must not have config.json yet"):
        write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"config.json": "theirs"}


def test_an_empty_volume_is_new(tmp_path):
    """The folder lost+found of a fresh volume does not count."""
    (tmp_path / "lost+found").mkdir()
    assert is_new(tmp_path)
    _write(tmp_path, "refuse")
    assert sorted(path.name for path in tmp_path.iterdir()) == [*NAMES, "lost+found"]


def test_the_working_directory_stays_the_same_folder(tmp_path, monkeypatch):
    """An empty working directory gets the files; a rename would leave the shell in a removed folder."""
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, "refuse")
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES


def test_without_hard_links(tmp_path, monkeypatch):
    """On a file system without hard links, files are copied."""

    def refuse(self, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(folder_moves.Path, "hardlink_to", refuse)
    (tmp_path / "notes.txt").touch()
    _write(tmp_path, "keep", "old")
    _write(tmp_path, "replace", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [*NAMES, "notes.txt"]
    assert {(tmp_path / name).read_text() for name in NAMES} == {"new"}
