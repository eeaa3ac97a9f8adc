"""Checks and running moments of the entries of a diagonal Fisher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch

from squisher_mergekit.errors import ValuesError
from squisher_mergekit.fisher.config import FisherConfig, Scaling
from squisher_mergekit.fisher.factors.mapping import Factors
from squisher_mergekit.tensors.safetensors import TensorInfo


class DiagonalFisher(Protocol):
    """Fisher as its writer and its statistics see it; :class:`~squisher_mergekit.Fisher` is one."""

    config: FisherConfig
    factors: Factors

    @property
    def location(self) -> str:
        """Location of the tensors, for messages."""

    def __getitem__(self, name: str) -> torch.Tensor: ...

    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int: ...

    def __contains__(self, name: object) -> bool: ...

    def info(self, name: str) -> TensorInfo:
        """Return the header of a tensor."""

    def kept_parts(self, name: str) -> dict[str, torch.Tensor] | None:
        """Return the compact parts in which a tensor is known, by suffix; None for a tensor known entry by entry."""

    def factor(self, name: str, scaling: Scaling = "debiased") -> float:
        """Return the scale factor of a parameter."""

    def offset(self, name: str, scaling: Scaling = "debiased") -> float:
        """Return the number to subtract from raw entries of a parameter."""

    def without_initial_value(self) -> DiagonalFisher:
        """Return the same Fisher less the optimizer's initial accumulator value."""


class Moments:
    """Running mean and L2 norm of a Fisher, in float64, a block at a time."""

    BLOCK = 1 << 18  # its float64 copy fits a core's cache

    def __init__(self) -> None:
        self.total = 0.0
        self.squares = 0.0
        self.count = 0

    def add(
        self, fisher: DiagonalFisher, name: str, scaling: Scaling = "debiased", tensor: torch.Tensor | None = None
    ) -> None:
        """Add one tensor, and check its entries.

        Args:
            fisher: The Fisher with the tensor.
            name: Name of the tensor.
            scaling: The scale at which to add it.
            tensor: The raw entries, if they have been read already.

        Raises:
            ConfigError: The scaling needs a number that the metadata lack.
            ValuesError: An entry is NaN, infinite or negative.
        """
        offset, factor = fisher.offset(name, scaling), fisher.factor(name, scaling)
        flat = (fisher[name] if tensor is None else tensor).reshape(-1)
        for start in range(0, flat.numel(), self.BLOCK):
            entries = flat[start : start + self.BLOCK]
            low, high = torch.aminmax(entries)
            if not (low.item() >= 0 and high.item() < float("inf")):
                check_values(flat, name, fisher.location)
            block = entries.to(torch.float64)
            if offset:
                block = block - offset
            self.total += block.sum().item() * factor
            self.squares += torch.dot(block, block).item() * factor**2
        self.count += flat.numel()

    @property
    def mean(self) -> float:
        """Mean over the added entries."""
        return self.total / self.count if self.count else 0.0

    @property
    def norm(self) -> float:
        """L2 norm over the added entries."""
        return math.sqrt(self.squares)


def check_values(tensor: torch.Tensor, name: str, location: str) -> None:
    """Raise if a tensor has NaN, infinite or negative entries.

    Raises:
        ValuesError: An entry is invalid; the message has the number of each kind.
    """
    if tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)
    if not (low.item() >= 0 and high.item() < float("inf")):
        refuse_invalid(count_invalid(tensor), tensor.numel(), name, location)


def has_signal(infos: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]) -> bool:
    """Return True if an entry of some tensors is not 0; the smallest tensors are read first and nearly always suffice.

    Args:
        infos: Name -> header.
        read: Function that reads a tensor.
    """
    return any(bool(read(name).any()) for name in sorted(infos, key=lambda name: infos[name].nbytes))


def zeros_refusal(location: str) -> str:
    """Return the message that refuses an accumulator whose entries are all 0."""
    return (
        f"an accumulator must hold squared gradients, but all entries of {location} are 0; take a checkpoint from "
        "after training began"
    )


def count_invalid(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers of NaN, infinite and negative entries, as three integers on the tensor's device."""
    return torch.stack([tensor.isnan().sum(), tensor.isinf().sum(), (tensor < 0).sum()])


def refuse_invalid(counts: torch.Tensor, total: int, name: str, location: str) -> None:
    """Raise if :func:`count_invalid` found invalid entries.

    Raises:
        ValuesError: A count is not 0; the message has the number of each kind.
    """
    kinds = zip(counts.tolist(), ("NaN", "infinite", "negative"), strict=True)
    found = ", ".join(f"{count} {kind}" for count, kind in kinds if count)
    if found:
        raise ValuesError(
            f"a Fisher must be finite and not negative; {name} in {location} has {found} of {total} entries; "
            "use a checkpoint from before training broke"
        )
