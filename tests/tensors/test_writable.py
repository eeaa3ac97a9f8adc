"""Outputs that cannot be written are found before any work, and the check leaves nothing."""

from pathlib import Path

import pytest

from squisher_mergekit.errors import OutputError
from squisher_mergekit.tensors.writable import check_file, check_folder


@pytest.fixture
def place(tmp_path):
    """Return a folder with a file and a folder."""
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "content").write_text("text")
    return tmp_path


@pytest.mark.parametrize("name", ["new", "file", "missing/new", "folder/new", "folder/content", "ü ö/new"])
def test_a_file_that_can_be_written(place, name):
    """An existing file can be replaced, missing folders can be made; neither happens here."""
    before = sorted(place.rglob("*"))
    check_file(place / name)
    assert sorted(place.rglob("*")) == before
    assert (place / "file").read_text() == "text"


@pytest.mark.parametrize(
    ("name", "said"),
    [("folder", "must be a file, but .*folder is a folder"), ("file/new", "cannot be written to .*file/new: Not a")],
)
def test_a_file_that_cannot_be_written(place, name, said):
    """A folder is no file, and a file has nothing below it."""
    with pytest.raises(OutputError, match=said):
        check_file(place / name)


@pytest.mark.parametrize("name", ["new", "missing/new", "folder", "folder/new", "ü ö/new"])
def test_a_folder_that_can_be_written(place, name):
    """Whether an existing folder must be empty is for the command to say."""
    before = sorted(place.rglob("*"))
    check_folder(place / name)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "said"),
    [("file", "must be a folder, but .*file is a file"), ("file/new", "cannot be written to .*file/new: Not a")],
)
def test_a_folder_that_cannot_be_written(place, name, said):
    """A file is no folder, and has nothing below it."""
    with pytest.raises(OutputError, match=said):
        check_folder(place / name)


@pytest.mark.parametrize("check", [check_file, check_folder])
def test_a_file_system_that_takes_no_files(check):
    """The permissions of /proc allow root to write, but the file system does not."""
    if not Path("/proc/self").exists():
        pytest.skip("there is no /proc")
    with pytest.raises(OutputError, match="cannot be written to /proc/new"):
        check(Path("/proc/new"))


@pytest.mark.parametrize("name", ["-", "/dev/null"])
def test_a_stream_is_a_file(name):
    """A device and standard output need no folder that can be written."""
    check_file(Path(name))


def test_standard_output_is_no_folder():
    """A folder cannot be written there."""
    with pytest.raises(OutputError, match="- is standard output"):
        check_folder(Path("-"))
