"""Recorded factors of a merge: the sides that a structure needs, their blocks, and the refusal of other blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.fisher.factors.blocks import can_divide, divided
from squisher_mergekit.fisher.factors.mapping import Side
from squisher_mergekit.fisher.mapping import Fisher


def sides_of(structure: str, transposed: bool) -> tuple[Side, ...]:
    """Return the sides of the stored tensor that a structure couples.

    Args:
        structure: ``diagonal``, ``rows``, ``columns`` or ``kron``, of a matrix ``[out, in]``.
        transposed: True for a matrix stored as ``[in, out]``.

    Example:
        >>> sides_of("rows", False), sides_of("rows", True), sides_of("kron", True)
        (('rows',), ('columns',), ('rows', 'columns'))
    """
    if structure == "kron":
        return ("rows", "columns")
    if structure not in ("rows", "columns"):
        return ()
    return ("columns",) if (structure == "columns") != transposed else ("rows",)


def recorded_sides(fisher: Fisher, name: str, sides: Sequence[Side], block: int) -> tuple[Side, ...]:
    """Return the sides of a matrix with a recorded factor, from headers.

    Args:
        fisher: The Fisher.
        name: Name of the matrix in the Fisher.
        sides: The sides that the merge couples.
        block: Number of rows or columns that the merge couples.

    Raises:
        ConfigError: The recorded blocks are no multiple of ``block``.
    """
    found = tuple(side for side in sides if name in fisher.factors.side(side))
    for side in found:
        factors = fisher.factors.side(side)
        _, width, _ = shape = factors.shape(name)
        if not can_divide(shape, factors.size(name), block):
            raise ConfigError(
                f"block must divide the blocks of recorded factors, but is {block}, and {name}.{side} in "
                f"{fisher.location} has blocks of {width}; set block: {width}"
            )
    return found


def read_side(fisher: Fisher, name: str, side: Side) -> Tensor | None:
    """Return the recorded factor over one side of a matrix, as stored; None if there is none.

    Raises:
        ValuesError: The factor is not finite, not symmetric, or has a negative entry on its diagonal.
    """
    factors = fisher.factors.side(side)
    if name not in factors:
        return None
    info, factor = fisher.factors.info, factors[name]
    if info is None or not info.initial:
        return factor
    # What an optimizer began with is no gradient.
    start = info.initial * torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    factor = factor - start
    factor.diagonal(dim1=-2, dim2=-1).clamp_min_(0)
    return factor


def rows_of(factor: Tensor | None, size: int, block: int, dtype: torch.dtype) -> Tensor | None:
    """Return a recorded factor as a matrix ``[size, b]``, row -> its row in its block; None if there is none."""
    return None if factor is None else divided(factor.to(dtype), size, block)


def normalised(blocks: Tensor) -> Tensor:
    """Return factors with mean eigenvalue 1; 0 for a block without a signal.

    Example:
        >>> normalised(torch.tensor([[[3.0, 1.0], [1.0, 1.0]]]))
        tensor([[[1.5000, 0.5000],
                 [0.5000, 0.5000]]])
    """
    level = level_of(blocks)[..., None, None]
    return (blocks / torch.where(level > 0, level, 1)).to(blocks.dtype)


def level_of(blocks: Tensor) -> Tensor:
    """Return the mean eigenvalue of each block, in float64."""
    return blocks.diagonal(dim1=-2, dim2=-1).mean(-1, dtype=torch.float64)
