"""A second stream of a GPU, whose work overlaps with that of the current stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch


class SecondStream:
    """Stream for work that runs beside other work of the same thread.

    Args:
        device: A GPU; on a CPU, which has no streams, all work runs in order.

    Example:
        >>> x = torch.zeros(2)
        >>> with SecondStream(torch.device("cpu")).beside(lambda: x.add_(1)):
        ...     total = x.sum()
        >>> total
        tensor(2.)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # If the host waits for this stream, the other work must not keep it from the GPU. Streams of another priority
        # are also never one of the streams that torch hands out in turns.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def beside(self, launch: Callable[[], object]) -> Iterator[None]:
        """Launch work on the current stream, and run the body on the second stream meanwhile.

        The body sees the work that the current stream had before, and does not wait for the launched work. The current
        stream goes on after both, also if the body raises. For this reason memory that one stream allocated and the
        other one uses may be freed after the body without ``record_stream``.

        Args:
            launch: Launches work that writes nothing that the body reads or writes. On a CPU it is complete when the
                body begins.

        Yields:
            Nothing.
        """
        if self._stream is None:
            launch()
            yield
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        launch()
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def reserve(self, share: float) -> None:
        """Allocate memory of the GPU once, which later bodies then take without a call of the driver.

        Each stream has its own free memory in torch, which gives it back to the driver if another stream runs out.

        Args:
            share: Share of the GPU's memory. Nothing is reserved if less is free.
        """
        if self._stream is None:
            return
        total = torch.cuda.get_device_properties(self._device).total_memory
        with contextlib.suppress(torch.OutOfMemoryError), torch.cuda.stream(self._stream):
            torch.empty(int(share * total), dtype=torch.uint8, device=self._device)
