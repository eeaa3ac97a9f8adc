"""Matrices of a coupled merge, whole or cut into blocks of rows and tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from squisher_mergekit.merging import equations
from squisher_mergekit.merging.coupling import equations as coupling
from squisher_mergekit.merging.coupling.recorded import level_of, normalised, rows_of
from squisher_mergekit.merging.inputs import Input


@dataclass(frozen=True)
class Matrices:
    """Base, weights and Fishers of the models in use, as ``[out, in]``.

    Attributes:
        base: W_0.
        thetas: The weights.
        fishers: The Fishers; None for a model without.
        weights: w_i.
        scales: Factor on each Fisher.
        work: dtype of the arithmetic.
        recorded: Recorded factors over the rows and over the columns, one a model: row -> its row in its block.
    """

    base: Tensor
    thetas: tuple[Tensor, ...]
    fishers: tuple[Tensor | None, ...]
    weights: tuple[float, ...]
    scales: tuple[float, ...]
    work: torch.dtype
    recorded: tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]

    @classmethod
    def of(cls, base: Tensor, inputs: Sequence[Input], turned: bool, block: int) -> Matrices:
        """Return the matrices of some inputs, or with ``turned`` their transposes."""
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
        """Shape of each matrix."""
        return self.base.shape

    @property
    def turned(self) -> Matrices:
        """The transposes."""
        return replace(self._each(lambda matrix: matrix.mT), recorded=self.recorded[::-1])

    @property
    def steps(self) -> Iterator[Tensor]:
        """The task vectors, one at a time."""
        return (theta - self.base for theta in self.thetas)

    def part(self, *where: slice) -> Matrices:
        """Return a part, in the dtype of the arithmetic."""
        rows, columns = self.recorded
        recorded = tuple(None if factor is None else factor[where[0]] for factor in rows), columns
        return replace(self._each(lambda matrix: matrix[where].to(self.work)), recorded=recorded)

    def blocks(self, height: int) -> Matrices:
        """Return the blocks of ``height`` rows, as batches ``[count, height, in]``."""
        return self._each(lambda matrix: matrix.reshape(-1, height, matrix.shape[-1]))

    def tiles(self, height: int, width: int) -> Matrices:
        """Return the tiles, as batches ``[rows, columns, height, width]``."""

        def cut(matrix: Tensor) -> Tensor:
            rows, columns = matrix.shape
            return matrix.reshape(rows // height, height, columns // width, width).transpose(1, 2)

        return self._each(cut)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Matrices:
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
        traces = torch.stack([sums_of(fisher) for fisher in known])
        blank = traces.sum(0) == 0
        scales = torch.tensor(equations.relative(self.scales), dtype=torch.float64, device=rates.device)
        found = mean if uniform else coupling.shares_by_trace(traces, rates / rates.max() * scales)
        return torch.where(blank, mean, found), blank

    def row_factors(self) -> list[Tensor]:
        """Return each model's factors over the rows of the blocks: the recorded ones, else those of d and v."""
        height = self.base.shape[-2]
        return [
            coupling.row_factor(step, fisher) if recorded is None else normalised(in_blocks(recorded, height))
            for step, fisher, recorded in zip(self.steps, self.fishers, self.recorded[0], strict=True)
        ]

    def row_levels(self) -> list[Tensor]:
        """Return the mean eigenvalue of each model's factors before :meth:`row_factors` divides them by it."""
        height, levels = self.base.shape[-2], []
        for step, fisher, recorded in zip(self.steps, self.fishers, self.recorded[0], strict=True):
            if recorded is None:
                power = step.square() if fisher is None else fisher
                levels.append(sums_of(power) / height)
            else:
                levels.append(level_of(in_blocks(recorded, height)))
        return levels


def in_blocks(factor: Tensor, height: int) -> Tensor:
    """Return the factors of the blocks, ``[..., count, height, height]``."""
    return factor[..., :height].reshape(*factor.shape[:-2], -1, height, height)


def sums_of(blocks: Tensor) -> Tensor:
    """Return the sum over each block, in float64."""
    return blocks.sum(-1, dtype=torch.promote_types(blocks.dtype, torch.float32)).sum(-1, dtype=torch.float64)
