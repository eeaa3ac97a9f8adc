"""Accumulators in host memory, to which a GPU's tensors are added while the GPU goes on."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

SLOT_BYTES = 1 << 26
SLOTS = 4


class HostSums:
    """Queue of additions to accumulators in host memory.

    A tensor is copied in pieces to a few pinned buffers, on a stream of its own; a thread adds each piece to the
    accumulator once it has arrived. If all buffers are in use, :meth:`add` waits for one.

    Args:
        device: Device of the tensors.
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
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._free: queue.Queue[Tensor] = queue.Queue()
        for _ in range(slots):
            self._free.put(torch.empty(slot_bytes, dtype=torch.uint8, pin_memory=cuda))
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
        if self._stream is None:
            buffer.copy_(piece)
            return lambda: None
        self._stream.wait_stream(torch.cuda.current_stream(piece.device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(piece, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)
        piece.record_stream(self._stream)
        return arrived.synchronize

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
