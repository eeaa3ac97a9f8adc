"""Masks of a model's weights, in memory and as files with one bit per entry."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from squisher_mergekit.errors import CorruptFileError, MismatchError, NotFoundError
from squisher_mergekit.fisher.by_parameter import in_memory
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.parameters import parameters_of
from squisher_mergekit.tensors.atomic import written_file
from squisher_mergekit.tensors.folder_moves import sync
from squisher_mergekit.tensors.input_files import expanded, parse_json, parse_shape
from squisher_mergekit.tensors.safetensors import SafetensorsStore, TensorInfo, safetensors_notes
from squisher_mergekit.tensors.writer import SafetensorsWriter, header_room

MASK_NAME = "mask.safetensors"
_FORMAT = "squisher-mask"
_VERSION = 1
_METADATA = "about"  # key in the file


class Mask(Mapping[str, Tensor]):
    """Lazy mapping from the name of a weight, as in ``model.safetensors``, to a bool tensor, true where it is kept.

    Args:
        tensors: Name -> bool tensor.
        metadata: Options of the selection, and ``weights_fingerprint`` of its weights.
        location: File of the mask, for messages.
        about: Old name of ``metadata``.

    Example:
        >>> mask = Mask({"w": torch.tensor([True, False, False])})
        >>> mask["w"].tolist(), mask.kept, mask.entries
        ([True, False, False], 1, 3)
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any] | None = None,
        location: str = "memory",
        about: Mapping[str, Any] | None = None,
    ) -> None:
        if about is not None:
            warnings.warn("about is deprecated; use metadata", DeprecationWarning, stacklevel=2)
        self._tensors = tensors
        self.metadata = dict(metadata or about or {})
        self.location = location

    @property
    def about(self) -> dict[str, Any]:
        """Old name of ``metadata``."""
        warnings.warn("Mask.about is deprecated; use Mask.metadata", DeprecationWarning, stacklevel=2)
        return self.metadata

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight; its mask is not unpacked."""
        shapes = getattr(self._tensors, "shapes", None)
        return shapes[name] if shapes is not None else tuple(self._tensors[name].shape)

    @property
    def kept(self) -> int:
        """Number of entries that are kept."""
        return sum(int(self[name].sum()) for name in self)

    @property
    def entries(self) -> int:
        """Number of entries."""
        return sum(torch.Size(self.shape(name)).numel() for name in self)

    def check(self, infos: Mapping[str, TensorInfo], place: object) -> None:
        """Check the names and shapes of the mask against the headers of weights.

        Args:
            infos: Name -> header of each weight.
            place: Folder of the weights, for messages.

        Raises:
            MismatchError: A name is missing in the mask or in the weights, or a shape differs.
        """
        wanted = {name: info.shape for name, info in infos.items() if info.dtype.is_floating_point}
        for name in dict.fromkeys((*self, *wanted)):
            ours, theirs = self.shape(name) if name in self else None, wanted.get(name)
            if ours != theirs:
                raise MismatchError(
                    f"a mask must be of these weights, but {name} is {_shape(ours)} in {self.location} and "
                    f"{_shape(theirs)} in {place}; give the mask that was made for this model"
                )

    def by_parameter(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the mask by the names of a model's parameters in memory.

        Raises:
            MismatchError: The mask lacks a parameter, or a shape differs.
        """
        as_fisher = Fisher(_AsStore(self), FisherConfig(statistic="mean"))
        found, _ = in_memory(model, as_fisher)
        for name, parameter in parameters_of(model).items():
            if name not in found or found[name].shape != parameter.shape:
                raise MismatchError(
                    f"a mask must be of this model, but of {name}, {list(parameter.shape)}, {self.location} has "
                    f"{_shape(tuple(found[name].shape) if name in found else None)}; give the mask of this model"
                )
        return {name: tensor.to(torch.bool) for name, tensor in found.items()}


class _AsStore:
    """Store of a Fisher whose tensors are those of a mask, to convert names to those in memory."""

    def __init__(self, mask: Mask) -> None:
        self.location = mask.location
        self._mask = mask
        self.infos = {
            name: TensorInfo(mask.shape(name), torch.bool, torch.Size(mask.shape(name)).numel()) for name in mask
        }

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._mask[name]


def whole_mask(shape: tuple[int, ...]) -> Tensor:
    """Return the mask of a tensor that is kept whole; it takes no memory.

    Example:
        >>> whole_mask((2,))
        tensor([True, True])
    """
    return torch.ones((), dtype=torch.bool, device="cpu").expand(shape)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


class MaskWriter:
    """Writer of a mask file, tensor by tensor: eight entries per byte, and none for an all-true or all-false tensor.

    Args:
        file: File to create.
        names: Names of the tensors to come.
        metadata: Options of the selection.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with MaskWriter(Path(folder) / MASK_NAME, ["w"], {}) as writer:
        ...         _ = writer.add("w", torch.tensor([True, False, True]))
        ...     read_mask(Path(folder))["w"]
        tensor([ True, False,  True])
    """

    def __init__(self, file: Path, names: list[str], metadata: Mapping[str, Any]) -> None:
        self._file = file
        self._writer = SafetensorsWriter(file, header_room(names, parts=3) + 2 * len(json.dumps(metadata)))
        self._writer.note("format", _FORMAT)
        self._writer.note("version", str(_VERSION))
        self._writer.note(_METADATA, json.dumps(metadata))

    def __enter__(self) -> MaskWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)
        if kind is None:
            sync(self._file)

    def add(self, name: str, kept: Tensor) -> int:
        """Append the mask of one tensor, and return the number of entries that it keeps."""
        count = int(kept.sum())
        self._writer.note(f"{name}.shape", json.dumps(list(kept.shape)))
        if count in (0, kept.numel()):
            self._writer.note(f"{name}.all", str(int(count > 0)))
        else:
            bits = np.packbits(kept.detach().cpu().reshape(-1).numpy(), bitorder="little")
            self._writer.add(name, torch.from_numpy(bits))
        return count


def write_mask(mask: Mask, file: Path) -> None:
    """Write a mask, whole or not at all."""
    with written_file(file) as temporary, MaskWriter(temporary, list(mask), mask.metadata) as writer:
        for name in mask:
            writer.add(name, mask[name])


def read_mask(source: str | Path) -> Mask:
    """Open a mask file; a tensor is unpacked when it is read.

    Args:
        source: The file, or a folder with ``mask.safetensors``.

    Raises:
        NotFoundError: The file does not exist.
        CorruptFileError: The file is truncated, is not a mask, or has a newer version.
    """
    path = expanded(source)
    file = path / MASK_NAME if path.is_dir() else path
    if not file.is_file():
        raise NotFoundError(f"a mask must be a file or a folder with {MASK_NAME}, but there is no {file}")
    notes = safetensors_notes(file)
    if notes.get("format") != _FORMAT or notes.get("version") != str(_VERSION):
        raise CorruptFileError(
            f"{file} must be a mask of version {_VERSION}, but it says format {notes.get('format')!s:.50}, version "
            f"{notes.get('version')!s:.50}; make it with squisher mask select or squisher prune"
        )
    metadata = parse_json(notes.get(_METADATA, "{}"), file, "a whole mask", "make it again")
    if not isinstance(metadata, dict):
        raise CorruptFileError(f"{file} must have a mapping as metadata, found {metadata!r:.50}; make it again")
    return Mask(_Packed(file, notes), metadata, str(file))


class _Packed(Mapping[str, Tensor]):
    """Mapping of the tensors in a mask file."""

    def __init__(self, file: Path, notes: Mapping[str, str]) -> None:
        self._file, self._store = file, SafetensorsStore([file], str(file))
        ends = ".shape"
        self.shapes = {
            key[: -len(ends)]: parse_shape(value, file) for key, value in notes.items() if key.endswith(ends)
        }
        self._constant = {name: notes[f"{name}.all"] == "1" for name in self.shapes if f"{name}.all" in notes}
        for name, shape in self.shapes.items():
            packed, size = self._store.infos.get(name), math.prod(shape)
            fits = packed is not None and packed.dtype == torch.uint8 and packed.shape == (-(-size // 8),)
            if name in self._constant:
                fits = packed is None and size < 1 << 62
            if not fits:
                raise CorruptFileError(
                    f"{file} must hold a bit for each entry of {name}, but has fewer or more; make it again"
                )

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if name in self._constant:
            # A mask of one value takes no memory, however large its shape claims to be.
            return torch.tensor(self._constant[name], device="cpu").expand(shape)
        bits = np.unpackbits(self._store.read(name).numpy(), count=math.prod(shape), bitorder="little")
        return torch.from_numpy(bits).view(torch.bool).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
