"""Errors about an output are one line; errors about something else pass."""

import errno
import os

import pytest

from squisher_mergekit.errors import OutputError
from squisher_mergekit.tensors.output_errors import output_errors


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(tmp_path, number):
    """A full disk and a full quota name the output and the cure."""
    said = r"written to .*out: .*; free space, or choose another folder"
    with pytest.raises(OutputError, match=said), output_errors(tmp_path / "out", "folder"):
        raise OSError(number, os.strerror(number))


def test_a_full_disk_in_safetensors(tmp_path):
    """The library safetensors has the number in the text of an error of its own."""
    with pytest.raises(OutputError, match="device; free space"), output_errors(tmp_path / "out", "file"):
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")


def test_an_error_about_an_input_passes(tmp_path):
    """A file that cannot be read is no error of the output."""
    with pytest.raises(FileNotFoundError), output_errors(tmp_path / "out", "folder"):
        (tmp_path / "input").read_bytes()


def test_a_file_in_the_way(tmp_path):
    """A file in place of a folder above the output is named."""
    (tmp_path / "file").touch()
    said = r"file/out: Not a directory; choose another folder"
    with pytest.raises(OutputError, match=said), output_errors(tmp_path / "file" / "out", "folder"):
        (tmp_path / "file" / "out").mkdir()


@pytest.mark.parametrize("scratch", [".merged.0a1b2c3d.squisher", ".x.y.ffffffff.squisher"])
def test_the_final_name_is_named(tmp_path, scratch):
    """The message has the name that the user gave, not that of a temporary folder."""
    out = tmp_path / scratch / "merged"
    with pytest.raises(OutputError, match=f"written to {tmp_path}/merged: "), output_errors(out, "folder"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
