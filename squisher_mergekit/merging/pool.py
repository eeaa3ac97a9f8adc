"""A pool whose workers run torch with one thread each."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from squisher_mergekit.tensors.freed_memory import keep_blocks


class Pool:
    """Workers of one torch thread each, made again when torch's thread count changes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._size = 0

    def get(self, size: int) -> ThreadPoolExecutor:
        """Return the pool of ``size`` workers."""
        with self._lock:
            if self._executor is None or self._size != size:
                if self._executor is not None:
                    self._executor.shutdown(wait=False)
                started = threading.Barrier(size + 1)
                self._executor = ThreadPoolExecutor(size, thread_name_prefix="squisher")

                def single() -> None:
                    # A thread gets torch's default when it first reads the count, even over an earlier setting.
                    torch.get_num_threads()
                    torch.set_num_threads(1)
                    started.wait()

                for _ in range(size):
                    self._executor.submit(single)
                started.wait()
                # The number set in a worker becomes torch's default for threads to come.
                torch.set_num_threads(size)
                self._size = size
            return self._executor


POOL = Pool()


def map_parts(function: Callable[[Any], Any], parts: Iterable[Any], size: int) -> list[Any]:
    """Run a function on parts of the work on a tensor of ``size`` entries, over the pool where that pays."""

    def without_grad(part: Any) -> Any:
        with torch.no_grad():
            return function(part)

    keep_blocks()
    threads = torch.get_num_threads()
    if threads == 1 or size < 1 << 15:
        return [without_grad(part) for part in parts]
    return list(POOL.get(threads).map(without_grad, parts))
