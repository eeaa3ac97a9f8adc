"""Prior of gradient matching: d, relative to the mean over a tensor of all Fishers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from squisher_mergekit.merging.inputs import Input

_CHUNK = 1 << 18


def absolute_prior(base: Input, inputs: Sequence[Input], prior: float) -> Tensor | float:
    """Return d in the units of the scaled Fishers, summed in float64, without waiting for an accelerator."""
    if prior == 0:
        return 0.0
    parts = [(item.fisher, item.scale * item.weight) for item in inputs] + [(base.fisher, base.scale)]
    sums = [fisher.sum(dtype=torch.float64) * factor for fisher, factor in parts if fisher is not None]
    return prior * torch.stack(sums).sum() / max(base.theta.numel(), 1)


def powered_prior(base: Input, inputs: Sequence[Input], prior: float, power: float, unit: float) -> Tensor | float:
    """Return d where every F is raised to a power, in units of that power of ``unit``."""
    if prior == 0:
        return 0.0
    parts = [(item.fisher, item.scale, item.weight) for item in inputs] + [(base.fisher, base.scale, 1.0)]
    sums = [
        ((block.double() * (scale / unit)) ** power).sum() * weight
        for fisher, scale, weight in parts
        if fisher is not None and weight > 0
        for block in torch.split(fisher.reshape(-1), _CHUNK)
    ]
    return prior * torch.stack(sums).sum() / base.theta.numel() if sums else 0.0
