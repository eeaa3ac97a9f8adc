"""Sparse difference of two models: applied to one it gives the other, bit for bit, in both directions.

``difference.safetensors`` stores a tensor with the same shape and dtype in both models by the positions at which its
bits differ, ``NAME.index`` (flat positions) or ``NAME.bits`` (one bit per entry), whichever is smaller, and the values
there, ``NAME.tuned`` and ``NAME.base``. A tensor of one model alone, such as a head, or of another shape is stored
whole under the same suffixes. Equal tensors take no space.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError, MismatchError, NotFoundError
from squisher_mergekit.tensors.folder_moves import sync
from squisher_mergekit.tensors.input_files import expanded, parse_shape, reading
from squisher_mergekit.tensors.safetensors import SafetensorsStore, TensorInfo, safetensors_notes
from squisher_mergekit.tensors.writer import SafetensorsWriter, header_room

DIFFERENCE_NAME = "difference.safetensors"
Side = Literal["tuned", "base"]
_FORMAT, _VERSION = "squisher-difference", "1"
_METADATA = "about"  # key in the file
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_INDEX_BITS = 32
Bits = npt.NDArray[Any]
Positions = npt.NDArray[Any]  # flat positions, or a bool per entry


class TensorReader(Protocol):
    """Tensors of a model by name."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name -> header of the tensor."""

    def read(self, name: str) -> Tensor:
        """Return one tensor; it must not be written to."""


@dataclass(frozen=True)
class DifferenceMetadata:
    """Metadata of a difference.

    Attributes:
        tuned: Text of the trained model's ``config.json``.
        base: Text of the base model's ``config.json``.
        tuned_fingerprint: Fingerprint of the trained weights.
        base_fingerprint: Fingerprint of the base weights.
        renamed: Name in the trained model -> name of the same tensor in the base, where the two differ.
    """

    tuned: str | None = None
    base: str | None = None
    tuned_fingerprint: str | None = None
    base_fingerprint: str | None = None
    renamed: Mapping[str, str] | None = None


def write_difference(
    tuned: TensorReader,
    base: TensorReader,
    file: Path,
    metadata: DifferenceMetadata,
    advance: Callable[[], object] = lambda: None,
) -> None:
    """Write the difference of two models, tensor by tensor.

    Args:
        tuned: Tensors of the trained model.
        base: Tensors of the base model, by the names of the trained one.
        file: File to create.
        metadata: Metadata of the difference.
        advance: Function called after each tensor.
    """
    names = sorted({*tuned.infos, *base.infos})
    notes = json.dumps(asdict(metadata))
    with SafetensorsWriter(file, header_room(names, parts=3) + 2 * len(notes.encode())) as writer:
        writer.note("format", _FORMAT)
        writer.note("version", _VERSION)
        writer.note(_METADATA, notes)
        for name in names:
            ours, theirs = tuned.infos.get(name), base.infos.get(name)
            if ours and theirs and (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype):
                _write_changes(writer, name, tuned.read(name), base.read(name))
            else:
                for side, tensors, info in (("tuned", tuned, ours), ("base", base, theirs)):
                    if info is not None:
                        writer.add(f"{name}.{side}", tensors.read(name))
            advance()
    sync(file)


def _write_changes(writer: SafetensorsWriter, name: str, tuned: Tensor, base: Tensor) -> None:
    ours, theirs = bits_of(tuned), bits_of(base)
    changed = ours != theirs
    count = int(np.count_nonzero(changed))
    if not count:
        return
    writer.note(f"{name}.shape", json.dumps(list(tuned.shape)))
    if count * _INDEX_BITS < changed.size and changed.size <= np.iinfo(np.int32).max:
        writer.add(f"{name}.index", torch.from_numpy(np.flatnonzero(changed).astype(np.int32)))
    else:
        writer.add(f"{name}.bits", torch.from_numpy(np.packbits(changed, bitorder="little")))
    for side, bits in (("tuned", ours), ("base", theirs)):
        writer.add(f"{name}.{side}", torch.from_numpy(bits[changed]).view(tuned.dtype))


def bits_of(tensor: Tensor) -> Bits:
    """Return the bits of a tensor's entries as flat integers; a view where possible.

    Example:
        >>> bits_of(torch.tensor([1.0, -0.0], dtype=torch.bfloat16)).tolist()
        [16256, -32768]
    """
    flat = tensor.detach().cpu().reshape(-1).contiguous()
    found: Bits = flat.view(_BITS[flat.element_size()]).numpy()
    return found


class Difference:
    """Difference file, read tensor by tensor.

    Args:
        file: The file.

    Raises:
        CorruptFileError: The file is truncated, is not a difference, or has a newer version.
    """

    def __init__(self, file: Path) -> None:
        notes = safetensors_notes(file)
        if (notes.get("format"), notes.get("version")) != (_FORMAT, _VERSION):
            raise CorruptFileError(
                f"{file} must be a difference of version {_VERSION}, but it says format "
                f"{notes.get('format')!s:.50}, version {notes.get('version')!s:.50}; make it with squisher mask reset"
            )
        self.file, self._store = file, SafetensorsStore([file], str(file))
        with reading(file, "a whole difference", "make it again"):
            self.metadata = _metadata(json.loads(notes[_METADATA]))
        ends = ".shape"
        self._shapes = {k[: -len(ends)]: parse_shape(v, file) for k, v in notes.items() if k.endswith(ends)}
        for name, shape in self._shapes.items():
            self._check(name, shape)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        infos, size = self._store.infos, math.prod(shape)
        values = [infos.get(f"{name}.{side}") for side in ("tuned", "base")]
        index, bits = infos.get(f"{name}.index"), infos.get(f"{name}.bits")
        good = values[0] is not None and values[0] == values[1] and (index is None) != (bits is None)
        if good and index is not None and values[0] is not None:
            good = index.dtype == torch.int32 and index.shape == values[0].shape
        if good and bits is not None:
            good = bits.dtype == torch.uint8 and bits.shape == (-(-size // 8),)
        good = good and values[0] is not None and len(values[0].shape) == 1 and values[0].dtype.itemsize in _BITS
        if not good:
            raise CorruptFileError(
                f"{self.file} must hold positions and both values of {name}, but does not; make it again"
            )

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that differ and have the same shape and dtype in both models."""
        return tuple(self._shapes)

    def changes(self, name: str) -> bool:
        """Return True if entries of a tensor change, and both models have the tensor."""
        return name in self._shapes

    def whole(self, side: Side) -> dict[str, TensorInfo]:
        """Return the headers of the tensors that are stored whole for one of the two models."""
        end = f".{side}"
        return {
            name[: -len(end)]: info
            for name, info in self._store.infos.items()
            if name.endswith(end) and name[: -len(end)] not in self._shapes
        }

    def read_whole(self, name: str, side: Side) -> Tensor:
        """Return a tensor that is stored whole."""
        return self._store.read(f"{name}.{side}")

    def put(self, name: str, tensor: Tensor, side: Side, place: object) -> Tensor:
        """Return a tensor with the values of the other model.

        Args:
            name: Name of the tensor in the trained model.
            tensor: The tensor of the model that is not ``side``.
            side: The model whose values to return.
            place: Location of the tensor, for messages.

        Raises:
            MismatchError: The tensor differs from the tensor of that model in a changed entry.
            CorruptFileError: A position is outside of the tensor.
        """
        other: Side = "base" if side == "tuned" else "tuned"
        old, new = self._store.read(f"{name}.{other}"), self._store.read(f"{name}.{side}")
        if tuple(tensor.shape) != self._shapes[name] or tensor.dtype != old.dtype:
            raise MismatchError(
                f"{name} must be as in the {other} model of {self.file}, {list(self._shapes[name])} of {old.dtype}, "
                f"but {place} has {list(tensor.shape)} of {tensor.dtype}; give that model"
            )
        positions = self._positions(name, tensor.numel(), old.numel())
        bits = bits_of(tensor).copy()
        wrong = int(np.count_nonzero(bits[positions] != bits_of(old)))
        if wrong:
            raise MismatchError(
                f"{name} must be as in the {other} model of {self.file}, but in {place} {wrong} of the {old.numel()} "
                f"values that change differ; give the {other} model that the difference was made from"
            )
        bits[positions] = bits_of(new)
        return torch.from_numpy(bits).view(tensor.dtype).reshape(tensor.shape)

    def _positions(self, name: str, size: int, count: int) -> Positions:
        """Return the changed entries: positions, or a bool per entry."""
        positions: Positions
        if f"{name}.index" in self._store.infos:
            positions = self._store.read(f"{name}.index").numpy()
            good = len(positions) == 0 or (positions.min() >= 0 and positions.max() < size)
        else:
            packed = self._store.read(f"{name}.bits").numpy()
            positions = np.unpackbits(packed, count=size, bitorder="little").view(np.bool_)
            good = int(np.count_nonzero(positions)) == count
        if not good:
            raise CorruptFileError(
                f"{self.file} must have its positions within {name}, but one is outside; make it again"
            )
        return positions


def _metadata(data: Any) -> DifferenceMetadata:
    """Return the metadata from parsed JSON.

    Raises:
        TypeError: A key is unknown, or a value has another type.
    """
    metadata = DifferenceMetadata(**data)
    renamed = metadata.renamed or {}
    if not isinstance(renamed, dict):
        raise TypeError("renamed is no mapping")
    texts = (metadata.tuned, metadata.base, metadata.tuned_fingerprint, metadata.base_fingerprint, *renamed.values())
    if not all(isinstance(text, str | None) for text in texts):
        raise TypeError("a value in its metadata is no text")
    return metadata


def read_difference(source: str | Path) -> Difference:
    """Open a difference.

    Args:
        source: The file, or a folder with ``difference.safetensors``.

    Raises:
        NotFoundError: The file does not exist.
        CorruptFileError: The file is truncated, is not a difference, or has a newer version.
    """
    path = expanded(source)
    file = path / DIFFERENCE_NAME if path.is_dir() else path
    if not file.is_file():
        raise NotFoundError(f"a difference must be a file or a folder with {DIFFERENCE_NAME}, but there is no {file}")
    return Difference(file)
