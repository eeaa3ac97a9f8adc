"""Freed memory of the process, given back to the system."""

import ctypes
import functools
from collections.abc import Callable


def give_back() -> bool:
    """Give the freed memory below the top of the heap back to the system.

    The C library keeps freed blocks of up to 32 MB for later ones. After a phase that read many tensors they would add
    to the peak of the next phase, whose tensors have other sizes.

    Returns:
        True if memory was given back; False if there was none, or the C library has no such function.
    """
    trim = _trim()
    return trim is not None and bool(trim(0))


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """Return glibc's ``malloc_trim``, or None on another system."""
    try:
        function: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, or Windows
        return None
    return function
