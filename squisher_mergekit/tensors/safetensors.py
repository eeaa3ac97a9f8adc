"""Tensors in safetensors files: headers, shapes and dtypes, memory-mapped reading."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from squisher_mergekit.errors import CorruptFileError, MismatchError


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor: shape, dtype as stored, bytes on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class TensorStore(Protocol):
    """Where the tensors of a Fisher lie; headers are read at once, tensors one at a time."""

    @property
    def location(self) -> str:
        """Where it is, for messages."""

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


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


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
    """Tensors in one or several safetensors files, memory-mapped when read."""

    def __init__(self, files: Iterable[Path], location: str) -> None:
        self.location = location
        self.infos: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for file in files:
            for name, info in tensor_infos(file).items():
                self.infos[name] = info
                self._file_of[name] = file

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, a view of the mapped file."""
        from safetensors import SafetensorError, safe_open

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
    """Return what a header would say of a tensor."""
    return TensorInfo(tuple(tensor.shape), tensor.dtype, tensor.numel() * tensor.element_size())


def safetensors_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Read the header of a safetensors file: name -> entry, and where the data begin.

    Raises:
        CorruptFileError: The file is truncated or no safetensors file.
    """
    header, start = _whole_header(file)
    header.pop("__metadata__", None)
    return header, start


def safetensors_notes(file: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file.

    Raises:
        CorruptFileError: The file is truncated or no safetensors file.
    """
    return _whole_header(file)[0].get("__metadata__") or {}


def _whole_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError(f"its header claims {length} of {size} bytes")
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        if any(not {"dtype", "shape"} <= entry.keys() for entry in entries):
            raise ValueError("a tensor in its header lacks dtype or shape")
        if not isinstance(header.get("__metadata__") or {}, dict):
            raise ValueError("the metadata in its header are no mapping")
        end = max((entry["data_offsets"][1] for entry in entries), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes where its header promises {8 + length + end}")
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{file} must be a whole safetensors file, but {error}; copy it again") from error
    return header, 8 + length


def tensor_infos(file: Path) -> dict[str, TensorInfo]:
    """Return name -> shape, dtype and bytes of a safetensors file, from its header alone."""
    header, _ = safetensors_header(file)
    infos = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        infos[name] = TensorInfo(tuple(entry["shape"]), _DTYPES.get(entry["dtype"], torch.float32), end - begin)
    return infos


def safetensors_files(folder: Path, basename: str) -> list[Path]:
    """Return the files of ``basename.safetensors`` or of its shards; empty if there is neither.

    Raises:
        CorruptFileError: The index cannot be read, or names a file that is missing or outside the folder.
    """
    index = folder / f"{basename}.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(f"{index} must be an index with a weight_map, but {error!r}") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                raise CorruptFileError(f"{index} names {name}, which is not a file beside it; copy the missing shard")
        return [folder / name for name in names]
    single = folder / f"{basename}.safetensors"
    return [single] if single.is_file() else []
