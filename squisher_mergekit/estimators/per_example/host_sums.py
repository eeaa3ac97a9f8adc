"""Accumulators in host memory, to which a GPU's tensors are added while the GPU goes on."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

LOG = logging.getLogger("squisher_mergekit")
SLOT_BYTES = 1 << 26
SLOTS = 4


class HostSums:
    """Queue of additions to accumulators in host memory.

    A tensor is copied in pieces to a few pinned buffers, on a stream of its own on each GPU; a thread adds each piece
    to the accumulator once it has arrived. If all buffers are in use, :meth:`add` waits for one.

    Args:
        device: Device of the tensors, or of some of them if the model is on several GPUs.
        slots: Number of buffers.
        slot_bytes: Size of a buffer, a multiple of 8.

    Example:
        >>> total = torch.zeros(3)
        >>> sums = HostSums(torch.device("cpu"))
        >>> sums.add(total, torch.tensor([1.0, 2.0, 3.0]))
        >>> sums.wait()
        >>> total
        tensor([1., 2., 3.])
    """

    def __init__(self, device: torch.device, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._free: queue.Queue[Tensor] = queue.Queue()
        for buffer in _buffers(slots, slot_bytes, pinned=device.type == "cuda"):
            self._free.put(buffer)
        self._slot_bytes = slot_bytes
        self._adder = ThreadPoolExecutor(1, "host-sums")
        self._pending: list[Future[None]] = []

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add a tensor to an accumulator; it is complete after :meth:`wait`.

        Args:
            total: Contiguous accumulator in host memory.
            part: Tensor of its shape and dtype on the device.
        """
        flat_total, flat_part = total.view(-1), part.reshape(-1)
        entries = self._slot_bytes // total.element_size()
        for start in range(0, total.numel(), entries):
            piece = flat_part[start : start + entries]
            slot = self._free.get()
            buffer = slot.view(total.dtype)[: len(piece)]
            arrive = self._copy(buffer, piece)
            target = flat_total[start : start + entries]
            self._pending.append(self._adder.submit(self._add_piece, target, buffer, slot, arrive))

    def _copy(self, buffer: Tensor, piece: Tensor) -> Callable[[], None]:
        """Start a copy to a buffer, and return the function that waits for it."""
        if piece.device.type != "cuda":
            buffer.copy_(piece)
            return lambda: None
        stream = self._stream_of(piece.device)
        stream.wait_stream(torch.cuda.current_stream(piece.device))
        with torch.cuda.stream(stream):
            buffer.copy_(piece, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(stream)
        piece.record_stream(stream)
        return arrived.synchronize

    def _stream_of(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream of a GPU: a copy runs on a stream of its tensor's own GPU, whichever was entered."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]

    def _add_piece(self, target: Tensor, buffer: Tensor, slot: Tensor, arrive: Callable[[], None]) -> None:
        """Add a buffer to its part of an accumulator, and free the buffer."""
        try:
            arrive()
            target += buffer
        finally:
            self._free.put(slot)

    def wait(self) -> None:
        """Wait until every addition is complete."""
        pending, self._pending = self._pending, []
        for addition in pending:
            addition.result()


def _buffers(count: int, size: int, pinned: bool) -> list[Tensor]:
    """Return buffers in host memory, pinned ones where they can be had."""
    try:
        return [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned) for _ in range(count)]
    except RuntimeError as error:  # a limit on locked memory, say
        if not pinned:
            raise
        reason = " ".join(str(error).split())[:200]
        LOG.warning("sums move to host memory without pinned memory, which is slower: %s", reason)
        return _buffers(count, size, pinned=False)
