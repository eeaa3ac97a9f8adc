"""Tensors in safetensors files: headers, shapes and dtypes, digests, reading of single tensors."""

from __future__ import annotations

import json
import logging
import math
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch

from squisher_mergekit.errors import CorruptFileError, MismatchError, UnsupportedStateError
from squisher_mergekit.tensors.dtypes import DTYPES, dtype_refusal
from squisher_mergekit.tensors.input_files import (
    FileState,
    file_state,
    is_name,
    open_input,
    read_into,
    read_mapping,
    reading,
)
from squisher_mergekit.tensors.read_ahead import FileRange

DIGEST = ".crc32"  # ending of the note in a header with the digest of a tensor
_LONGEST = 100_000_000  # bytes of a header, as the format allows

LOG = logging.getLogger("squisher_mergekit")


@dataclass(frozen=True)
class TensorInfo:
    """Header of a tensor, known without reading it.

    Attributes:
        shape: Shape of the tensor.
        stored_dtype: Its dtype; None for a dtype that torch lacks.
        nbytes: Its bytes on disk.
        refusal: Message for a tensor whose dtype torch lacks.
    """

    shape: tuple[int, ...]
    stored_dtype: torch.dtype | None
    nbytes: int
    refusal: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype as stored.

        Raises:
            UnsupportedStateError: torch lacks the dtype.
        """
        if self.stored_dtype is None:
            raise UnsupportedStateError(self.refusal)
        return self.stored_dtype

    @property
    def is_floating_point(self) -> bool:
        """True for floats; the dtypes that torch lacks are floats of few bits."""
        return self.stored_dtype is None or self.stored_dtype.is_floating_point


class TensorStore(Protocol):
    """Source of named tensors: headers are known at once, tensors are read one at a time."""

    @property
    def location(self) -> str:
        """File, folder or other source, for messages."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name -> header, in the order of the file."""

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor; it must not be written to."""


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...], location: str) -> None:
    """Refuse a Fisher tensor that is not shaped like its parameter.

    Raises:
        MismatchError: The shapes differ.
    """
    if tuple(found) != tuple(wanted):
        raise MismatchError(
            f"the Fisher of {name} must have the weight's shape {list(wanted)}, but {location} has {list(found)}; "
            "take the Fisher that was made with these weights"
        )


def resized_rows(shapes: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[int, int] | None:
    """Return the numbers of rows before and after embeddings were resized; None if shapes differ otherwise.

    Args:
        shapes: Shape before and after of each tensor.

    Example:
        >>> resized_rows([((128, 32), (136, 32)), ((32,), (32,))]), resized_rows([((3, 5), (5, 3))])
        ((128, 136), None)
    """
    differing = [(before, after) for before, after in shapes if tuple(before) != tuple(after)]
    if any(not before or not after or before[1:] != after[1:] for before, after in differing):
        return None
    rows = {(before[0], after[0]) for before, after in differing}
    return rows.pop() if len(rows) == 1 else None


@dataclass(frozen=True)
class SafetensorsHeader:
    """Header of a safetensors file.

    Attributes:
        file: The file.
        entries: Name of a tensor -> its entry: ``dtype``, ``shape`` and ``data_offsets``.
        metadata: Free text by key.
        start: Offset of the first tensor's bytes in the file.
        state: Inode, size and time of change of the file.
    """

    file: Path
    entries: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    start: int
    state: FileState

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Name -> header of the tensor, in the order of the file."""
        infos = {}
        for name, entry in self.entries.items():
            begin, end = entry["data_offsets"]
            dtype = DTYPES.get(entry["dtype"])
            refusal = "" if dtype is not None else dtype_refusal(entry["dtype"], name, self.file)
            infos[name] = TensorInfo(tuple(entry["shape"]), dtype, end - begin, refusal)
        return infos

    @cached_property
    def digests(self) -> dict[str, str]:
        """Name -> digest that the writer noted, see :func:`digest_start`; empty if it noted none."""
        return {name: self.metadata[name + DIGEST] for name in self.entries if name + DIGEST in self.metadata}


class MemoryStore:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], location: str = "memory") -> None:
        self._tensors = dict(tensors)
        self.location = location
        self.infos = {name: info_of(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        return self._tensors[name]


class SafetensorsStore:
    """Tensors in one or several safetensors files, read one at a time.

    A tensor is copied into memory, not mapped: a file that is truncated later cannot stop the process by a bus error.

    Args:
        files: The files.
        location: Source of the tensors, for messages.
        headers: Headers of the files, where they have been read already.
        verify: Verify the digest of each tensor that has one, the first time that it is read.
    """

    def __init__(
        self,
        files: Iterable[Path],
        location: str,
        headers: Mapping[Path, SafetensorsHeader] | None = None,
        verify: bool = True,
    ) -> None:
        self.location = location
        self.infos: dict[str, TensorInfo] = {}
        self._header_of: dict[str, SafetensorsHeader] = {}
        self._unverified: set[str] = set()
        for file in files:
            header = read_header(file) if headers is None else headers[file]
            self.infos.update(header.infos)
            self._header_of.update(dict.fromkeys(header.infos, header))
            if verify:
                self._unverified.update(header.digests)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in memory of its own.

        Raises:
            UnsupportedStateError: torch lacks the dtype.
            CorruptFileError: The file has changed since its header was read, or the bytes do not have their digest.
        """
        dtype, header = self.infos[name].dtype, self._header_of[name]
        data = _read_bytes(header, name)
        if name in self._unverified:
            _check_digest(header, name, data)
            self._unverified.discard(name)
        return data.view(dtype).reshape(self.infos[name].shape)

    def file_ranges(self, name: str) -> list[FileRange]:
        """Return the part of a file with the bytes of a tensor."""
        header = self._header_of[name]
        begin, end = header.entries[name]["data_offsets"]
        return [FileRange(header.file, header.start + begin, end - begin)]


def file_ranges(store: TensorStore, name: str) -> list[FileRange]:
    """Return the parts of files with the bytes of a tensor; none for a store that does not tell."""
    ranges = getattr(store, "file_ranges", None)
    return [] if ranges is None or name not in store.infos else list(ranges(name))


def _read_bytes(header: SafetensorsHeader, name: str) -> torch.Tensor:
    """Return the bytes of a tensor."""
    begin, end = header.entries[name]["data_offsets"]
    data = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
    required = f"a whole safetensors file that nobody changes while {name} is read"
    read_into(data.numpy().data, header.file, header.start + begin, header.state, required)
    return data


def digest_start(name: str, dtype: str, shape: Iterable[int]) -> int:
    """Return the CRC-32 of a tensor's name, dtype and shape, which the CRC-32 of its bytes continues.

    The digest therefore reveals tensors of equal shape that were exchanged, and changed headers.

    Args:
        name: Name in the file.
        dtype: Name of the dtype in the file.
        shape: Shape of the tensor.

    Example:
        >>> f"{zlib.crc32(bytes(8), digest_start('w', 'F32', [2])):08x}"
        'd4d584e9'
    """
    return zlib.crc32(f"{name}\0{dtype}\0{list(shape)}\0".encode())


def _check_digest(header: SafetensorsHeader, name: str, data: torch.Tensor) -> None:
    entry = header.entries[name]
    found = f"{zlib.crc32(data.numpy().data, digest_start(name, entry['dtype'], entry['shape'])):08x}"
    if found != header.digests[name]:
        raise CorruptFileError(
            f"the bytes of {name} in {header.file} must have the digest {header.digests[name]:.8} that was noted with "
            f"them, found {found}: they were damaged or exchanged since; copy the file again (squisher extract "
            "FISHER --no-verify -o OUT accepts them, and notes new digests)"
        )


def info_of(tensor: torch.Tensor) -> TensorInfo:
    """Return the header that a tensor in memory would have."""
    return TensorInfo(tuple(tensor.shape), tensor.dtype, tensor.numel() * tensor.element_size())


def read_header(file: Path) -> SafetensorsHeader:
    """Parse the header of a safetensors file.

    Raises:
        CorruptFileError: The file is truncated or no safetensors file.
    """
    with reading(file, "a whole safetensors file"), open_input(file) as stream:
        state = file_state(stream)
        size = state[1]
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(size - 8, _LONGEST):
            raise ValueError(f"its header claims {length} of {size} bytes")
        entries: Any = json.loads(stream.read(length))
        if not isinstance(entries, dict):
            raise ValueError("its header is no mapping")
        metadata = entries.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("the metadata in its header must map names to texts")
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: _offsets(*item)):
            begin, next_begin = _offsets(name, entry)
            if begin != end:
                raise ValueError(f"{name} cannot be read: its bytes do not begin where those of another tensor end")
            end = next_begin
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes where its header promises {8 + length + end}")
    return SafetensorsHeader(file, entries, metadata, 8 + length, state)


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    """Return the offsets of a tensor's first byte and of the byte after its last, from a checked entry of a header.

    Raises:
        ValueError: A value in the entry has the wrong type or contradicts another.
    """
    if not is_name(name) or not isinstance(entry, dict):
        raise ValueError(f"the header has no valid entry for {name!r:.80}")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            raise ValueError(f"the header of {name} lacks {key}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not is_name(dtype):
        raise ValueError(f"the dtype of {name} is {dtype!r:.50}")
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers):
            raise ValueError(f"the {key} of {name} must be a list of sizes, found {numbers!r:.50}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"the data_offsets of {name} must be two that ascend, found {offsets!r:.50}")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
        raise ValueError(
            f"{name} cannot be read: {dtype} of shape {shape!r:.50} has {math.prod(shape) * DTYPES[dtype].itemsize} "
            f"bytes, found {offsets[1] - offsets[0]}"
        )
    return offsets[0], offsets[1]


def safetensors_notes(file: Path) -> Mapping[str, str]:
    """Return the metadata in the header of a safetensors file.

    Raises:
        CorruptFileError: The file is truncated or no safetensors file.
    """
    return read_header(file).metadata


def tensor_infos(file: Path) -> dict[str, TensorInfo]:
    """Return name -> shape, dtype and bytes of a safetensors file, from its header alone.

    Raises:
        CorruptFileError: The file is truncated or no safetensors file.
    """
    return read_header(file).infos


def safetensors_files(folder: Path, basename: str) -> list[Path]:
    """Return the files of ``basename.safetensors`` or of its shards; empty if there is neither.

    A single file comes before an index, as in transformers; a warning says so where the index names other files.

    Raises:
        CorruptFileError: The index cannot be read, or names a file that is missing or outside the folder.
    """
    index = folder / f"{basename}.safetensors.index.json"
    single = folder / f"{basename}.safetensors"
    if single.is_file():
        if index.is_file():
            _warn_of_index(single, index)
        return [single]
    if not index.is_file():
        return []
    names = _indexed(index)
    for name in names:
        if not (folder / name).is_file():
            raise CorruptFileError(f"{index} names {name}, which is not a file beside it; copy the missing shard")
    return [folder / name for name in names]


def _indexed(index: Path) -> list[str]:
    """Return the files that an index names."""
    weight_map = read_mapping(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{index} must be an index with a weight_map, found {weight_map!r:.50}; copy it again")
    for name in weight_map.values():
        if not is_name(name) or Path(name).name != name:
            raise CorruptFileError(f"{index} names {name!r:.50}, which is not a file beside it; copy the index again")
    return sorted(set(weight_map.values()))


@lru_cache(maxsize=256)
def _warn_of_index(single: Path, index: Path) -> None:
    """Warn, once per folder, of an index that names other files than the single one."""
    try:
        stale = _indexed(index) != [single.name]
    except CorruptFileError:
        stale = True
    if stale:
        LOG.warning(
            "%s holds both %s and %s, of different tensors; the single file is read, as transformers does. Remove the "
            "file that is out of date",
            single.parent,
            single.name,
            index.name,
        )
