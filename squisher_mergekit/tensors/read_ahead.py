"""Read-ahead of parts of files into the page cache, in the order in which a schedule needs them.

A merge reads its tensors one after another and computes in between. Meanwhile the disk would be idle: the kernel reads
ahead a few hundred kilobytes, a fast disk needs megabytes in flight. A thread asks for them, at most ``budget`` bytes
ahead of the step that runs. It copies nothing and reports nothing: the read itself finds a missing or damaged file.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

BUDGET = 256 << 20
PIECE = 8 << 20
SWITCH = "SQUISHER_MERGEKIT_READ_AHEAD"  # megabytes; 0 switches the read-ahead off


class FileRange(NamedTuple):
    """Consecutive bytes of a file.

    Attributes:
        file: The file.
        start: Offset of the first byte.
        length: Number of bytes.
    """

    file: Path
    start: int
    length: int


class ReadAhead:
    """Thread that brings the parts of files of a schedule into the page cache before they are read.

    Args:
        steps: Parts of files that each step reads, in the order of the steps.
        budget: Largest number of bytes ahead of the running step.
        piece: Bytes asked for at once.

    Example:
        >>> with ReadAhead([[FileRange(Path("missing"), 0, 10)], []]) as ahead:
        ...     ahead.reached(0)
    """

    def __init__(self, steps: Sequence[Sequence[FileRange]], budget: int = BUDGET, piece: int = PIECE) -> None:
        self._steps = steps
        self._budget, self._piece = budget, max(1, min(piece, budget))
        self._ends = list(accumulate(sum(part.length for part in step) for step in steps))
        self._running = -1
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ReadAhead:
        """Start the thread, where the system can read ahead and there is something to read."""
        if self._budget > 0 and self._ends and self._ends[-1] and hasattr(os, "posix_fadvise"):
            self._thread = threading.Thread(target=self._work, name="read-ahead", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def reached(self, step: int) -> None:
        """Move the window: a step begins, and the bytes of the steps before it are read."""
        with self._changed:
            self._running = max(self._running, step)
            self._changed.notify()

    def _work(self) -> None:
        """Ask for all pieces in order, each as soon as the budget permits."""
        asked = 0
        for step, parts in enumerate(self._steps):
            for part in parts:
                with contextlib.suppress(OSError), _opened(part.file) as file:
                    for piece in _pieces(part, self._piece):
                        if not self._wait(asked + piece.length):
                            break
                        if not self._is_over(step):
                            os.posix_fadvise(file, piece.start, piece.length, os.POSIX_FADV_WILLNEED)
                        asked += piece.length
                if self._closed:
                    return
            asked = self._ends[step]  # also after a file that could not be opened

    def _wait(self, asked: int) -> bool:
        """Wait until the budget permits a number of bytes from the first step on; return False if closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or asked <= self._permitted())
            return not self._closed

    def _permitted(self) -> int:
        """Return the number of bytes from the first step on that may be asked for."""
        return self._budget + (self._ends[self._running] if self._running >= 0 else 0)

    def _is_over(self, step: int) -> bool:
        """Return True for a step whose bytes are read already."""
        return step < self._running


def budget_of(value: str | None) -> int:
    """Return the budget in bytes for a value of the environment variable, in megabytes.

    Args:
        value: The text; None or no number: the default.

    Example:
        >>> budget_of("64"), budget_of("0"), budget_of(None) == budget_of("much") == BUDGET
        (67108864, 0, True)
    """
    return int(value) << 20 if value is not None and value.isdecimal() else BUDGET


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a file for reading, without waiting for the writer of a FIFO."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield file
    finally:
        os.close(file)


def _pieces(part: FileRange, length: int) -> Iterator[FileRange]:
    """Yield the consecutive pieces of a part, of at most a length each."""
    for start in range(part.start, part.start + part.length, length):
        yield FileRange(part.file, start, min(length, part.start + part.length - start))
