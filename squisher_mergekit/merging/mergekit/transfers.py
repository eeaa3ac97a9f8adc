"""Tensors between host and GPU in mergekit's executor: through pinned memory while a merge of ours runs."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from squisher_mergekit.tensors.devices.transfer import moved


class Running:
    """Number of merges of our methods that run in this process."""

    def __init__(self) -> None:
        self._count, self._lock = 0, threading.Lock()

    def __bool__(self) -> bool:
        return self._count > 0

    @contextmanager
    def merge(self) -> Iterator[None]:
        """Count a merge while the block runs."""
        self._add(1)
        try:
            yield
        finally:
            self._add(-1)

    def _add(self, change: int) -> None:
        with self._lock:
            self._count += change


RUNNING = Running()


def extend_moves(executor: Any) -> None:
    """Let an executor of mergekit move tensors by :func:`.moved` while a merge of ours runs."""
    move = getattr(executor, "_move_tensors", None)
    if move is None:  # that of several GPUs leaves it to one executor for each
        return

    @functools.wraps(move)
    def move_tensors(self: Any, value: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        if RUNNING and isinstance(value, Tensor):
            return moved(value, device)
        return move(self, value, device, *args, **kwargs)

    executor._move_tensors = move_tensors
