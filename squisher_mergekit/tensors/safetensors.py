"""Tensors in safetensors files: headers, shapes and dtypes, memory-mapped reading."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch

from squisher_mergekit.errors import CorruptFileError, MismatchError, UnsupportedStateError
from squisher_mergekit.tensors.dtypes import DTYPES, dtype_refusal

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
        """Return one tensor, memory-mapped where possible; it must not be written to."""


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
    """

    file: Path
    entries: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    start: int

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
    """Tensors in one or several safetensors files, memory-mapped when read.

    Args:
        files: The files.
        location: Source of the tensors, for messages.
        headers: Headers of the files, where they have been read already.
    """

    def __init__(
        self, files: Iterable[Path], location: str, headers: Mapping[Path, SafetensorsHeader] | None = None
    ) -> None:
        self.location = location
        self.infos: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for file in files:
            header = read_header(file) if headers is None else headers[file]
            self.infos.update(header.infos)
            self._file_of.update(dict.fromkeys(header.infos, file))

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, a view of the mapped file.

        Raises:
            UnsupportedStateError: torch lacks the dtype.
            CorruptFileError: The file is damaged, or has changed since its header was read.
        """
        from safetensors import SafetensorError, safe_open

        if self.infos[name].stored_dtype is None:
            raise UnsupportedStateError(self.infos[name].refusal)
        file = self._file_of[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(file), framework="pt", device="cpu")
            tensor: torch.Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(
                f"{file} must be a whole safetensors file, but {name} cannot be read ({error!s:.100}); copy it again"
            ) from error
        return tensor


def info_of(tensor: torch.Tensor) -> TensorInfo:
    """Return the header that a tensor in memory would have."""
    return TensorInfo(tuple(tensor.shape), tensor.dtype, tensor.numel() * tensor.element_size())


def read_header(file: Path) -> SafetensorsHeader:
    """Parse the header of a safetensors file.

    Raises:
        CorruptFileError: The file is truncated or no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError(f"its header claims {length} of {size} bytes")
            entries: dict[str, dict[str, Any]] = json.loads(stream.read(length))
        metadata = entries.pop("__metadata__", None) or {}
        if any(not {"dtype", "shape"} <= entry.keys() for entry in entries.values()):
            raise ValueError("a tensor in its header lacks dtype or shape")
        if not isinstance(metadata, dict):
            raise ValueError("the metadata in its header are no mapping")
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes where its header promises {8 + length + end}")
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{file} must be a whole safetensors file, but {error}; copy it again") from error
    return SafetensorsHeader(file, entries, metadata, 8 + length)


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
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise CorruptFileError(f"{index} names {name}, which is not a file beside it; copy the missing shard")
    return [folder / name for name in names]


def _indexed(index: Path) -> list[str]:
    """Return the files that an index names."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{index} must be an index with a weight_map, but {error!r}") from error


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
