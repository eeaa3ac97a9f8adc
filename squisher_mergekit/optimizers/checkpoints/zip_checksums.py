"""Checksums of the zip archives that ``torch.save`` writes; ``torch.load`` itself verifies none of them."""

import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError
from squisher_mergekit.tensors.input_files import FileState, file_state, read_into

_MOST_PICKLE = 1 << 29  # bytes; tensors are stored outside the pickle
_SMALL = 64  # bytes of a tensor that is copied into memory at once, such as a step
_BLOCK = 1 << 24  # bytes of a record verified at a time
_KEPT = 1 << 28  # bytes of the largest record that is kept in memory for the next of its parts
_LOCAL = struct.Struct("<4s22xHH")  # a local header: signature, ..., lengths of the name and of the extra field


@dataclass(frozen=True)
class ArchiveRecord:
    """File inside a zip archive.

    Attributes:
        name: Name in the archive.
        offset: Offset of the first byte.
        size: Number of bytes.
        crc: CRC-32 of the bytes.
    """

    name: str
    offset: int
    size: int
    crc: int

    def check_bytes(self, data: Any, path: Path) -> None:
        """Verify the checksum of bytes in memory.

        Raises:
            CorruptFileError: The checksum differs.
        """
        self.check_crc(zlib.crc32(data), path)

    def check_crc(self, found: int, path: Path) -> None:
        """Compare a checksum with that of the archive.

        Raises:
            CorruptFileError: The checksum differs.
        """
        if found != self.crc:
            raise CorruptFileError(
                f"the bytes of {self.name} in {path} do not have the checksum that was saved with them: they were "
                "damaged since; copy the file again (squisher extract --no-verify reads them as they are)"
            )


def check_archive(stream: BinaryIO) -> dict[str, ArchiveRecord]:
    """Read the directory of an archive, and verify the checksum of its pickle.

    Args:
        stream: The open file.

    Returns:
        Name -> record.

    Raises:
        CorruptFileError: A record is compressed, the pickle is damaged, or the directory does not fit the file.
    """
    records = {}
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise CorruptFileError(f"{info.filename} must be stored as it is, as torch.save does, not compressed")
            stream.seek(info.header_offset)
            signature, name, extra = _LOCAL.unpack(stream.read(_LOCAL.size))
            if signature != b"PK\x03\x04":
                raise CorruptFileError(f"{info.filename} is not where the directory of the archive says")
            offset = info.header_offset + _LOCAL.size + name + extra
            records[info.filename] = ArchiveRecord(info.filename, offset, info.file_size, info.CRC)
        for name, record in records.items():
            if name.endswith("data.pkl"):
                if record.size > _MOST_PICKLE:
                    raise CorruptFileError(f"{name} must have at most {_MOST_PICKLE} bytes, found {record.size}")
                archive.read(name)  # verifies the checksum
    return records


@dataclass(frozen=True)
class _MappedFile:
    """Archive whose tensors are mapped.

    Attributes:
        path: The archive.
        state: Its inode, size and time of change when it was mapped.
    """

    path: Path
    state: FileState

    def read(self, offset: int, length: int) -> Tensor:
        """Return bytes of the archive, copied into memory.

        Raises:
            CorruptFileError: The archive has changed since it was mapped.
        """
        data = torch.empty(length, dtype=torch.uint8, device="cpu")
        read_into(data.numpy().data, self.path, offset, self.state, "a whole file that nobody changes")
        return data


class Checksums:
    """Registry of mapped archives: it finds the record behind a tensor, verifies it, and copies it into memory.

    No entry of a mapped tensor is read through the mapping: a page behind the end of a file that was truncated
    meanwhile would stop the process by a bus error.

    Args:
        wanted: False to verify nothing.

    Example:
        >>> Checksums(wanted=True).verify(torch.ones(3))  # of no archive, so there is no checksum
        tensor([1., 1., 1.])
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._records: dict[int, tuple[ArchiveRecord, _MappedFile]] = {}  # by the address of the mapped storage
        self._mappings: list[torch.UntypedStorage] = []
        self._verified: set[int] = set()
        self._kept: tuple[int, Tensor] | None = None

    def add(self, path: Path, records: Mapping[str, ArchiveRecord], loaded: Any) -> None:
        """Register an archive, and copy its small tensors, such as steps, into memory.

        Args:
            path: The archive.
            records: Name -> record, from its directory.
            loaded: The object that ``torch.load`` made from the archive, memory-mapped; changed in place.

        Raises:
            CorruptFileError: A tensor's storage is not exactly one record, so the sizes in the pickle are false.
        """
        tensors = list(tensors_in(loaded))
        sizes = {s.data_ptr(): s.nbytes() for s in map(Tensor.untyped_storage, tensors) if s.nbytes()}
        data = {record.offset: record for name, record in records.items() if "/data/" in name and record.size}
        if not sizes:
            return
        lowest = min(sizes)
        for first in data:
            base = lowest - first
            found = {pointer: data.get(pointer - base) for pointer in sizes}
            if all(record is not None and record.size == sizes[pointer] for pointer, record in found.items()):
                break
        else:
            raise CorruptFileError(
                f"the tensors in {path} must each be one record of its archive, but their sizes differ; copy it again"
            )
        file = _MappedFile(path, file_state(path))
        self._records |= {pointer: (record, file) for pointer, record in found.items() if record is not None}
        # A mapping that is freed can leave its addresses to the next one, which would then have the wrong records.
        large = next((t.untyped_storage() for t in tensors if t.untyped_storage().nbytes() > _SMALL), None)
        for tensor in tensors:
            if tensor.untyped_storage().nbytes() <= _SMALL:
                tensor.data = self.verify(tensor).data
        if large is not None:
            self._mappings.append(large)
        else:
            self._forget(sizes)

    def _forget(self, addresses: Collection[int]) -> None:
        for address in addresses:
            self._records.pop(address, None)
        self._verified.difference_update(addresses)
        self._kept = None

    def verify(self, tensor: Tensor) -> Tensor:
        """Return a mapped tensor in memory; verify the checksum of its storage, the first time that it is read.

        Args:
            tensor: A tensor of an archive, or a view of one; any other is returned unchanged.

        Raises:
            CorruptFileError: The checksum differs, or a file has changed.
        """
        if not tensor.numel():
            return tensor
        start = tensor.untyped_storage().data_ptr()
        if start not in self._records:
            return tensor
        record, file = self._records[start]
        first = int(tensor.storage_offset()) * tensor.itemsize
        spans = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        length = int(1 + sum(spans)) * tensor.itemsize
        data = self._bytes(start, record, file, first, length)
        return torch.as_strided(data.view(tensor.dtype), tensor.shape, tensor.stride())

    def _bytes(self, start: int, record: ArchiveRecord, file: _MappedFile, first: int, length: int) -> Tensor:
        """Return bytes of a record, verified the first time.

        Parts of a fused tensor are read one after another, so a record that was read whole for the first of them is
        kept for the next ones.
        """
        kept = self._kept
        if kept is not None and kept[0] == start:
            return kept[1][first : first + length]
        if not self._wanted or start in self._verified:
            return file.read(record.offset + first, length)
        if record.size > _KEPT and length < record.size:
            crc = 0
            for block in range(0, record.size, _BLOCK):
                crc = zlib.crc32(file.read(record.offset + block, min(_BLOCK, record.size - block)).numpy().data, crc)
            record.check_crc(crc, file.path)
            self._verified.add(start)
            return file.read(record.offset + first, length)
        data = file.read(record.offset, record.size)
        record.check_bytes(data.numpy().data, file.path)
        self._verified.add(start)
        self._kept = None if length == record.size else (start, data)
        return data[first : first + length]


def tensors_in(loaded: Any) -> Iterator[Tensor]:
    """Yield all plain tensors in nested containers, in stand-ins and in tensor subclasses made of other tensors."""
    todo, seen = [loaded], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if type(item) is Tensor or type(item) is torch.nn.Parameter:
            yield item
        elif isinstance(item, Mapping):
            todo += item.values()
        elif isinstance(item, list | tuple | set):
            todo += item
        elif hasattr(item, "__dict__"):
            todo += [*vars(item).values(), getattr(item, "_local_tensor", None)]
