"""Checks, before any work, that an output can be written."""

from __future__ import annotations

import os
from pathlib import Path

from squisher_mergekit.errors import OutputError
from squisher_mergekit.tensors.atomic import STANDARD_OUTPUT, is_stream
from squisher_mergekit.tensors.folder_moves import place_beside
from squisher_mergekit.tensors.output_errors import output_errors
from squisher_mergekit.tensors.temporary import temporary_folder


def check_file(file: Path) -> None:
    """Refuse a file that :func:`~squisher_mergekit.tensors.atomic.written_file` cannot write.

    Folders above the file may be missing. Devices, pipes and standard output are not opened.

    Args:
        file: The file to write.

    Raises:
        OutputError: ``file`` is a folder, a file is in the place of a folder above it, or the place is read-only.

    Example:
        >>> check_file(Path())
        Traceback (most recent call last):
        squisher_mergekit.errors.OutputError: the output must be a file, but . is a folder; give the name of a file
    """
    if is_stream(file):
        return
    with output_errors(file, "file"):
        target = Path(os.path.realpath(file))
        if target.is_dir():
            raise OutputError(f"the output must be a file, but {file} is a folder; give the name of a file in it")
        if target.exists() and os.access(target, os.W_OK) and not os.access(target.parent, os.W_OK | os.X_OK):
            return  # written in place
        _try(_existing(target.parent), target.name)


def check_folder(folder: Path) -> None:
    """Refuse a folder that :func:`~squisher_mergekit.tensors.atomic.written_beside` cannot write.

    Folders above it may be missing.

    Args:
        folder: The folder to write.

    Raises:
        OutputError: ``folder`` or the place of a folder above it is a file, or the place is read-only.
    """
    if str(folder) == STANDARD_OUTPUT:
        raise OutputError("the output must be a folder, but - is standard output; give the name of a folder")
    with output_errors(folder, "folder"):
        target = Path(os.path.realpath(folder))
        if target.exists() and not target.is_dir():
            raise OutputError(f"the output must be a folder, but {folder} is a file; give the name of a folder")
        _try(place_beside(target) if target.exists() else _existing(target.parent), target.name)


def _existing(folder: Path) -> Path:
    """Return the nearest folder that exists, itself or above."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _try(place: Path, name: str) -> None:
    """Make and remove a temporary folder, as permissions alone do not tell of file systems that are read-only."""
    with temporary_folder(place, name):
        pass
