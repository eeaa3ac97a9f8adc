"""The checksums of a zip archive that ``torch.save`` wrote; ``torch.load`` itself looks at none of them."""

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

_LOCAL = struct.Struct("<4s22xHH")  # a local header: signature, ..., lengths of the name and of the extra field


@dataclass(frozen=True)
class Record:
    """One file in an archive: where its bytes begin, how many there are, and their CRC-32."""

    name: str
    offset: int
    size: int
    crc: int

    def check(self, tensor: Tensor, path: Path) -> None:
        """Hold the storage of a tensor against the checksum.

        Raises:
            CorruptFileError: They differ.
        """
        if tensor.untyped_storage().nbytes() != self.size:
            raise CorruptFileError(
                f"{self.name} in {path} must have {self.size} bytes, but the pickle claims "
                f"{tensor.untyped_storage().nbytes()}; copy it again"
            )
        self.check_bytes(_bytes(tensor), path)

    def check_bytes(self, data: Any, path: Path) -> None:
        """Hold bytes in memory against the checksum.

        Raises:
            CorruptFileError: They differ.
        """
        if zlib.crc32(data) != self.crc:
            raise CorruptFileError(
                f"the bytes of {self.name} in {path} do not have the checksum that was saved with them: they were "
                "damaged since; copy the file again (--no-verify reads them as they are)"
            )


def _bytes(tensor: Tensor) -> Any:
    """Return all bytes of a tensor's storage, without a copy."""
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return whole.numpy()


def check_archive(stream: BinaryIO) -> dict[str, Record]:
    """Read an archive's directory, and check the pickle in it.

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
            records[info.filename] = Record(info.filename, offset, info.file_size, info.CRC)
        for name in records:
            if name.endswith("data.pkl"):
                archive.read(name)  # fails where the checksum does
    return records


class Checksums:
    """Which bytes in memory are which record of which mapped archive.

    Args:
        wanted: Otherwise nothing is noted, and nothing verified.

    Example:
        >>> Checksums(wanted=True).verify(torch.ones(3))  # of no archive: nothing to hold it against
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._starts: list[int] = []
        self._records: list[tuple[Record, Path]] = []
        self._verified: set[int] = set()

    def add(self, path: Path, records: Mapping[str, Record], loaded: Any) -> None:
        """Note an archive.

        Args:
            path: Of the archive.
            records: Its directory.
            loaded: What ``torch.load`` made of it, mapped.

        Raises:
            CorruptFileError: A tensor is not exactly one record: the pickle lies about sizes.
        """
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
        """Hold the bytes that a tensor lies in against their checksum, the first time they are asked for.

        Raises:
            CorruptFileError: They differ.
        """
        if not tensor.numel():
            return
        start = tensor.untyped_storage().data_ptr()
        place = bisect_right(self._starts, start) - 1
        if place < 0 or self._starts[place] != start or start in self._verified:
            return
        record, path = self._records[place]
        record.check(tensor, path)
        self._verified.add(start)


def tensors_in(loaded: Any) -> Iterator[Tensor]:
    """Yield all plain tensors in nested containers, in stand-ins and in tensors made of others."""
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
