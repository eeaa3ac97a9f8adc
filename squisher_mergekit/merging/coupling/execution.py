"""Execution of the coupled merges over whole matrices: panel by panel, so that few copies are in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from squisher_mergekit.fisher.values import check_values
from squisher_mergekit.merging import equations
from squisher_mergekit.merging.coupling import equations as coupling
from squisher_mergekit.merging.coupling.matrices import Matrices, in_blocks
from squisher_mergekit.merging.coupling.report import StepReport, rank_sums, step_figures
from squisher_mergekit.merging.execution import merge_squisher
from squisher_mergekit.merging.inputs import PLAIN, Ballot, Input, Outcome
from squisher_mergekit.merging.parameters import DAMPING
from squisher_mergekit.merging.pool import map_parts
from squisher_mergekit.merging.votes.equations import extended, information
from squisher_mergekit.models.weights import check_finite

P = TypeVar("P")
R = TypeVar("R")

# Entries of a matrix in work at a time: on a CPU a panel of all models stays in the cache.
PANEL = 1 << 18
ACCELERATOR_PANEL = 1 << 22


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


@dataclass
class CoupledOutcome(Outcome):
    """Merged matrix; ``report``: figures of the merged step, or None."""

    report: StepReport | None = None


def merge_coupled(
    base: Tensor,
    inputs: Sequence[Input],
    structure: Structure,
    out_dtype: torch.dtype,
    transposed: bool = False,
    reported: bool = False,
    ballot: Ballot = PLAIN,
) -> Outcome:
    """Merge one matrix with coupled rows, columns or both.

    Args:
        base: W_0.
        inputs: The models; all shaped as the base, on one device. Without Fishers, the factors follow from the task
            vectors alone.
        structure: The curvature.
        out_dtype: dtype of the result; the arithmetic is in float32, or float64 if an input is.
        transposed: True for a matrix ``[in, out]``, as GPT-2's Conv1D keeps it.
        reported: True to compute the figures of the report, which takes two more products a model (kron: four).
        ballot: Rules of the vote: lambda, and whether to compute the Fisher of the result. Task vectors are trimmed
            first.

    Returns:
        The merged matrix.

    Raises:
        ValuesError: A Fisher has NaN, infinite or negative entries, or a weight is not finite.
    """
    used = [i for i, item in enumerate(inputs) if item.weight > 0]
    if len(used) == 1 or base.ndim != 2 or not base.numel():
        return merge_squisher(inputs, out_dtype, ballot)
    _check_inputs(base, inputs)
    masks = [None if item.trim is None else item.trim.kept() for item in inputs]
    recorded = _fisher_of(inputs, masks) if ballot.recorded else None
    inputs = [_trimmed(item, mask, base) for item, mask in zip(inputs, masks, strict=True)]
    over_columns = (structure.kind == "columns") != transposed
    turned = over_columns if structure.kind != "kron" else transposed
    matrices = Matrices.of(base, [inputs[i] for i in used], turned, structure.block)
    extent = ballot.options.extent
    merged = torch.empty(base.shape, dtype=out_dtype if extent == 1 else matrices.work, device=base.device)
    values = merged.mT if turned else merged
    merge = _kron if structure.kind == "kron" else _rows
    found = merge(matrices, structure, values, reported)
    if extent != 1:
        merged = extended(base.to(matrices.work), merged, extent).to(out_dtype)
    spread = dict(zip(used, found.shares, strict=True))
    all_shares = [spread.get(i, 0.0) for i in range(len(inputs))]
    not_finite = 0 if _is_finite(merged) else (~torch.isfinite(merged)).sum()
    report = found.report(tuple(used)) if reported else None
    trimmed = any(mask is not None for mask in masks)
    abstained = [0 if mask is None else mask.numel() - mask.sum() for mask in masks] if trimmed else []
    return CoupledOutcome(
        merged,
        all_shares,
        found.fell_back,
        not_finite=not_finite,
        abstained=abstained,
        report=report,
        fisher=recorded,
    )


def _trimmed(item: Input, mask: Tensor | None, base: Tensor) -> Input:
    """Return an input whose task vector is 0 outside a mask."""
    return item if mask is None else replace(item, theta=torch.where(mask, item.theta, base.to(item.theta.dtype)))


def _fisher_of(inputs: Sequence[Input], masks: Sequence[Tensor | None]) -> Tensor | None:
    """Return the Fisher of the result: the sum over the models that vote."""
    total = information([item.fisher for item in inputs], [item.weight * item.scale for item in inputs], masks)
    return None if total is None else total.to(torch.float32)


@dataclass
class _Found:
    """Results beside the merged matrix: mean coefficients, entries without a signal, figures of each panel, ranks."""

    shares: list[float | Tensor]
    fell_back: Tensor
    figures: list[Tensor]
    ranks: dict[str, Tensor]

    def report(self, models: tuple[int, ...]) -> StepReport:
        return StepReport(torch.cat(self.figures, -1), self.ranks, models)


def _check_inputs(base: Tensor, inputs: Sequence[Input]) -> None:
    """Refuse entries that no system of equations can have."""
    for item in inputs:
        if item.fisher is not None:
            check_values(item.fisher, *item.label)
    name = inputs[0].label[0]
    for tensor, model in ((base, "the base"), *((item.theta, item.model) for item in inputs)):
        if not _is_finite(tensor):
            check_finite(tensor, name, model)


def _is_finite(tensor: Tensor) -> bool:
    """Return True if all entries are finite; one pass, without a mask."""
    low, high = torch.aminmax(tensor)
    return bool((low > -math.inf) & (high < math.inf))


@dataclass(frozen=True)
class _Panel:
    """Rows in work at a time, in blocks of one height."""

    where: slice
    height: int


def _panels(size: int, block: int, entries: int, device: torch.device) -> Iterator[_Panel]:
    """Yield the panels of ``size`` rows with ``entries`` entries each."""
    block, most = min(block, size), PANEL if device.type == "cpu" else ACCELERATOR_PANEL
    at_once, start = max(most // max(block * entries, 1), 1), 0
    while start < size:
        height = min(block, size - start)
        count = min(at_once, (size - start) // height) if height == block else 1
        yield _Panel(slice(start, start + count * height), height)
        start += count * height


def _map(function: Callable[[P], R], panels: Iterable[P], matrices: Matrices) -> list[R]:
    """Run a function on the panels of a matrix: on a CPU by workers of one thread each."""
    if matrices.base.device.type != "cpu":
        return [function(panel) for panel in panels]
    return map_parts(function, panels, matrices.base.numel())


def _rows(matrices: Matrices, structure: Structure, values: Tensor, reported: bool) -> _Found:
    """Merge with coupled rows into ``values``."""
    rows, columns = matrices.shape

    def merge(panel: _Panel) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        blocks = matrices.part(panel.where).blocks(panel.height)
        shares, blank = blocks.shares(structure.uniform)
        factors = blocks.row_factors()
        merged, coefficients = coupling.couple_rows(blocks.thetas, factors, shares, structure.damping)
        values[panel.where] = merged.reshape(-1, columns)
        total = coefficients.sum(-1, dtype=torch.float64) * panel.height
        fell_back = blank.sum() * (panel.height * columns)
        if not reported:
            return total, fell_back, None, None
        fishers = coupling.row_fishers(factors, shares, structure.damping)
        return total, fell_back, step_figures(merged - blocks.base, blocks.steps, fishers), rank_sums(factors)

    found = _map(merge, _panels(rows, structure.block, columns, values.device), matrices)
    totals, blanks, figures, ranks = zip(*found, strict=True)
    side = {structure.kind: torch.stack(ranks).sum(0)} if reported else {}
    shares = list(torch.stack(totals).sum(0) / rows)
    return _Found(shares, torch.stack(blanks).sum(), list(figures) if reported else [], side)


def _kron(matrices: Matrices, structure: Structure, values: Tensor, reported: bool) -> _Found:
    """Merge with Kronecker factors into ``values``."""
    rows, columns = matrices.shape
    all_shares, blank = matrices.blocks(rows).shares(structure.uniform)
    shares = all_shares[:, 0]
    over_rows = _WholeSide.of(matrices, structure.block, shares)
    over_columns = _WholeSide.of(matrices.turned, structure.block, shares)

    def merge(tile: tuple[_Panel, _Panel]) -> Tensor:
        down, across = tile
        part = matrices.part(down.where, across.where)
        tiles, left, right = part.tiles(down.height, across.height), over_rows.part(down), over_columns.part(across)
        merged = coupling.couple_tiles(
            _diagonal(tiles), tiles.thetas, left, right, shares, structure.damping, structure.steps
        )
        values[down.where, across.where] = merged.transpose(1, 2).reshape(part.shape)
        if not reported:
            return merged.new_zeros(0)
        fishers = coupling.tile_fishers(left, right, shares, structure.damping)
        return step_figures(merged - tiles.base, tiles.steps, fishers).sum(-1)

    figures = []
    for down in _panels(rows, structure.block, structure.block, values.device):
        wide = _panels(columns, structure.block, down.where.stop - down.where.start, values.device)
        found = _map(merge, [(down, across) for across in wide], matrices)
        figures += [torch.stack(found).sum(0)] if reported else []
    sides = {"rows": over_rows, "columns": over_columns} if reported else {}
    ranks = {name: side.ranks(structure.block) for name, side in sides.items()}
    return _Found(list(shares), blank.sum() * math.prod(matrices.shape), figures, ranks)


@dataclass(frozen=True)
class _WholeSide:
    """Side of a whole matrix: each row of a tensor here is a row of the factor of its block, up to the block's size."""

    factors: Tensor
    values: Tensor
    vectors: Tensor
    differences: Tensor

    @classmethod
    def of(cls, matrices: Matrices, block: int, shares: Tensor) -> _WholeSide:
        """Return the side over the rows; each model's factors have mean eigenvalue 1 over the matrix."""
        factors = _factors(matrices, block)
        found = cls(factors, factors.new_zeros(factors.shape[1]), *map(torch.zeros_like, (factors[0], factors[1:])))

        def fill(panel: _Panel) -> None:
            where, height = panel.where, panel.height
            side = coupling.Side.of(in_blocks(factors[:, where], height), shares)
            found.values[where] = side.values.flatten()
            found.vectors[where, :height] = side.vectors.flatten(0, 1)
            found.differences[:, where, :height] = side.differences.flatten(1, 2)

        _map(fill, _panels(len(found.values), block, block, factors.device), matrices)
        return found

    def part(self, panel: _Panel) -> coupling.Side:
        """Return the side of the blocks of a panel."""
        where, height = panel.where, panel.height
        return coupling.Side(
            in_blocks(self.factors[:, where], height),
            self.values[where].reshape(-1, height),
            in_blocks(self.vectors[where], height),
            in_blocks(self.differences[:, where], height),
        )

    def ranks(self, block: int) -> Tensor:
        """Return :func:`rank_sums` of the blocks."""
        panels = _panels(len(self.values), block, block, self.values.device)
        return torch.stack([rank_sums(list(self.part(panel).factors)) for panel in panels]).sum(0)


def _factors(matrices: Matrices, block: int) -> Tensor:
    """Return each model's factor over the rows, ``[models, rows, block]``."""
    rows, columns = matrices.shape
    count, device = len(matrices.thetas), matrices.base.device
    factors = torch.zeros(count, rows, min(block, rows), dtype=matrices.work, device=device)
    levels = torch.zeros(count, rows, dtype=torch.float64, device=device)

    def fill(panel: _Panel) -> None:
        where, height = panel.where, panel.height
        blocks = matrices.part(where).blocks(height)
        for i, (factor, level) in enumerate(zip(blocks.row_factors(), blocks.row_levels(), strict=True)):
            factors[i, where, :height] = factor.reshape(-1, height)
            levels[i, where] = level.repeat_interleave(height)

    _map(fill, _panels(rows, block, columns, device), matrices)
    mean = levels.mean(-1, keepdim=True)
    return factors.mul_((levels / torch.where(mean > 0, mean, 1)).to(matrices.work)[..., None])


def _diagonal(part: Matrices) -> Tensor:
    """Return the diagonal merge; the weighted mean where a model has no Fisher."""
    known = [fisher for fisher in part.fishers if fisher is not None]
    if len(known) < len(part.fishers):
        return equations.weighted_mean(part.thetas, part.weights)
    return equations.squisher(part.thetas, known, part.weights, part.scales).values
