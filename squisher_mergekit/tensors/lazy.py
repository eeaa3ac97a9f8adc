"""Tensors that are put together when they are read: slices, shards, decoded forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor


class LazyTensor(Protocol):
    """A second moment that is no tensor yet."""

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the second moment."""

    @property
    def parts(self) -> Sequence[Tensor]:
        """The tensors it is worked out from, as they lie in a mapped file."""

    def read(self) -> Tensor:
        """Return the second moment."""


@dataclass(frozen=True)
class Slices:
    """A tensor made of slices of flat ones, one after the other: what a sharding trainer cut up.

    ``slices``: flat tensor, where its slice begins, how many entries it has.

    Example:
        >>> Slices(((torch.arange(5.0), 3, 2), (torch.arange(7.0), 0, 1)), torch.Size([3, 1])).read().flatten()
        tensor([3., 4., 0.])
    """

    slices: tuple[tuple[Tensor, int, int], ...]
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        return self.slices[0][0].dtype

    @property
    def parts(self) -> Sequence[Tensor]:
        """The flat tensors."""
        return [flat for flat, _, _ in self.slices]

    def read(self) -> Tensor:
        """Return the tensor; of one slice alone a view."""
        cut = [flat[start : start + length] for flat, start, length in self.slices]
        return (cut[0] if len(cut) == 1 else torch.cat(cut)).reshape(self.shape)

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the first and last entries of each slice, ``count`` of both, and their places in the flat tensor."""
        places, values, begin = [], [], 0
        for flat, start, length in self.slices:
            ends = sorted({*range(min(count, length)), *range(max(length - count, 0), length)})
            values.append(flat[start : start + length][ends])
            places += [begin + end for end in ends]
            begin += length
        return torch.tensor(places, dtype=torch.int64), torch.cat(values)


@dataclass(frozen=True)
class Joined:
    """A tensor whose shards lie one after the other along an axis.

    Example:
        >>> Joined((torch.ones(2, 3), torch.zeros(1, 3)), 0).shape
        torch.Size([3, 3])
    """

    shards: tuple[Tensor, ...]
    axis: int

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        shape = list(self.shards[0].shape)
        shape[self.axis] = sum(shard.shape[self.axis] for shard in self.shards)
        return torch.Size(shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        return self.shards[0].dtype

    @property
    def parts(self) -> Sequence[Tensor]:
        """The shards."""
        return self.shards

    def read(self) -> Tensor:
        """Return the tensor."""
        return torch.cat(self.shards, self.axis)


MaybeLazy: TypeAlias = Tensor | LazyTensor


def read(stored: MaybeLazy) -> Tensor:
    """Return a second moment in the parameter's shape."""
    return stored if isinstance(stored, Tensor) else stored.read()


def parts(stored: MaybeLazy) -> Sequence[Tensor]:
    """Return the tensors that a second moment is read from, as they lie in a mapped file."""
    return (stored,) if isinstance(stored, Tensor) else stored.parts


def unverified(tensor: Tensor) -> None:
    """Hold a tensor against no checksum: there is none, or nobody asked for it."""
