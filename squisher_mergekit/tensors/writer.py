"""Writing safetensors tensor by tensor: nothing of a file is in memory but the block being written."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}
_ALIGN = 8
_BLOCK = 1 << 22  # entries converted at a time
# What an entry of the header takes beside its name: dtype, shape and offsets, with room for numbers of 20 digits.
_ENTRY = 256


class SafetensorsWriter:
    """A safetensors file that tensors are appended to; its header is filled in at the end.

    Room for the header is left at the beginning, and what is not needed of it is filled with blanks, as the format
    allows. A tensor is written in a thread of its own while the next one is made, so it must not change any more.

    Args:
        file: To be made.
        room: Bytes for the header, see :func:`header_room`.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with SafetensorsWriter(Path(folder) / "x.safetensors", header_room(["w"])) as writer:
        ...         writer.add("w", torch.tensor([1.0, 4.0]))
        ...     load_file(Path(folder) / "x.safetensors")
        {'w': tensor([1., 4.])}
    """

    def __init__(self, file: Path, room: int) -> None:
        self.sizes: dict[str, int] = {}
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._room = room
        self._end = 0
        self._stream = file.open("wb", buffering=0)
        self._stream.seek(8 + room)
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait()
                self._finish()
        finally:
            self._pool.shutdown()
            self._stream.close()

    @property
    def nbytes(self) -> int:
        """How many bytes of tensors were added."""
        return self._end

    def add(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        """Append a tensor.

        Args:
            name: Its name, new in this file.
            tensor: On any device, of any strides.
            dtype: To convert it to, block by block.
        """
        if name in self.sizes:
            raise ValueError(f"{name} is in the file already")
        dtype = dtype or tensor.dtype
        start = self._end
        self.sizes[name] = tensor.numel() * dtype.itemsize
        self._end += self.sizes[name]
        self._wait()
        self._writing = self._pool.submit(self._write, tensor, dtype)
        self._header[name] = {"dtype": _NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, self._end]}

    def note(self, key: str, value: str) -> None:
        """Write something into the metadata of the file's header."""
        self._header["__metadata__"][key] = value

    def _wait(self) -> None:
        """Wait for the tensor before, so that at most two are in memory."""
        if self._writing is not None:
            self._writing.result()

    def _write(self, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        for block in _blocks(tensor, dtype):
            data = memoryview(block.view(torch.uint8).numpy().data)
            while data:
                data = data[self._stream.write(data) :]

    def _finish(self) -> None:
        text = json.dumps(self._header, separators=(",", ":")).encode()
        if len(text) > self._room:
            raise ValueError(f"the header needs {len(text)} bytes, but {self._room} were left for it")
        self._stream.seek(0)
        self._stream.write(struct.pack("<Q", self._room) + text.ljust(self._room))
        self._stream.truncate(8 + self._room + self._end)


def header_room(names: list[str], parts: int = 1) -> int:
    """Return enough bytes for the header of a file with tensors of these names, each in at most so many parts."""
    longest = sum(parts * (len(json.dumps(name)) + _ENTRY) for name in names)
    return -(-(longest + _ENTRY) // _ALIGN) * _ALIGN


def _blocks(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield the entries in order, as contiguous blocks on the CPU."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _BLOCK):
        yield flat[start : start + _BLOCK].to("cpu", dtype).contiguous()
