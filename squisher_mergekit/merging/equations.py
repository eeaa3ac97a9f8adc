"""The two merges as pure functions of tensors.

All tensors of a call have one shape (called *weight* below) and one floating dtype, float32 or float64; the
functions allocate what they return and change nothing. They never look at a value on the host, so that they run on
an accelerator without synchronisation and can be compiled into one pass; ``positive`` is the one exception, a promise
of the caller's that saves the work for entries without information.

Numerics: the Fisher of an entry can be anything in {0} or 1e-38 to 1e+30, so each F is divided by the largest F of
that entry over the models before anything is multiplied. Factors on a whole model's F (bias correction, number of
examples) are given apart, as ``scales``, and used only on those ratios.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

_TINY = 1e-37


class Merged(NamedTuple):
    """A merged tensor, and how it came about.

    ``values``: the merge, shaped like the weight. ``shares``: one number a model (0-dim tensors), the sum over the
    entries of the coefficient with which the model (in UBGM: its difference to the base) entered. ``fell_back``: the
    number of entries (0-dim) where no model had information.
    """

    values: Tensor
    shares: list[Tensor]
    fell_back: Tensor


def squisher(
    thetas: Sequence[Tensor],
    fishers: Sequence[Tensor],
    weights: Sequence[float],
    scales: Sequence[float],
    positive: bool = False,
) -> Merged:
    """Fisher merging: ``sum_i w_i F_i theta_i / sum_i w_i F_i`` with ``F_i = scales_i * fishers_i``.

    Where that denominator is 0, the weighted mean ``sum_i w_i theta_i / sum_i w_i``. The result lies between the
    smallest and the largest input of each entry.

    Args:
        thetas: The models' weights.
        fishers: Their Fishers up to a factor, not negative, shaped like the weight.
        weights: w_i, not negative, not all 0.
        scales: One positive factor a model.
        positive: Promise that in every entry some ``fishers_i`` with ``w_i > 0`` is positive.

    Returns:
        The merged weight.

    Source: Eq. 13 of "Fishers for Free?" (Li et al., ICML 2025); Matena and Raffel, 2022.

    Example:
        >>> theta = [torch.tensor([0.0, 2.0]), torch.tensor([1.0, 4.0])]
        >>> fisher = [torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0])]
        >>> squisher(theta, fisher, weights=[1.0, 1.0], scales=[1.0, 1.0]).values
        tensor([0.7500, 3.0000])
    """
    used = [i for i, weight in enumerate(weights) if weight > 0]
    values, shares, fell_back = fisher_mean(
        [thetas[i] for i in used],
        [fishers[i] for i in used],
        relative([weights[i] for i in used]),
        relative([weights[i] * scales[i] for i in used]),
        positive,
    )
    low, high = bounds(thetas)
    return Merged(values.clamp_(low, high), _spread(shares, used, len(weights)), fell_back)


def ubgm_squisher(
    base: Tensor,
    base_fisher: Tensor | None,
    thetas: Sequence[Tensor],
    fishers: Sequence[Tensor],
    weights: Sequence[float],
    scales: Sequence[float],
    base_scale: float = 1.0,
    prior: Tensor | float = 0.0,
) -> Merged:
    """Gradient matching: ``theta_0 + (F_0 + d + sum_i w_i F_i)^-1 sum_i w_i (F_0 + d + F_i) (theta_i - theta_0)``.

    Where ``F_0 + sum_i w_i F_i`` is 0, the base value ``theta_0``.

    Args:
        base: theta_0.
        base_fisher: F_0 up to ``base_scale``; None for 0.
        thetas: The models' weights.
        fishers: Their Fishers up to a factor, not negative.
        weights: w_i, not negative, not all 0.
        scales: One positive factor a model.
        base_scale: The factor of ``base_fisher``.
        prior: d, in the units of the scaled Fishers (0-dim if a tensor).

    Returns:
        The merged weight.

    Source: Section 3.2 of "Fishers for Free?" (Li et al., ICML 2025); Daheim et al., 2024.

    Example:
        >>> zero, one = torch.zeros(2), torch.ones(2)
        >>> ubgm_squisher(zero, None, [one, 3 * one], [one, one], weights=[1.0, 1.0], scales=[1.0, 1.0]).values
        tensor([2., 2.])
    """
    used = [i for i, weight in enumerate(weights) if weight > 0]
    unit = max([scales[i] for i in used] + ([base_scale] if base_fisher is not None else []))
    values, shares, fell_back = matched_step(
        base,
        base_fisher,
        [thetas[i] for i in used],
        [fishers[i] for i in used],
        [max(weights[i], _TINY) for i in used],
        [scales[i] / unit for i in used],
        base_scale / unit,
        torch.as_tensor(prior, dtype=torch.float64) / unit,
    )
    return Merged(values, _spread(shares, used, len(weights)), fell_back)


Factor: TypeAlias = float | Tensor


def fisher_mean(
    thetas: Sequence[Tensor],
    fishers: Sequence[Tensor],
    weights: Sequence[Factor],
    coefficients: Sequence[Factor],
    positive: bool,
) -> Merged:
    """The heart of :func:`squisher`: all w_i are positive, ``coefficients`` are ``w_i scales_i`` up to a factor."""
    largest = _largest(fishers)
    parts = [fisher / largest for fisher in fishers]
    if not all(isinstance(c, float) and c == 1.0 for c in coefficients):
        parts = [part.mul_(c) for part, c in zip(parts, coefficients, strict=True)]
    if positive:
        fell_back = largest.new_zeros((), dtype=torch.int64)
    else:
        blank = largest == 0
        parts = [torch.where(blank, weight, part) for part, weight in zip(parts, weights, strict=True)]
        fell_back = blank.sum()
    inverse = _sum(parts).reciprocal_()
    parts = [part.mul_(inverse) for part in parts]
    values = parts[0] * thetas[0]
    for part, theta in zip(parts[1:], thetas[1:], strict=True):
        values.addcmul_(part, theta)
    shares = [part.sum() for part in parts[1:]]
    first = values.numel() - _sum(shares) if shares else values.new_full((), values.numel())
    return Merged(values, [first, *shares], fell_back)


def matched_step(
    base: Tensor,
    base_fisher: Tensor | None,
    thetas: Sequence[Tensor],
    fishers: Sequence[Tensor],
    weights: Sequence[Factor],
    scales: Sequence[Factor],
    base_scale: Factor,
    prior: Tensor,
) -> Merged:
    """The heart of :func:`ubgm_squisher`: all w_i are positive, the factors are relative to the largest of them."""
    largest = _largest([*fishers, *([] if base_fisher is None else [base_fisher])])
    blank = largest == 0
    # In units of the entry's largest F, or of the prior where that is larger still.
    prior = prior.to(largest.dtype)
    largest = torch.where(blank, 1.0, torch.maximum(largest, prior))
    common = prior / largest
    if base_fisher is not None:
        common = common + (base_fisher / largest) * base_scale
    own = [(fisher / largest).mul_(scale) for fisher, scale in zip(fishers, scales, strict=True)]
    total = common + _sum([part * weight for part, weight in zip(own, weights, strict=True)])
    inverse = torch.where(blank, 0.0, total.reciprocal_())
    parts = [part.add_(common).mul_(inverse).mul_(w) for part, w in zip(own, weights, strict=True)]
    step = parts[0] * (thetas[0] - base)
    for part, theta in zip(parts[1:], thetas[1:], strict=True):
        step.addcmul_(part, theta - base)
    return Merged(base + step, [part.sum() for part in parts], blank.sum())


def weighted_mean(thetas: Sequence[Tensor], weights: Sequence[float], base: Tensor | None = None) -> Tensor:
    """What stands in for a merge where a Fisher is missing: ``sum_i w_i theta_i / sum_i w_i``.

    With a base, ``theta_0 + sum_i w_i (theta_i - theta_0) / sum_i w_i``, which is the same up to rounding.

    Args:
        thetas: The models' weights.
        weights: w_i, not negative, not all 0.
        base: theta_0.

    Returns:
        The mean, shaped like the weight.
    """
    origin = torch.zeros_like(thetas[0]) if base is None else base
    total = sum(weights)
    mean = _sum([(theta - origin) * (w / total) for theta, w in zip(thetas, weights, strict=True)]) + origin
    low, high = bounds(thetas)
    return mean.clamp_(low, high)


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    largest = tensors[0]
    for tensor in tensors[1:]:
        largest = torch.maximum(largest, tensor)
    return largest


def bounds(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest input of each entry."""
    low = tensors[0]
    for tensor in tensors[1:]:
        low = torch.minimum(low, tensor)
    return low, _largest(tensors)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0].clone()
    total = tensors[0] + tensors[1]
    for tensor in tensors[2:]:
        total.add_(tensor)
    return total


def _spread(shares: Sequence[Tensor], used: Sequence[int], count: int) -> list[Tensor]:
    spread = [torch.zeros_like(shares[0]) for _ in range(count)]
    for i, share in zip(used, shares, strict=True):
        spread[i] = share
    return spread


def relative(factors: Sequence[float]) -> list[float]:
    """Return the factors divided by the largest of them, none so small that float32 would make it 0."""
    largest = max(factors)
    return [max(factor / largest, _TINY) for factor in factors]
