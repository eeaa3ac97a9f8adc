"""Store that decodes compact tensors (``NAME.code``, ``NAME.scale``, ``NAME.row``, ``NAME.col``) when it reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import torch

from squisher_mergekit.errors import CorruptFileError
from squisher_mergekit.fisher import compact
from squisher_mergekit.fisher.values import DiagonalFisher, check_values
from squisher_mergekit.tensors.devices.transfer import moved
from squisher_mergekit.tensors.read_ahead import FileRange
from squisher_mergekit.tensors.safetensors import TensorInfo, TensorStore, file_ranges, info_of

_CURE = "copy the file again, or extract the Fisher anew"


class EncodedStore:
    """Store of decoded tensors over a store of compact parts; headers alone give the shapes.

    Args:
        parts: The store of the files' own tensors.
        encoding: Parameter name -> compact form or dtype, and ``default``, from the metadata.
        notes: Metadata of the safetensors headers, with ``NAME.shape`` of each tensor in a logarithmic code.

    Raises:
        CorruptFileError: A part is missing, or its dtype or shape does not fit its compact form.
    """

    def __init__(self, parts: TensorStore, encoding: Mapping[str, str], notes: Mapping[str, str]) -> None:
        self._parts = parts
        self._code_of: dict[str, str] = {}
        self.infos: dict[str, TensorInfo] = {}
        for stored in parts.infos:
            name, code = self._owner(stored, encoding)
            if code not in compact.NAMES:
                self.infos[name] = parts.infos[stored]
            elif name not in self._code_of:
                self._code_of[name] = code
                self.infos[name] = self._info(name, code, notes)

    @property
    def location(self) -> str:
        """Location of the files, for messages."""
        return self._parts.location

    def read(self, name: str) -> torch.Tensor:
        """Read and decode one tensor.

        Raises:
            CorruptFileError: The parts of the tensor do not fit each other.
        """
        return self.read_to(name, torch.device("cpu"))

    def read_to(self, name: str, device: torch.device) -> torch.Tensor:
        """Read one tensor, and decode it on a device, which its compact parts reach sooner than the whole.

        Raises:
            CorruptFileError: The parts of the tensor do not fit each other.
        """
        code = self._code_of.get(name)
        if code is None:
            return moved(self._parts.read(name), device)
        parts = {suffix: moved(self._parts.read(name + suffix), device) for suffix in compact.suffixes(code)}
        changed = [suffix for suffix, part in parts.items() if part.dtype != self._parts.infos[name + suffix].dtype]
        if changed:
            raise self._corrupt(name, code, f"{name}{changed[0]} is {parts[changed[0]].dtype}")
        try:
            return compact.decode(parts, code, self.infos[name].shape)
        except ValueError as error:
            raise self._corrupt(name, code, str(error)) from error

    def file_ranges(self, name: str) -> list[FileRange]:
        """Return the parts of files with the parts of a tensor."""
        suffixes = compact.suffixes(self._code_of[name]) if name in self._code_of else ("",)
        return [part for suffix in suffixes for part in file_ranges(self._parts, name + suffix)]

    def _owner(self, stored: str, encoding: Mapping[str, str]) -> tuple[str, str]:
        """Return the parameter that a stored tensor belongs to, and its encoding.

        A parameter may itself be called ``norm.scale``: the metadata of the full name come first.
        """
        stem, dot, last = stored.rpartition(".")
        default = encoding.get("default", "")
        code = encoding.get(stem, default)
        if stored not in encoding and code in compact.NAMES and dot + last in compact.suffixes(code):
            return stem, code
        code = encoding.get(stored, default)
        if code in compact.NAMES:
            raise self._corrupt(stored, code, f"has {stored} itself")
        return stored, code

    def _info(self, name: str, code: str, notes: Mapping[str, str]) -> TensorInfo:
        """Return the header of a compact tensor, from the headers of its parts."""
        missing = [name + suffix for suffix in compact.suffixes(code) if name + suffix not in self._parts.infos]
        if missing:
            raise self._corrupt(name, code, f"lacks {missing[0]}")
        first, second = (self._parts.infos[name + suffix] for suffix in compact.suffixes(code))
        shape = (
            _rank1_shape(first, second) if code == "rank1" else _log_shape(first, second, notes.get(f"{name}.shape"))
        )
        sized = all(info.nbytes == math.prod(info.shape) * info.dtype.itemsize for info in (first, second))
        if shape is None or not sized:
            found = ", ".join(f"{str(i.dtype).removeprefix('torch.')} {list(i.shape)}" for i in (first, second))
            noted = "" if code == "rank1" else f", shape {notes.get(f'{name}.shape')}"
            raise self._corrupt(name, code, f"has {found}{noted}")
        return TensorInfo(shape, torch.float32, first.nbytes + second.nbytes)

    def _corrupt(self, name: str, code: str, found: str) -> CorruptFileError:
        """Return the error for parts that do not fit."""
        first, second = (name + suffix for suffix in compact.suffixes(code))
        return CorruptFileError(
            f"{name} must be kept as {code} in {first} and {second} that fit, but {self.location}: {found}; {_CURE}"
        )


class RankOneStore:
    """Store of tensors known by their row means and column means, and of tensors kept whole.

    Args:
        means: Name -> row means, shape ``[m]``, and column means, shape ``[n]``, of a matrix; rounded to float32.
        whole: Name -> tensor.
        location: Source of the tensors, for messages.

    Example:
        >>> store = RankOneStore({"w": (torch.tensor([1.0, 3.0]), torch.tensor([2.0]))}, {}, "memory")
        >>> store.infos["w"].shape, store.read("w")
        ((2, 1), tensor([[1.],
                [3.]]))
    """

    def __init__(
        self, means: Mapping[str, tuple[torch.Tensor, torch.Tensor]], whole: Mapping[str, torch.Tensor], location: str
    ) -> None:
        self.location = location
        self._means = {name: tuple(map(compact.to_float32, pair)) for name, pair in means.items()}
        self._whole = dict(whole)
        self.infos = {name: info_of(tensor) for name, tensor in whole.items()}
        for name, (row, col) in self._means.items():
            self.infos[name] = TensorInfo((len(row), len(col)), torch.float32, row.nbytes + col.nbytes)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in float32."""
        return self.read_to(name, torch.device("cpu"))

    def read_to(self, name: str, device: torch.device) -> torch.Tensor:
        """Return one tensor, in float32, computed on a device."""
        found = self._means.get(name)
        if found is None:
            return moved(self._whole[name], device)
        row, col = (moved(means, device) for means in found)
        return compact.outer_of_means(row, col)

    def kept_parts(self, name: str) -> dict[str, torch.Tensor] | None:
        """Return the means of a tensor by suffix; None for a tensor kept whole."""
        found = self._means.get(name)
        return None if found is None else dict(zip(compact.RANK1, found, strict=True))


def _rank1_shape(row: TensorInfo, col: TensorInfo) -> tuple[int, ...] | None:
    """Return the shape of a tensor from its row and column means; None if they do not fit."""
    fits = row.dtype == col.dtype == torch.float32 and row.shape and col.shape and row.shape[:-1] == col.shape[:-1]
    return (*row.shape, col.shape[-1]) if fits else None


def _log_shape(code: TensorInfo, scale: TensorInfo, note: str | None) -> tuple[int, ...] | None:
    """Return the shape of a tensor in a logarithmic code from its note; None if the parts do not fit."""
    try:
        shape = json.loads(note or "")
        fits = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    except (ValueError, RecursionError):
        fits = False
    fits = fits and (code.dtype, scale.dtype, len(code.shape)) == (torch.uint8, torch.int16, 1)
    # The size in the note is bounded by the bytes in the file, before any memory is allocated.
    return tuple(shape) if fits and scale.shape == (-(-math.prod(shape) // compact.BLOCK), 2) else None


def shape_note(shape: Sequence[int]) -> str:
    """Return a shape as the text for a safetensors header.

    Example:
        >>> shape_note((13, 7))
        '[13, 7]'
    """
    return json.dumps(list(shape))


def parts_of(fisher: DiagonalFisher, name: str, code: str, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """Return the compact parts of a tensor by suffix.

    Returns:
        Suffix -> part; None to keep the tensor whole, because the parts would not be smaller than the tensor in
        ``dtype``, or would have the name of another parameter.

    Raises:
        ValuesError: An entry is NaN, infinite or negative.
    """
    if any(name + suffix in fisher for suffix in compact.suffixes(code)):
        return None
    tensor = fisher[name].to(torch.float32)
    check_values(tensor, name, fisher.location)
    return compact.encode(tensor, code, tensor.numel() * dtype.itemsize)
