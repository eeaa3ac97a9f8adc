"""Atomic output: a file or folder appears completely, or not at all."""

import json
import os
import threading
from pathlib import Path

import pytest

from squisher_mergekit.errors import OutputError
from squisher_mergekit.tensors import atomic
from squisher_mergekit.tensors.atomic import one_writer, write_json, write_whole, written_beside, written_file


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


def test_a_link_keeps_pointing(tmp_path):
    """The target of a link, and of a link that points nowhere yet, gets the bytes; the link stays."""
    (tmp_path / "target").write_text("old")
    for name in ("target", "missing"):
        link = tmp_path / f"to-{name}"
        link.symlink_to(name)
        write_whole(link, b"new")
        assert link.is_symlink()
        assert (tmp_path / name).read_text() == "new"


def test_a_pipe_gets_the_bytes(tmp_path):
    """A FIFO stays a FIFO, and its reader gets all of the file."""
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, b"x" * 100_000)
    reader.join()
    assert got == [b"x" * 100_000]
    assert pipe.is_fifo()


def test_a_pipe_without_a_reader_is_refused(tmp_path, monkeypatch):
    """A pipe that nobody reads does not block for ever."""
    monkeypatch.setattr(atomic, "_READER_DELAY", 0)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="choose another file"):
        write_whole(tmp_path / "pipe", b"x")


def test_a_device_stays_a_device():
    """/dev/full refuses the bytes as a full disk does; both it and /dev/null stay devices."""
    write_whole(Path("/dev/null"), b"x")
    with pytest.raises(OutputError, match="No space left on device; free space, or choose another file"):
        write_whole(Path("/dev/full"), b"x")
    assert Path("/dev/null").is_char_device()
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_the_umask_is_respected(tmp_path, mask):
    """New files and folders have the permissions that the user's umask leaves."""
    old = os.umask(mask)
    try:
        write_whole(tmp_path / "file", b"x")
        with written_beside(tmp_path / "out") as folder:
            (folder / "inner").touch()
    finally:
        os.umask(old)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "out", "out/inner")]
    assert modes == [0o666 & ~mask, 0o777 & ~mask, 0o666 & ~mask]


def test_a_new_file_replaces_none(tmp_path):
    """A file that must be new is refused if another process makes it meanwhile."""

    def write():
        with written_file(tmp_path / "a", new=True) as temporary:
            temporary.write_text("ours")
            (tmp_path / "a").write_text("theirs")

    with pytest.raises(OutputError, match="must be a new file"):
        write()
    assert (tmp_path / "a").read_text() == "theirs"


def test_of_two_writers_one_succeeds(tmp_path):
    """The second of two runs into one folder is refused, and the output of the first stays."""

    def write(text, meanwhile):
        with written_beside(tmp_path / "out") as folder:
            (folder / "name").write_text(text)
            meanwhile()

    with pytest.raises(OutputError, match="another process has written into it"):
        write("slow", lambda: write("fast", lambda: None))
    assert (tmp_path / "out" / "name").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("older", [None, b"older"])
def test_a_file_that_another_process_wrote_meanwhile_is_kept(tmp_path, older):
    """The second of two runs with one output file fails, whether the file is new or replaces an older one."""
    file = tmp_path / "report.json"
    if older is not None:
        file.write_bytes(older)
    with one_writer(file):
        write_whole(file, b"first")
        write_whole(file, b"again")  # this process may write it twice
        (tmp_path / "theirs").write_bytes(b"theirs")
        (tmp_path / "theirs").replace(file)
        with pytest.raises(OutputError, match=r"report\.json must have one writer"):
            write_whole(file, b"ours")
    assert file.read_bytes() == b"theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    write_whole(file, b"later")
    assert file.read_bytes() == b"later"


def test_a_file_that_appears_while_another_is_written_is_kept(tmp_path):
    """A file of another process that appears during the writing is not replaced."""

    def race():
        with written_file(tmp_path / "mask.safetensors") as temporary:
            temporary.write_bytes(b"ours")
            (tmp_path / "mask.safetensors").write_bytes(b"theirs")

    with pytest.raises(OutputError, match="another process has written it meanwhile"):
        race()
    assert (tmp_path / "mask.safetensors").read_bytes() == b"theirs"
