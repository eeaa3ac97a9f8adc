"""Lazy tensors: slices, shards and encoded tensors that are assembled when they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor


class LazyTensor(Protocol):
    """Tensor that is assembled or decoded when it is read."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that :meth:`read` returns."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor that :meth:`read` returns."""

    @property
    def parts(self) -> Sequence[Tensor]:
        """Stored tensors that the result is computed from, mapped from disk where possible."""

    def read(self) -> Tensor:
        """Return the tensor."""


@dataclass(frozen=True)
class Slices:
    """Tensor made of slices of flat buffers, in their order, as sharding trainers store it.

    Attributes:
        slices: Flat buffer, first entry and number of entries of each slice.
        shape: Shape of the tensor.

    Example:
        >>> Slices(((torch.arange(5.0), 3, 2), (torch.arange(7.0), 0, 1)), torch.Size([3, 1])).read().flatten()
        tensor([3., 4., 0.])
    """

    slices: tuple[tuple[Tensor, int, int], ...]
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the entries."""
        return self.slices[0][0].dtype

    @property
    def parts(self) -> Sequence[Tensor]:
        """The flat buffers."""
        return [flat for flat, _, _ in self.slices]

    def read(self) -> Tensor:
        """Return the tensor; a view where there is one slice."""
        cut = [flat[start : start + length] for flat, start, length in self.slices]
        return (cut[0] if len(cut) == 1 else torch.cat(cut)).reshape(self.shape)

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the first and the last ``count`` entries of each slice: positions in the flat tensor, and values."""
        positions, values, begin = [], [], 0
        for flat, start, length in self.slices:
            ends = sorted({*range(min(count, length)), *range(max(length - count, 0), length)})
            values.append(flat[start : start + length][ends])
            positions += [begin + end for end in ends]
            begin += length
        return torch.tensor(positions, dtype=torch.int64, device="cpu"), torch.cat(values)


@dataclass(frozen=True)
class Joined:
    """Tensor whose shards follow one another along an axis.

    Attributes:
        shards: The shards, in order.
        axis: The axis along which the tensor is sharded.

    Example:
        >>> Joined((torch.ones(2, 3), torch.zeros(1, 3)), 0).shape
        torch.Size([3, 3])
    """

    shards: tuple[Tensor, ...]
    axis: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor."""
        shape = list(self.shards[0].shape)
        shape[self.axis] = sum(shard.shape[self.axis] for shard in self.shards)
        return torch.Size(shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the entries."""
        return self.shards[0].dtype

    @property
    def parts(self) -> Sequence[Tensor]:
        """The shards."""
        return self.shards

    def read(self) -> Tensor:
        """Return the whole tensor."""
        return torch.cat(self.shards, self.axis)


@dataclass(frozen=True)
class _OfPieces:
    """Tensor made of others of one dtype, lazy or not."""

    pieces: tuple[MaybeLazy, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the entries."""
        return self.pieces[0].dtype

    @property
    def parts(self) -> Sequence[Tensor]:
        """Stored tensors of all pieces."""
        return [part for piece in self.pieces for part in parts(piece)]


@dataclass(frozen=True)
class Concatenated(_OfPieces):
    """Tensor made of lazy tensors that follow one another along an axis.

    Attributes:
        pieces: The lazy tensors, in order.
        axis: The axis.
    """

    axis: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor."""
        shape = list(self.pieces[0].shape)
        shape[self.axis] = sum(piece.shape[self.axis] for piece in self.pieces)
        return torch.Size(shape)

    def read(self) -> Tensor:
        """Return the whole tensor."""
        return torch.cat([read(piece) for piece in self.pieces], self.axis)


Region: TypeAlias = tuple[tuple[int, int], ...]  # first position, and position after the last, along each axis


@dataclass(frozen=True)
class Assembled(_OfPieces):
    """Tensor whose regions are regions of others, as tensor parallelism cuts it.

    Attributes:
        pieces: The other tensors.
        regions: Region of each piece, and the region of the tensor that it fills.
        shape: Shape of the tensor.

    Example:
        >>> halves = (torch.ones(2), torch.zeros(2))
        >>> pairs = ((((0, 1),), ((0, 1),)), (((0, 2),), ((1, 3),)))
        >>> Assembled.checked(halves, pairs, torch.Size([3])).read()
        tensor([1., 0., 0.])
    """

    regions: tuple[tuple[Region, Region], ...]
    shape: torch.Size

    @classmethod
    def checked(
        cls, pieces: tuple[MaybeLazy, ...], regions: tuple[tuple[Region, Region], ...], shape: torch.Size
    ) -> Assembled:
        """Return the tensor whose entries are each filled once.

        Raises:
            ValueError: Regions overlap, leave gaps, have another size than their piece's, or are outside of it.
        """
        for piece, (own, whole) in zip(pieces, regions, strict=True):
            if len(own) != len(piece.shape) or any(end > size for (_, end), size in zip(own, piece.shape, strict=True)):
                raise ValueError(f"a part of shape {list(piece.shape)} lacks the region {own}")
            if [end - begin for begin, end in own] != [end - begin for begin, end in whole]:
                raise ValueError(f"the region {own} does not fill {whole}")
        filled = [whole for _, whole in regions]
        if any(
            len(whole) != len(shape)
            or any(not 0 <= begin <= end <= size for (begin, end), size in zip(whole, shape, strict=True))
            for whole in filled
        ):
            raise ValueError(f"the regions {filled} are not inside of {list(shape)}")
        overlap = any(_meet(a, b) for number, a in enumerate(filled) for b in filled[:number])
        count = sum(torch.Size([end - begin for begin, end in whole]).numel() for whole in filled)
        if overlap or count != shape.numel() or len({piece.dtype for piece in pieces}) > 1:
            raise ValueError(f"the regions {filled} do not fill {list(shape)}")
        return cls(pieces, regions, shape)

    def read(self) -> Tensor:
        """Return the whole tensor."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        for piece, (own, whole) in zip(self.pieces, self.regions, strict=True):
            tensor[_slices(whole)] = read(piece)[_slices(own)]
        return tensor


def _slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(begin, end) for begin, end in region)


def _meet(a: Region, b: Region) -> bool:
    return all(max(first[0], second[0]) < min(first[1], second[1]) for first, second in zip(a, b, strict=True))


MaybeLazy: TypeAlias = Tensor | LazyTensor


def concatenated(pieces: Sequence[MaybeLazy], axis: int) -> Concatenated:
    """Return a tensor made of others along an axis, read when asked for.

    Raises:
        ValueError: The tensors differ along another axis, or in dtype.

    Example:
        >>> concatenated([torch.zeros(2, 3), torch.ones(2, 1)], 1).shape
        torch.Size([2, 4])
    """
    others = {(*piece.shape[:axis], *piece.shape[axis + 1 :]) for piece in pieces}
    if len(others) > 1 or len({piece.dtype for piece in pieces}) > 1 or any(len(p.shape) <= axis for p in pieces):
        raise ValueError(f"parts of shapes {[list(piece.shape) for piece in pieces]}")
    return Concatenated(tuple(pieces), axis)


def read(stored: MaybeLazy) -> Tensor:
    """Return a tensor as it is, or read a lazy one."""
    return stored if isinstance(stored, Tensor) else stored.read()


def parts(stored: MaybeLazy) -> Sequence[Tensor]:
    """Return the stored tensors that a tensor is read from, mapped from disk where possible."""
    return (stored,) if isinstance(stored, Tensor) else stored.parts


def unverified(tensor: Tensor) -> Tensor:
    """Return a tensor that is in memory already, or has no checksum."""
    return tensor


def in_memory(stored: MaybeLazy, copied: Callable[[Tensor], Tensor]) -> MaybeLazy:
    """Return a tensor whose parts are in memory; of a flat buffer, only the slices in use.

    Args:
        stored: A tensor, or a lazy one.
        copied: Function that returns a mapped tensor in memory.

    Example:
        >>> in_memory(Slices(((torch.arange(5.0), 3, 2),), torch.Size([2])), torch.clone).slices
        ((tensor([3., 4.]), 0, 2),)
    """
    if isinstance(stored, Tensor):
        return copied(stored)
    if isinstance(stored, Slices):
        slices = ((copied(flat[start : start + length]), 0, length) for flat, start, length in stored.slices)
        return Slices(tuple(slices), stored.shape)
    if not is_dataclass(stored):
        return stored
    values = {field.name: getattr(stored, field.name) for field in fields(stored)}
    changes: dict[str, Any] = {name: copied(value) for name, value in values.items() if isinstance(value, Tensor)}
    for name, value in values.items():
        if (
            isinstance(value, tuple)
            and value
            and all(isinstance(item, Tensor) or hasattr(item, "read") for item in value)
        ):
            changes[name] = tuple(in_memory(item, copied) for item in value)
        elif is_dataclass(value) and not isinstance(value, type):
            changes[name] = in_memory(value, copied)
    return replace(stored, **changes)
