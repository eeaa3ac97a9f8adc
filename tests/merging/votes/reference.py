"""Slow float64 references of the options of a vote: entry by entry, in plain Python."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def voted_reference(
    thetas: Sequence[Tensor],
    fishers: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None = None,
    *,
    masks: Sequence[Tensor | None] = (),
    power: float = 1.0,
    elected: bool = False,
    extent: float = 1.0,
) -> Tensor:
    """Return the merge of one tensor with all options; ``masks`` are of the entries whose model votes."""
    flat = [theta.double().flatten().tolist() for theta in thetas]
    information = [fisher.double().flatten().tolist() for fisher in fishers]
    kept = [[True] * len(flat[0]) if mask is None else mask.flatten().tolist() for mask in masks or [None] * len(flat)]
    origin = None if base is None else base.double().flatten().tolist()
    result = []
    for place in range(len(flat[0])):
        voters = [i for i, weight in enumerate(weights) if weight > 0 and kept[i][place]]
        most = max((information[i][place] for i in voters), default=0.0)
        votes = {i: weights[i] * (information[i][place] ** power if most else 1.0) for i in voters}
        start = 0.0 if origin is None else origin[place]
        steps = {i: flat[i][place] - start for i in voters}
        if elected:
            pull = math.fsum(votes[i] * steps[i] for i in voters)
            votes = {i: vote for i, vote in votes.items() if (steps[i] > 0 and pull > 0) or (steps[i] < 0 and pull < 0)}
        total = math.fsum(votes.values())
        value = start + math.fsum(vote * steps[i] for i, vote in votes.items()) / total if total else start
        result.append(start + extent * (value - start))
    return torch.tensor(result, dtype=torch.float64).reshape(thetas[0].shape)


def trimmed_to(theta: Tensor, base: Tensor, mask: Tensor) -> Tensor:
    """Return a weight that is the base's where a mask is False."""
    return torch.where(mask, theta.double(), base.double())


def score_of(by: str, theta: Tensor, base: Tensor, fisher: Tensor) -> Tensor:
    """Return the score of each entry in float64."""
    step = theta.double() - base.double()
    return {"fisher": fisher.double(), "change": fisher.double() * step**2, "magnitude": step.abs()}[by]


def mask_of(scores: Tensor, density: float, positive: bool = True) -> Tensor:
    """Return the mask of the entries with the largest scores, the first of equal ones, none of score 0."""
    values = scores.flatten().tolist()
    count = max(1, round(density * len(values)))
    chosen = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[chosen] = True
    return (mask & (scores.flatten() > 0) if positive else mask).reshape(scores.shape)


def drawn(count: int, shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Draw a base, weights and Fishers in which ties, zeros and opposite steps are frequent."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(-3, 4, shape, generator=generator).to(dtype) / 4
    thetas = [base + torch.randint(-2, 3, shape, generator=generator).to(dtype) / 8 for _ in range(count)]
    fishers = [torch.randint(0, 4, shape, generator=generator).float() for _ in range(count)]
    blank = torch.rand(*shape, generator=generator) < 0.1
    return {"base": base, "thetas": thetas, "fishers": [fisher.masked_fill(blank, 0) for fisher in fishers]}
