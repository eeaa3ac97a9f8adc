"""Report of coupled merges: shares of the merged step, conflict of the models, effective rank of the factors.

With the task vectors ``d_i = W_i - W_0``, the merged step ``s = W - W_0`` and the Fishers ``F_i`` of the merge:

* The part of model i in s is ``p_i = F^-1 F_i d_i`` with ``F = sum_i F_i``; the parts sum to s. Its share is the
  projection of s on it in the inner product of F, ``<s, F p_i> / <s, F s> = <s, F_i d_i> / sum_j <s, F_j d_j>``. The
  shares sum to 1. A share is negative if the merged step goes against the model.
* The conflict is ``sum_i <W - W_i, F_i (W - W_i)> / sum_i <d_i, F_i d_i>``: the loss that the merge adds to the models,
  to second order, relative to the loss of the base. It is 0 for equal models, 1 if the models cancel out.
* The effective rank of a factor L of b rows is ``(tr L)^2 / ||L||_F^2``, from 1 to b.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.fisher.summary import by_number, layer_of

Quadratic = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StepReport:
    """Figures of one coupled matrix.

    Attributes:
        figures: ``<s, F_i d_i>``, ``<d_i, F_i d_i>`` and ``<W - W_i, F_i (W - W_i)>``, ``[3, models, blocks]``, for
            blocks of rows (of columns if only columns are coupled).
        ranks: Side, ``rows`` or ``columns``, -> :func:`rank_sums` over its blocks, ``[3, models]``.
        models: Positions of the models among the inputs of the merge.
    """

    figures: Tensor
    ranks: dict[str, Tensor]
    models: tuple[int, ...]


def step_figures(step: Tensor, task_vectors: Iterable[Tensor], fishers: Sequence[Quadratic]) -> Tensor:
    """Return ``<s, F_i d_i>``, ``<d_i, F_i d_i>`` and ``<s - d_i, F_i (s - d_i)>`` of each block.

    Args:
        step: s, blocks ``[..., b, c]``.
        task_vectors: d_i, shaped alike.
        fishers: Functions that return F_i times blocks.

    Returns:
        Figures in float64, ``[3, models, ...]``.

    Example:
        >>> step = torch.ones(1, 1, 2)
        >>> step_figures(step, [2 * step, 0 * step], [lambda blocks: blocks] * 2).squeeze(-1)
        tensor([[4., 0.],
                [8., 0.],
                [2., 2.]], dtype=torch.float64)
    """
    found = []
    for task_vector, fisher in zip(task_vectors, fishers, strict=True):
        image, rest = fisher(task_vector), step - task_vector
        found.append(torch.stack([_dot(step, image), _dot(task_vector, image), _dot(rest, fisher(rest))]))
    return torch.stack(found, 1)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(-1).sum(-1, dtype=torch.float64)


def rank_sums(factors: Sequence[Tensor]) -> Tensor:
    """Return sums over the blocks with a signal: rows times effective rank, rows times rows of a block, and rows.

    Args:
        factors: L_i, blocks ``[count, b, b]``.

    Returns:
        The sums in float64, ``[3, models]``.

    Example:
        >>> rank_sums([torch.eye(4)[None], torch.ones(1, 4, 4)])
        tensor([[16.,  4.],
                [16., 16.],
                [ 4.,  4.]], dtype=torch.float64)
    """
    found = []
    for factor in factors:
        size = factor.shape[-1]
        traces = factor.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
        known = traces > 0
        norms = torch.where(known, _dot(factor, factor), 1)
        counts = size * known.sum(dtype=torch.float64)
        found.append(torch.stack([size * (traces.square() / norms).sum(), size * counts, counts]))
    return torch.stack(found, 1)


@dataclass
class _StepTotals:
    """Sums of the figures of some matrices, by the name of the model; ``ranks``: side -> model -> :func:`rank_sums`."""

    pulls: dict[str, float] = field(default_factory=dict)
    sizes: float = 0.0
    misfits: float = 0.0
    ranks: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, labels: Sequence[str], one: StepReport) -> None:
        """Add the figures of one matrix."""
        pulls, sizes, misfits = one.figures.sum(-1).tolist()
        self.sizes += sum(sizes)
        self.misfits += sum(misfits)
        for place, pull in zip(one.models, pulls, strict=True):
            self.pulls[labels[place]] = self.pulls.get(labels[place], 0.0) + pull
        for side, sums in one.ranks.items():
            of_side = self.ranks.setdefault(side, {})
            for place, added in zip(one.models, sums.T.tolist(), strict=True):
                known = of_side.get(labels[place], [0.0] * 3)
                of_side[labels[place]] = [a + b for a, b in zip(known, added, strict=True)]


def structure_report(reports: Mapping[str, tuple[Sequence[str], StepReport]]) -> dict[str, Any]:
    """Return the report of all coupled matrices: over all, per layer and per tensor.

    Args:
        reports: Name of the tensor -> names of the inputs, and the figures.

    Returns:
        ``share`` of each model, ``conflict``, ``effective_rank`` by side and model with the mean rows of a block
        (``of``); ``layers`` and ``tensors`` have the same, tensors also the conflict of each block (``blocks``).
    """
    layers: dict[str, list[tuple[Sequence[str], StepReport]]] = {}
    for name in sorted(reports, key=by_number):
        layers.setdefault(layer_of(name), []).append(reports[name])
    return {
        **_summary(reports.values()),
        "layers": {layer: _summary(parts) for layer, parts in layers.items()},
        "tensors": {name: _summary([one]) | {"blocks": _conflicts(one[1])} for name, one in reports.items()},
    }


def _summary(parts: Iterable[tuple[Sequence[str], StepReport]]) -> dict[str, Any]:
    totals = _StepTotals()
    for labels, one in parts:
        totals.add(labels, one)
    total = sum(totals.pulls.values())
    return {
        "share": {label: pull / total if total > 0 else 0.0 for label, pull in totals.pulls.items()},
        "conflict": totals.misfits / totals.sizes if totals.sizes > 0 else 0.0,
        "effective_rank": {
            side: {label: rank / rows if rows else 0.0 for label, (rank, _, rows) in sums.items()}
            for side, sums in totals.ranks.items()
        },
        "of": {
            side: max(size / rows if rows else 0.0 for _, size, rows in sums.values())
            for side, sums in totals.ranks.items()
        },
    }


def _conflicts(one: StepReport) -> list[float]:
    """Return the conflict of each block."""
    _, sizes, misfits = one.figures.sum(1)
    conflicts: list[float] = (misfits / torch.where(sizes > 0, sizes, 1)).tolist()
    return conflicts


def structure_lines(report: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """Return the report as lines of text.

    Args:
        report: Report of :func:`structure_report`.
        columns: Model -> its letter.
    """

    def by_model(values: Mapping[str, float], form: str) -> str:
        return ", ".join(f"{columns[label]} {value:{form}}" for label, value in values.items())

    conflicts = {layer: one["conflict"] for layer, one in report["layers"].items()}
    worst = max(conflicts, key=lambda layer: conflicts[layer])
    lines = [
        f"merged step of {len(report['tensors'])} coupled matrices: {by_model(report['share'], '.1%')}",
        f"  conflict {report['conflict']:.1%}, by layer {min(conflicts.values()):.1%} to {conflicts[worst]:.1%} "
        f"({worst})",
    ]
    for side, ranks in report["effective_rank"].items():
        lines.append(f"  effective rank over {side}: {by_model(ranks, '.1f')}, of {report['of'][side]:.0f}")
    return lines
