"""Streaming writer of safetensors files: only the block being written is in memory."""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch

from squisher_mergekit.tensors.dtypes import dtype_name
from squisher_mergekit.tensors.safetensors import DIGEST, digest_start

_ALIGN = 8
_BLOCK = 1 << 22  # entries converted at a time
_WAITING = 1 << 26  # bytes of tensors that may wait to be written when the next tensor comes
_FLUSH = 1 << 26  # bytes written between two flushes to the disk
# Bytes of a header entry without its name: dtype, shape and offsets, with room for numbers of 20 digits.
_ENTRY = 256


class SafetensorsWriter:
    """Writer that appends tensors to a safetensors file and fills in the header at the end.

    Room for the header is left at the beginning, and padded with blanks, as the format allows. A second thread writes
    tensors while the caller makes the next ones, so a tensor must not change after it was added. A third thread flushes
    written bytes to the disk meanwhile, so that little is left for the sync of the finished file.

    Args:
        file: The file to make.
        room: Bytes for the header, see :func:`header_room`.
        digests: Note a digest of each tensor in the header, by which a reader verifies it.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with SafetensorsWriter(Path(folder) / "x.safetensors", header_room(["w"])) as writer:
        ...         writer.add("w", torch.tensor([1.0, 4.0]))
        ...     load_file(Path(folder) / "x.safetensors")
        {'w': tensor([1., 4.])}
    """

    def __init__(self, file: Path, room: int, digests: bool = False) -> None:
        self.sizes: dict[str, int] = {}
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._room = room
        self._digests = digests
        self._end = 0
        self._stream = file.open("wb", buffering=0)
        self._stream.seek(8 + room)
        self._writer, self._flusher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._waiting: deque[tuple[int, Future[None]]] = deque()  # bytes of each added tensor, and its writing
        self._flushing: Future[None] | None = None
        self._unflushed = 0

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for _, writing in self._waiting:
                    writing.result()
                if self._flushing is not None:
                    self._flushing.result()
                self._finish()
        finally:
            self._writer.shutdown(cancel_futures=True)
            self._flusher.shutdown()
            self._stream.close()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors added so far."""
        return self._end

    def add(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        """Append a tensor.

        Args:
            name: Name of the tensor, new in this file.
            tensor: The tensor, on any device, of any strides.
            dtype: Dtype to convert to, block by block; None keeps the tensor's own.

        Raises:
            UnsupportedStateError: safetensors has no such dtype.
        """
        if name in self.sizes:
            raise ValueError(f"{name} is in the file already")
        dtype = dtype or tensor.dtype
        stored_dtype = dtype_name(dtype)
        start = self._end
        self.sizes[name] = tensor.numel() * dtype.itemsize
        self._end += self.sizes[name]
        self._wait()
        digest = digest_start(name, stored_dtype, tensor.shape) if self._digests else None
        writing = self._writer.submit(self._write, name, tensor, dtype, digest)
        self._waiting.append((tensor.nbytes, writing))
        self._header[name] = {"dtype": stored_dtype, "shape": list(tensor.shape), "data_offsets": [start, self._end]}

    def note(self, key: str, value: str) -> None:
        """Set a key of the metadata in the file's header."""
        self._header["__metadata__"][key] = value

    def _wait(self) -> None:
        """Wait until few bytes are left to write, and raise the error of a write."""
        left = sum(nbytes for nbytes, _ in self._waiting)
        while self._waiting and (left > _WAITING or self._waiting[0][1].done()):
            nbytes, writing = self._waiting.popleft()
            writing.result()
            left -= nbytes

    def _write(self, name: str, tensor: torch.Tensor, dtype: torch.dtype, digest: int | None) -> None:
        for block in _blocks(tensor, dtype):
            data = memoryview(block.view(torch.uint8).numpy().data)
            digest = None if digest is None else zlib.crc32(data, digest)
            self._unflushed += len(data)
            self._put(data)
            self._flush()
        if digest is not None:
            self.note(name + DIGEST, f"{digest:08x}")

    def _put(self, data: memoryview) -> None:
        """Write all bytes: an unbuffered stream may take a part of them at a time, as on a disk that is nearly full."""
        while data:
            data = data[self._stream.write(data) :]

    def _flush(self) -> None:
        """Start a flush if enough bytes are written and the previous flush has ended, and raise its error."""
        if self._unflushed < _FLUSH or not (self._flushing is None or self._flushing.done()):
            return
        if self._flushing is not None:
            self._flushing.result()
        self._flushing = self._flusher.submit(_sync, self._stream.fileno())
        self._unflushed = 0

    def _finish(self) -> None:
        text = json.dumps(self._header, separators=(",", ":")).encode()
        if len(text) > self._room:
            raise ValueError(f"the header needs {len(text)} bytes, but {self._room} were left for it")
        self._stream.seek(0)
        self._put(memoryview(struct.pack("<Q", self._room) + text.ljust(self._room)))
        self._stream.truncate(8 + self._room + self._end)


def _sync(descriptor: int) -> None:
    """Flush the written bytes of an open file to the disk, where its file system can."""
    try:
        getattr(os, "fdatasync", os.fsync)(descriptor)  # macOS and Windows have no fdatasync
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def header_room(names: list[str], parts: int = 1, notes: Mapping[str, str] = MappingProxyType({})) -> int:
    """Return an upper bound on the bytes of a header.

    Args:
        names: Names of the tensors.
        parts: Largest number of tensors that one name is stored as.
        notes: Further keys of the metadata, such as those of a file that is copied.
    """
    longest = sum(parts * (len(json.dumps(name)) + _ENTRY) for name in names) + len(json.dumps(dict(notes)))
    return -(-(longest + _ENTRY) // _ALIGN) * _ALIGN


def _blocks(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield the entries of a tensor in order, as contiguous blocks on the CPU."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _BLOCK):
        yield flat[start : start + _BLOCK].to("cpu", dtype).contiguous()
