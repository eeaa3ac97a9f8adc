"""Layouts of optimizer states: an error of another library is one line that names the file."""

import re
from pathlib import Path

import pytest

from squisher_mergekit.errors import CorruptFileError, NamingError, SquisherError
from squisher_mergekit.optimizers.checkpoints.layouts import LAYOUTS, Layout


def _layout(error):
    def read(location, verify):
        raise error

    return Layout("a test's", lambda folder: folder, read, re.compile("x"))


@pytest.mark.parametrize(
    "error", [AttributeError("no mesh"), RecursionError(), ValueError("a\nb"), RuntimeError(), MemoryError()]
)
def test_an_error_of_another_library_names_the_file_in_one_line(error):
    """A damaged pickle can make torch and this package's readers raise nearly anything."""
    with pytest.raises(
        CorruptFileError, match=r"^here must be a whole optimizer state, but .*; copy it again$"
    ) as found:
        _layout(error).load(Path("here"), True)
    assert "\n" not in str(found.value)


def test_an_error_of_this_package_stays_as_it_is():
    """A refusal that names the cause is not replaced."""
    error = NamingError("give names")
    with pytest.raises(NamingError) as found:
        _layout(error).load(Path("here"), True)
    assert found.value is error


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_missing_file_is_an_error_of_this_package(layout, tmp_path):
    """No layout lets an error of Python through."""
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(SquisherError, match=re.escape(str(tmp_path))):
        layout.load(tmp_path / "nowhere" / "x", True)
