"""Freed memory of the process: kept for the next blocks, or given back to the system."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
# Parameter -> environment variable by which a user sets it, and the value to set.
_SETTINGS = {
    _M_TRIM_THRESHOLD: ("MALLOC_TRIM_THRESHOLD_", 1 << 26),
    _M_MMAP_THRESHOLD: ("MALLOC_MMAP_THRESHOLD_", 1 << 25),
}


@functools.cache
def keep_blocks() -> bool:
    """Let the C library keep up to 64 MB of freed blocks for later ones, from now on.

    Else glibc can give the top of its heap back to the system again and again while a tensor is merged in chunks, and
    the system clears each page anew. glibc chooses these values by itself once a block of 32 MB was freed; larger
    blocks are never kept.

    Returns:
        True if the C library does so; False if the user chose a value, or the C library has no such function.
    """
    function = _c_function("mallopt")
    if function is None or any(variable in os.environ for variable, _ in _SETTINGS.values()):
        return False
    return all(function(parameter, size) for parameter, (_, size) in _SETTINGS.items())


def give_back() -> bool:
    """Give the freed memory below the top of the heap back to the system.

    The C library keeps freed blocks for later ones. After a phase that read many tensors they would add to the peak of
    the next phase, whose tensors have other sizes.

    Returns:
        True if memory was given back; False if there was none, or the C library has no such function.
    """
    trim = _c_function("malloc_trim")
    return trim is not None and bool(trim(0))


@functools.cache
def _c_function(name: str) -> Callable[..., int] | None:
    """Return a function of glibc, or None on another system."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):  # another C library, or Windows
        return None
    return function
