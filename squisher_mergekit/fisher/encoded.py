"""A store whose tensors lie in compact parts (``NAME.code``, ``NAME.scale``, ``NAME.row``, ``NAME.col``) in another."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import torch

from squisher_mergekit.errors import CorruptFileError
from squisher_mergekit.fisher import compact
from squisher_mergekit.fisher.mapping import Fisher, check_values
from squisher_mergekit.tensors.safetensors import TensorInfo, TensorStore

_CURE = "copy the file again, or extract the Fisher anew"


class EncodedStore:
    """Decodes a tensor when it is read; shapes are known from the headers alone.

    Args:
        parts: The store with what lies in the files.
        encoding: Of the metadata: code by parameter name, and ``default``.
        notes: Metadata of the headers, with ``NAME.shape`` of every tensor in logarithmic codes.

    Raises:
        CorruptFileError: A part is missing, or has another dtype or shape than its code asks for.
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
        """Where it is, for messages."""
        return self._parts.location

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, decoded.

        Raises:
            CorruptFileError: Its parts do not belong together.
        """
        code = self._code_of.get(name)
        if code is None:
            return self._parts.read(name)
        parts = {suffix: self._parts.read(name + suffix) for suffix in compact.suffixes(code)}
        strange = [suffix for suffix, part in parts.items() if part.dtype != self._parts.infos[name + suffix].dtype]
        if strange:
            raise self._corrupt(name, code, f"{name}{strange[0]} is {parts[strange[0]].dtype}")
        try:
            return compact.decode(parts, code, self.infos[name].shape)
        except ValueError as error:
            raise self._corrupt(name, code, str(error)) from error

    def _owner(self, stored: str, encoding: Mapping[str, str]) -> tuple[str, str]:
        """Return the parameter that a stored tensor belongs to, and its code.

        A parameter may itself be called ``norm.scale``: what the metadata say of a full name comes first.
        """
        stem, dot, last = stored.rpartition(".")
        default = encoding.get("default", "")
        code = encoding.get(stem, default)
        if stored not in encoding and code in compact.NAMES and dot + last in compact.suffixes(code):
            return stem, code
        own = encoding.get(stored, default)
        if own in compact.NAMES:
            raise self._corrupt(stored, own, f"has {stored} itself")
        return stored, own

    def _info(self, name: str, code: str, notes: Mapping[str, str]) -> TensorInfo:
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
        first, second = (name + suffix for suffix in compact.suffixes(code))
        return CorruptFileError(
            f"{name} must be kept as {code} in {first} and {second} that fit, but {self.location}: {found}; {_CURE}"
        )


def _rank1_shape(row: TensorInfo, col: TensorInfo) -> tuple[int, ...] | None:
    fits = row.dtype == col.dtype == torch.float32 and row.shape and col.shape and row.shape[:-1] == col.shape[:-1]
    return (*row.shape, col.shape[-1]) if fits else None


def _log_shape(code: TensorInfo, scale: TensorInfo, note: str | None) -> tuple[int, ...] | None:
    try:
        shape = json.loads(note or "")
        fits = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    except (ValueError, RecursionError):
        fits = False
    fits = fits and (code.dtype, scale.dtype, len(code.shape)) == (torch.uint8, torch.int16, 1)
    # What is promised is bounded by bytes that are there, before anything is allocated.
    return tuple(shape) if fits and scale.shape == (-(-math.prod(shape) // compact.BLOCK), 2) else None


def shape_note(shape: Sequence[int]) -> str:
    """Return how a shape is written into a header.

    Example:
        >>> shape_note((13, 7))
        '[13, 7]'
    """
    return json.dumps(list(shape))


def parts_of(fisher: Fisher, name: str, code: str, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """Return the compact parts of a tensor by their suffix, or None where it is to be kept whole.

    That is where parts would be no smaller than the tensor in ``dtype``, or would have the name of another parameter.

    Raises:
        ValuesError: An entry is NaN, infinite or negative.
    """
    if any(name + suffix in fisher for suffix in compact.suffixes(code)):
        return None
    tensor = fisher[name].to(torch.float32)
    check_values(tensor, name, fisher.location)
    return compact.encode(tensor, code, tensor.numel() * dtype.itemsize)


class WithoutStart:
    """A Fisher less the start of an optimizer's sum (Adagrad's), which a small relative error would drown F in."""

    def __init__(self, fisher: Fisher) -> None:
        self._fisher = fisher
        self.location = fisher.location
        self.infos = {name: fisher.info(name) for name in fisher}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor as float32."""
        return self._fisher[name].to(torch.float32) - self._fisher.offset(name)
