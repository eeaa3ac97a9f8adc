"""Moves of large tensors between host memory and a GPU, through pinned buffers that several threads fill.

A plain copy from pageable memory, such as a mapped file, reaches a fraction of the bus: one thread takes the page
faults, and the driver copies through a small buffer of its own. Here each thread has two pinned buffers in turns, so
that page faults, copies on the host and transfers overlap.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

LOG = logging.getLogger("squisher_mergekit")
LEAST = 32 << 20  # bytes; smaller tensors take torch's own way
PIECE = 8 << 20
THREADS = 4


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the same tensor if it is there.

    The host need not wait for a copy to a GPU, whose current stream does. A copy to the host is complete.

    Args:
        tensor: The tensor. It must not change while its copy to a GPU runs.
        device: The device.

    Example:
        >>> moved(torch.ones(2), torch.device("cpu"))
        tensor([1., 1.])
    """
    gpu = device if device.type == "cuda" else tensor.device
    if gpu.type != "cuda" or device.type == tensor.device.type or tensor.nbytes < LEAST or not tensor.is_contiguous():
        return tensor.to(device, non_blocking=device.type in ("cuda", "xpu"))
    lanes = lanes_of(torch.device("cuda", torch.cuda.current_device()) if gpu.index is None else gpu)
    if lanes is None:
        return tensor.to(device)
    return lanes.download(tensor) if device.type == "cpu" else lanes.upload(tensor)


@cache
def lanes_of(device: torch.device) -> Lanes | None:
    """Return the threads and buffers of a device, which are made at the first call; None where none can be had."""
    try:
        return Lanes(device)
    except RuntimeError as error:  # a limit on locked memory, say
        reason = " ".join(str(error).split())[:200]
        LOG.warning("tensors move to %s without pinned memory, which is slower: %s", device, reason)
        return None


_Pairs = Sequence[tuple[Tensor, Tensor]]


class Lanes:
    """Threads with pinned buffers that move the pieces of one tensor at a time.

    Args:
        device: A GPU; with a CPU the pieces are copied without pinned memory.
        threads: Number of threads.
        piece: Bytes of a buffer.
    """

    def __init__(self, device: torch.device, threads: int = THREADS, piece: int = PIECE) -> None:
        self._device, self._piece = device, piece
        self._lanes = [_Lane(device, piece) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="transfer")
        self._lock = threading.Lock()

    def upload(self, source: Tensor) -> Tensor:
        """Return a copy of a contiguous host tensor on the device, for use on its current stream."""
        target = torch.empty_like(source, device=self._device)
        self._move(source, target, _Lane.upload)
        for lane in self._lanes:
            lane.join()
        return target

    def download(self, source: Tensor) -> Tensor:
        """Return a copy of a contiguous tensor of the device in host memory, complete at the return."""
        target = torch.empty_like(source, device="cpu")
        self._move(source, target, _Lane.download)
        return target

    def _move(self, source: Tensor, target: Tensor, move: Callable[[_Lane, _Pairs], None]) -> None:
        """Let each lane move every so many pieces, after the work that the current stream has so far."""
        flat, out = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in (source, target))
        starts = range(0, flat.numel(), self._piece)
        pairs = [(flat[start : start + self._piece], out[start : start + self._piece]) for start in starts]
        count = len(self._lanes)
        with self._lock:
            for lane in self._lanes:
                lane.fork()
            list(self._pool.map(lambda i: move(self._lanes[i], pairs[i::count]), range(count)))


class _Lane:
    """Two pinned buffers of one thread, and the stream that copies to and from them."""

    def __init__(self, device: torch.device, piece: int) -> None:
        self._device, on_gpu = device, device.type == "cuda"
        self._buffers = [torch.empty(piece, dtype=torch.uint8, device="cpu", pin_memory=on_gpu) for _ in range(2)]
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._copied = [torch.cuda.Event() for _ in range(2)] if on_gpu else []  # type: ignore[no-untyped-call]

    def fork(self) -> None:
        """Let the stream wait for the work of the current one."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def join(self) -> None:
        """Let the current stream wait for this one."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def upload(self, pairs: _Pairs) -> None:
        """Copy pieces of host memory to pieces of the device."""
        for number, (source, target) in enumerate(pairs):
            buffer = self._buffer(number, source)
            buffer.copy_(source)
            self._copy(number, buffer, target)

    def download(self, pairs: _Pairs) -> None:
        """Copy pieces of the device to pieces of host memory; the next one is under way meanwhile."""
        for number in range(len(pairs) + 1):
            if number < len(pairs):
                source = pairs[number][0]
                self._copy(number, source, self._buffer(number, source))
            if number:
                target = pairs[number - 1][1]
                target.copy_(self._buffer(number - 1, target))

    def _buffer(self, number: int, piece: Tensor) -> Tensor:
        """Return the buffer of a piece, as soon as the copy before has left or filled it."""
        if self._copied:
            self._copied[number % 2].synchronize()
        return self._buffers[number % 2][: piece.numel()]

    def _copy(self, number: int, source: Tensor, target: Tensor) -> None:
        """Start a copy between a buffer and the device."""
        if self._stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            self._copied[number % 2].record(self._stream)
