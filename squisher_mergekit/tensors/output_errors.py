"""Errors of the operating system about an output, as one line."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from squisher_mergekit.errors import OutputError
from squisher_mergekit.tensors.temporary import is_temporary

_FULL = {errno.ENOSPC, errno.EDQUOT}
_OF_OUTPUT = {*_FULL, errno.EROFS, errno.EFBIG}


@contextlib.contextmanager
def output_errors(out: Path, noun: str) -> Iterator[None]:
    """Turn an error of the operating system about the output into one line.

    Args:
        out: The output.
        noun: ``file`` or ``folder``.

    Raises:
        OutputError: The disk is full, the place is read-only, or similar.
    """
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        number = _number(error)
        about = number in _OF_OUTPUT or (isinstance(error, OSError) and _is_about(error, out))
        if not about:
            raise
        cure = "free space, or choose" if number in _FULL else "choose"
        reason = os.strerror(number) if number else str(error)
        raise OutputError(f"the output cannot be written to {_final(out)}: {reason}; {cure} another {noun}") from error


def _final(out: Path) -> Path:
    """Return the final name of an output inside a temporary folder, and any other path unchanged."""
    scratch = next((folder for folder in out.parents if is_temporary(folder)), None)
    return out if scratch is None else scratch.parent / out.relative_to(scratch)


def _number(error: Exception) -> int | None:
    """Return the number of an operating system's error; safetensors has it in the text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _is_about(error: OSError, out: Path) -> bool:
    """Return True if an error names the output, a folder above it, or a temporary file."""
    target = os.path.realpath(out)
    named = [os.path.realpath(name) for name in (error.filename, error.filename2) if isinstance(name, str | Path)]
    return any(name == target or target.startswith(name + os.sep) or ".squisher" in name for name in named)
