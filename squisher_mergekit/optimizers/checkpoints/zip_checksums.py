"""Checksums of the zip archives that ``torch.save`` writes; ``torch.load`` itself verifies none of them."""

import struct
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError

_MOST_PICKLE = 1 << 29  # bytes; tensors are stored outside the pickle
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

    def check(self, tensor: Tensor, path: Path) -> None:
        """Verify the checksum of a tensor's storage.

        Raises:
            CorruptFileError: Size or checksum differ.
        """
        if tensor.untyped_storage().nbytes() != self.size:
            raise CorruptFileError(
                f"{self.name} in {path} must have {self.size} bytes, but the pickle claims "
                f"{tensor.untyped_storage().nbytes()}; copy it again"
            )
        self.check_bytes(_bytes(tensor), path)

    def check_bytes(self, data: Any, path: Path) -> None:
        """Verify the checksum of bytes in memory.

        Raises:
            CorruptFileError: The checksum differs.
        """
        if zlib.crc32(data) != self.crc:
            raise CorruptFileError(
                f"the bytes of {self.name} in {path} do not have the checksum that was saved with them: they were "
                "damaged since; copy the file again (--no-verify reads them as they are)"
            )


def _bytes(tensor: Tensor) -> Any:
    """Return all bytes of a tensor's storage, without a copy."""
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return storage.numpy()


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


class Checksums:
    """Registry of mapped archives: it knows which record's bytes a tensor uses, and verifies them.

    Args:
        wanted: False to register and verify nothing.

    Example:
        >>> Checksums(wanted=True).verify(torch.ones(3))  # of no archive, so there is no checksum
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._files: dict[Path, int] = {}
        self._starts: list[int] = []
        self._records: list[tuple[ArchiveRecord, Path]] = []
        self._verified: set[int] = set()

    def add(self, path: Path, records: Mapping[str, ArchiveRecord], loaded: Any) -> None:
        """Register an archive.

        Args:
            path: The archive.
            records: Name -> record, from its directory.
            loaded: The object that ``torch.load`` made from the archive, memory-mapped.

        Raises:
            CorruptFileError: A tensor's storage is not exactly one record, so the sizes in the pickle are false.
        """
        self._files[path] = path.stat().st_size
        if not self._wanted:
            return
        sizes = {s.data_ptr(): s.nbytes() for s in map(Tensor.untyped_storage, tensors_in(loaded)) if s.nbytes()}
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
        pairs = [*zip(self._starts, self._records, strict=True)]
        pairs += [(pointer, (record, path)) for pointer, record in found.items() if record is not None]
        pairs.sort(key=lambda pair: pair[0])
        self._starts, self._records = [start for start, _ in pairs], [record for _, record in pairs]

    def verify(self, tensor: Tensor) -> None:
        """Verify the checksum of a tensor's storage, the first time that this storage is read.

        Raises:
            CorruptFileError: The checksum differs, or a file has become shorter.
        """
        for path, size in self._files.items():
            # Touching a mapped page behind the end of a file would stop the process.
            if not path.is_file() or path.stat().st_size < size:
                raise CorruptFileError(f"{path} must stay as it is while it is read, but it became shorter; copy it")
        if not tensor.numel():
            return
        start = tensor.untyped_storage().data_ptr()
        number = bisect_right(self._starts, start) - 1
        if number < 0 or self._starts[number] != start or start in self._verified:
            return
        record, path = self._records[number]
        record.check(tensor, path)
        self._verified.add(start)


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
