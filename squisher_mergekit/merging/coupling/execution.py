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
from squisher_mergekit.merging.coupling.recorded import level_of, normalised, rows_of
from squisher_mergekit.merging.coupling.report import StepReport, rank_sums, step_figures
from squisher_mergekit.merging.execution import Input, Outcome, merge_squisher
from squisher_mergekit.merging.parameters import DAMPING
from squisher_mergekit.merging.pool import map_parts
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
    merged = torch.empty(base.shape, dtype=out_dtype, device=base.device)
    values = merged.mT if turned else merged
    merge = _kron if structure.kind == "kron" else _rows
    found = merge(matrices, structure, values, reported)
    spread = dict(zip(used, found.shares, strict=True))
    all_shares = [spread.get(i, 0.0) for i in range(len(inputs))]
    not_finite = 0 if _is_finite(merged) else (~torch.isfinite(merged)).sum()
    report = found.report(tuple(used)) if reported else None
    return CoupledOutcome(merged, all_shares, found.fell_back, not_finite=not_finite, report=report)


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

    @property
    def steps(self) -> Iterator[Tensor]:
        """The task vectors, one at a time."""
        return (theta - self.base for theta in self.thetas)

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
        traces = torch.stack([_sums(fisher) for fisher in known])
        blank = traces.sum(0) == 0
        scales = torch.tensor(equations.relative(self.scales), dtype=torch.float64, device=rates.device)
        found = mean if uniform else coupling.shares_by_trace(traces, rates / rates.max() * scales)
        return torch.where(blank, mean, found), blank

    def row_factors(self) -> list[Tensor]:
        """Return each model's factors over the rows of the blocks: the recorded ones, else those of d and v."""
        height = self.base.shape[-2]
        return [
            coupling.row_factor(step, fisher) if recorded is None else normalised(_blocks(recorded, height))
            for step, fisher, recorded in zip(self.steps, self.fishers, self.recorded[0], strict=True)
        ]

    def row_levels(self) -> list[Tensor]:
        """Return the mean eigenvalue of each model's factors before :meth:`row_factors` divides them by it."""
        height, levels = self.base.shape[-2], []
        for step, fisher, recorded in zip(self.steps, self.fishers, self.recorded[0], strict=True):
            if recorded is None:
                power = step.square() if fisher is None else fisher
                levels.append(_sums(power) / height)
            else:
                levels.append(level_of(_blocks(recorded, height)))
        return levels


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


def _map(function: Callable[[P], R], panels: Iterable[P], matrices: _Matrices) -> list[R]:
    """Run a function on the panels of a matrix: on a CPU by workers of one thread each."""
    if matrices.base.device.type != "cpu":
        return [function(panel) for panel in panels]
    return map_parts(function, panels, matrices.base.numel())


def _rows(matrices: _Matrices, structure: Structure, values: Tensor, reported: bool) -> _Found:
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


def _kron(matrices: _Matrices, structure: Structure, values: Tensor, reported: bool) -> _Found:
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
    def of(cls, matrices: _Matrices, block: int, shares: Tensor) -> _WholeSide:
        """Return the side over the rows; each model's factors have mean eigenvalue 1 over the matrix."""
        factors = _factors(matrices, block)
        found = cls(factors, factors.new_zeros(factors.shape[1]), *map(torch.zeros_like, (factors[0], factors[1:])))

        def fill(panel: _Panel) -> None:
            where, height = panel.where, panel.height
            side = coupling.Side.of(_blocks(factors[:, where], height), shares)
            found.values[where] = side.values.flatten()
            found.vectors[where, :height] = side.vectors.flatten(0, 1)
            found.differences[:, where, :height] = side.differences.flatten(1, 2)

        _map(fill, _panels(len(found.values), block, block, factors.device), matrices)
        return found

    def part(self, panel: _Panel) -> coupling.Side:
        """Return the side of the blocks of a panel."""
        where, height = panel.where, panel.height
        return coupling.Side(
            _blocks(self.factors[:, where], height),
            self.values[where].reshape(-1, height),
            _blocks(self.vectors[where], height),
            _blocks(self.differences[:, where], height),
        )

    def ranks(self, block: int) -> Tensor:
        """Return :func:`rank_sums` of the blocks."""
        panels = _panels(len(self.values), block, block, self.values.device)
        return torch.stack([rank_sums(list(self.part(panel).factors)) for panel in panels]).sum(0)


def _factors(matrices: _Matrices, block: int) -> Tensor:
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


def _blocks(factor: Tensor, height: int) -> Tensor:
    """Return the factors of the blocks, ``[..., count, height, height]``."""
    return factor[..., :height].reshape(*factor.shape[:-2], -1, height, height)


def _sums(blocks: Tensor) -> Tensor:
    """Return the sum over each block, in float64."""
    return blocks.sum(-1, dtype=torch.promote_types(blocks.dtype, torch.float32)).sum(-1, dtype=torch.float64)


def _diagonal(part: _Matrices) -> Tensor:
    """Return the diagonal merge; the weighted mean where a model has no Fisher."""
    known = [fisher for fisher in part.fishers if fisher is not None]
    if len(known) < len(part.fishers):
        return equations.weighted_mean(part.thetas, part.weights)
    return equations.squisher(part.thetas, known, part.weights, part.scales).values
