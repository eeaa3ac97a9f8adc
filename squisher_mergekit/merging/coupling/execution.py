"""Execution of the coupled merges over whole matrices: panel by panel, so that few copies are in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.fisher.values import check_values
from squisher_mergekit.merging import equations
from squisher_mergekit.merging.coupling import equations as coupling
from squisher_mergekit.merging.coupling.recorded import level_of, normalised, rows_of
from squisher_mergekit.merging.execution import Input, Outcome, merge_squisher
from squisher_mergekit.merging.parameters import DAMPING
from squisher_mergekit.models.weights import check_finite

PANEL = 1 << 22


@dataclass(frozen=True)
class Structure:
    """Curvature of a matrix.

    Attributes:
        kind: ``rows``, ``columns`` or ``kron``.
        block: Number of consecutive rows or columns that are coupled.
        damping: delta, relative to the mean eigenvalue of a factor.
        steps: Steps of conjugate gradients, for ``kron``.
        uniform: True for ``t_i = w_i / sum w``, False for shares of the trace of v.
    """

    kind: str
    block: int = 128
    damping: float = 0.1
    steps: int = 10
    uniform: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Structure | None:
        """Return the structure that the parameters of a merge ask for; None for the diagonal."""
        kind = given["structure"]
        if kind == "diagonal":
            return None
        damping = DAMPING[kind] if given["damping"] == "auto" else given["damping"]
        return cls(kind, given["block"], damping, given["steps"], given["shares"] == "uniform")


def merge_coupled(
    base: Tensor, inputs: Sequence[Input], structure: Structure, out_dtype: torch.dtype, transposed: bool = False
) -> Outcome:
    """Merge one matrix with coupled rows, columns or both.

    Args:
        base: W_0.
        inputs: The models; all shaped as the base, on one device. Without Fishers, the factors follow from the task
            vectors alone.
        structure: The curvature.
        out_dtype: dtype of the result; the arithmetic is in float32, or float64 if an input is.
        transposed: True for a matrix ``[in, out]``, as GPT-2's Conv1D keeps it.

    Returns:
        The merged matrix.

    Raises:
        ValuesError: A Fisher has NaN, infinite or negative entries, or a weight is not finite.
    """
    used = [i for i, item in enumerate(inputs) if item.weight > 0]
    if len(used) == 1 or base.ndim != 2 or not base.numel():
        return merge_squisher(inputs, out_dtype)
    _check_inputs(base, inputs)
    over_columns = (structure.kind == "columns") != transposed
    turned = over_columns if structure.kind != "kron" else transposed
    matrices = _Matrices.of(base, [inputs[i] for i in used], turned, structure.block)
    values = torch.empty(matrices.shape, dtype=out_dtype, device=base.device)
    merge = _kron if structure.kind == "kron" else _rows
    shares, fell_back = merge(matrices, structure, values)
    spread = dict(zip(used, shares, strict=True))
    merged = (values.mT if turned else values).contiguous()
    all_shares = [spread.get(i, 0.0) for i in range(len(inputs))]
    return Outcome(merged, all_shares, fell_back, not_finite=(~torch.isfinite(merged)).sum())


def _check_inputs(base: Tensor, inputs: Sequence[Input]) -> None:
    """Refuse entries that no system of equations can have."""
    for item in inputs:
        if item.fisher is not None:
            check_values(item.fisher, *item.label)
    name = inputs[0].label[0]
    for tensor, model in ((base, "the base"), *((item.theta, item.model) for item in inputs)):
        if not bool(torch.isfinite(tensor).all()):
            check_finite(tensor, name, model)


@dataclass(frozen=True)
class _Matrices:
    """Base, weights and Fishers of the models in use, as ``[out, in]``."""

    base: Tensor
    thetas: tuple[Tensor, ...]
    fishers: tuple[Tensor | None, ...]
    weights: tuple[float, ...]
    scales: tuple[float, ...]
    work: torch.dtype
    # Recorded factors over the rows and over the columns, one a model: row -> its row in its block.
    recorded: tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]

    @classmethod
    def of(cls, base: Tensor, inputs: Sequence[Input], turned: bool, block: int) -> _Matrices:
        thetas, fishers = tuple(item.theta.detach() for item in inputs), tuple(item.fisher for item in inputs)
        work = torch.float32
        for tensor in (base, *thetas, *fishers):
            work = work if tensor is None else torch.promote_types(work, tensor.dtype)
        weights, scales = tuple(item.weight for item in inputs), tuple(item.scale for item in inputs)
        rows, columns = (
            tuple(rows_of(item.factors[axis], base.shape[axis], block, work) for item in inputs) for axis in (0, 1)
        )
        matrices = cls(base.detach(), thetas, fishers, weights, scales, work, (rows, columns))
        return matrices.turned if turned else matrices

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def turned(self) -> _Matrices:
        """The transposes."""
        return replace(self._each(lambda matrix: matrix.mT), recorded=self.recorded[::-1])

    def part(self, *where: slice) -> _Matrices:
        """Return a part, in the dtype of the arithmetic."""
        rows, columns = self.recorded
        recorded = tuple(None if factor is None else factor[where[0]] for factor in rows), columns
        return replace(self._each(lambda matrix: matrix[where].to(self.work)), recorded=recorded)

    def blocks(self, height: int) -> _Matrices:
        """Return the blocks of ``height`` rows, as batches ``[count, height, in]``."""
        return self._each(lambda matrix: matrix.reshape(-1, height, matrix.shape[-1]))

    def tiles(self, height: int, width: int) -> _Matrices:
        """Return the tiles, as batches ``[rows, columns, height, width]``."""

        def cut(matrix: Tensor) -> Tensor:
            rows, columns = matrix.shape
            return matrix.reshape(rows // height, height, columns // width, width).transpose(1, 2)

        return self._each(cut)

    def _each(self, change: Callable[[Tensor], Tensor]) -> _Matrices:
        thetas = tuple(map(change, self.thetas))
        fishers = tuple(None if fisher is None else change(fisher) for fisher in self.fishers)
        return replace(self, base=change(self.base), thetas=thetas, fishers=fishers)

    def shares(self, uniform: bool) -> tuple[Tensor, Tensor]:
        """Return ``t_i`` in each block, ``[models, blocks]``, and the blocks where no model has a signal.

        There, and where a model has no Fisher, ``t_i = w_i / sum w``.
        """
        rates = torch.tensor(self.weights, dtype=torch.float64, device=self.base.device)
        known = [fisher for fisher in self.fishers if fisher is not None]
        mean = (rates / rates.sum())[:, None].expand(-1, len(self.base))
        if len(known) < len(self.fishers):
            return mean, torch.zeros(len(self.base), dtype=torch.bool, device=rates.device)
        traces = torch.stack([fisher.sum((-2, -1), dtype=torch.float64) for fisher in known])
        blank = traces.sum(0) == 0
        scales = torch.tensor(equations.relative(self.scales), dtype=torch.float64, device=rates.device)
        found = mean if uniform else coupling.shares_by_trace(traces, rates / rates.max() * scales)
        return torch.where(blank, mean, found), blank

    def row_factors(self) -> list[Tensor]:
        """Return each model's factors over the rows of the blocks: the recorded ones, else those of d and v."""
        height = self.base.shape[-2]
        return [
            coupling.row_factor(theta - self.base, fisher)
            if recorded is None
            else normalised(_blocks(recorded, height))
            for theta, fisher, recorded in zip(self.thetas, self.fishers, self.recorded[0], strict=True)
        ]

    def row_levels(self) -> list[Tensor]:
        """Return the mean eigenvalue of each model's factors before :meth:`row_factors` divides them by it."""
        height, levels = self.base.shape[-2], []
        for theta, fisher, recorded in zip(self.thetas, self.fishers, self.recorded[0], strict=True):
            if recorded is None:
                power = (theta - self.base).square() if fisher is None else fisher
                levels.append(power.sum((-2, -1), dtype=torch.float64) / height)
            else:
                levels.append(level_of(_blocks(recorded, height)))
        return levels


def _panels(size: int, block: int, entries: int) -> Iterator[tuple[slice, int]]:
    """Yield the rows of each panel and the height of its blocks; all blocks of a panel have one height."""
    block = min(block, size)
    at_once, start = max(PANEL // max(block * entries, 1), 1), 0
    while start < size:
        height = min(block, size - start)
        count = min(at_once, (size - start) // height) if height == block else 1
        yield slice(start, start + count * height), height
        start += count * height


def _rows(matrices: _Matrices, structure: Structure, values: Tensor) -> tuple[list[Tensor], Tensor]:
    """Merge with coupled rows into ``values``; return mean coefficients and the number of entries without signal."""
    rows, columns = matrices.shape
    total, blanks = torch.zeros(len(matrices.thetas), dtype=torch.float64, device=values.device), []
    for where, height in _panels(rows, structure.block, columns):
        blocks = matrices.part(where).blocks(height)
        shares, blank = blocks.shares(structure.uniform)
        merged, coefficients = coupling.couple_rows(blocks.thetas, blocks.row_factors(), shares, structure.damping)
        values[where] = merged.reshape(-1, columns).to(values.dtype)
        total += coefficients.sum(-1, dtype=torch.float64) * height
        blanks.append(blank.sum() * (height * columns))
    return list(total / rows), torch.stack(blanks).sum()


def _kron(matrices: _Matrices, structure: Structure, values: Tensor) -> tuple[list[Tensor], Tensor]:
    """Merge with Kronecker factors into ``values``; return the shares and the number of entries without signal."""
    rows, columns = matrices.shape
    shares, blank = matrices.blocks(rows).shares(structure.uniform)
    over_rows, over_columns = _factors(matrices, structure.block), _factors(matrices.turned, structure.block)
    for where, height in _panels(rows, structure.block, structure.block):
        for across, width in _panels(columns, structure.block, where.stop - where.start):
            part = matrices.part(where, across)
            tiles = part.tiles(height, width)
            merged = coupling.couple_tiles(
                _diagonal(tiles),
                tiles.thetas,
                [_blocks(factor[where], height) for factor in over_rows],
                [_blocks(factor[across], width) for factor in over_columns],
                shares[:, 0],
                structure.damping,
                structure.steps,
            )
            values[where, across] = merged.transpose(1, 2).reshape(part.shape).to(values.dtype)
    return list(shares[:, 0]), blank.sum() * math.prod(matrices.shape)


def _factors(matrices: _Matrices, block: int) -> Tensor:
    """Return each model's factor over the rows, of mean eigenvalue 1 over the matrix: row -> its row in its block."""
    rows, columns = matrices.shape
    count, device = len(matrices.thetas), matrices.base.device
    factors = torch.zeros(count, rows, min(block, rows), dtype=matrices.work, device=device)
    levels = torch.zeros(count, rows, dtype=torch.float64, device=device)
    for where, height in _panels(rows, block, columns):
        blocks = matrices.part(where).blocks(height)
        for i, (factor, level) in enumerate(zip(blocks.row_factors(), blocks.row_levels(), strict=True)):
            factors[i, where, :height] = factor.reshape(-1, height)
            levels[i, where] = level.repeat_interleave(height)
    mean = levels.mean(-1, keepdim=True)
    return factors * (levels / torch.where(mean > 0, mean, 1)).to(matrices.work)[..., None]


def _blocks(factor: Tensor, height: int) -> Tensor:
    return factor[:, :height].reshape(-1, height, height)


def _diagonal(part: _Matrices) -> Tensor:
    """Return the diagonal merge; the weighted mean where a model has no Fisher."""
    known = [fisher for fisher in part.fishers if fisher is not None]
    if len(known) < len(part.fishers):
        return equations.weighted_mean(part.thetas, part.weights)
    return equations.squisher(part.thetas, known, part.weights, part.scales).values
