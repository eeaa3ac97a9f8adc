"""The two merges as pure functions of tensors.

All tensors of a call have one shape (called *weight* below) and one floating dtype, float32 or float64; the
functions allocate what they return and change nothing. They never look at a value on the host, so that they run on
an accelerator without synchronisation and can be compiled into one pass.

Numerics: the Fisher of an entry can be anything in {0} or 1e-38 to 1e+30, so each F is divided by the largest F of
that entry over the models before anything is multiplied. Factors on a whole model's F (bias correction, number of
examples) are given apart, as ``scales``, and used only on those ratios. A caller that knows the ``extremes`` of the
Fishers saves half of the time where they show that the sums are safe as they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

_TINY = 1e-37
_NORMAL = (1e-30, 1e30)

Extremes: TypeAlias = Sequence[tuple[float, float]]
Factor: TypeAlias = float | Tensor


class Merged(NamedTuple):
    """A merged tensor, and how it came about.

    ``values``: the merge, shaped like the weight. ``shares``: one number a model (0-dim tensors), the sum over the
    entries of the coefficient with which the model (in UBGM: its difference to the base) entered. ``fell_back``: the
    number of entries (0-dim) where no model had information. Where models can be without a vote, ``abstained`` is the
    number of entries that each of them does not keep, ``sign_conflicts`` that of its kept entries that move against an
    elected sign, ``silent`` the number of entries without any vote, and ``voted`` the mask of each model's votes, None
    for all entries.
    """

    values: Tensor
    shares: list[Tensor]
    fell_back: Tensor
    abstained: Sequence[Tensor] = ()
    silent: Tensor | int = 0
    voted: Sequence[Tensor | None] = ()
    sign_conflicts: Sequence[Tensor] = ()


def squisher(
    thetas: Sequence[Tensor],
    fishers: Sequence[Tensor],
    weights: Sequence[float],
    scales: Sequence[float],
    extremes: Extremes | None = None,
) -> Merged:
    """Fisher merging: ``sum_i w_i F_i theta_i / sum_i w_i F_i`` with ``F_i = scales_i * fishers_i``.

    Where that denominator is 0, the weighted mean ``sum_i w_i theta_i / sum_i w_i``. The result lies between the
    smallest and the largest input of each entry.

    Args:
        thetas: The models' weights.
        fishers: Their Fishers up to a factor, not negative, shaped like the weight.
        weights: w_i, not negative, not all 0.
        scales: One positive factor a model.
        extremes: The smallest and the largest entry of each Fisher, if known.

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
    coefficients = dict(zip(used, relative([weights[i] * scales[i] for i in used]), strict=True))
    anchor = _anchor([(*extremes[i], coefficients[i]) for i in used]) if extremes else None
    if anchor is not None:
        used.insert(0, used.pop(anchor))
    merged = fisher_mean(
        [thetas[i] for i in used],
        [fishers[i] for i in used],
        relative([weights[i] for i in used]),
        [coefficients[i] for i in used],
        anchor is not None,
    )
    return merged._replace(shares=_spread(merged.shares, used, len(weights)))


def ubgm_squisher(
    base: Tensor,
    base_fisher: Tensor | None,
    thetas: Sequence[Tensor],
    fishers: Sequence[Tensor],
    weights: Sequence[float],
    scales: Sequence[float],
    base_scale: float = 1.0,
    prior: Tensor | float = 0.0,
    extremes: Extremes | None = None,
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
        extremes: The smallest and the largest entry of each of ``fishers``, then of ``base_fisher``, if known; on an
            accelerator this looks at a ``prior`` that is a tensor.

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
    rates = [max(weights[i], _TINY) for i in used]
    factors = [scales[i] / unit for i in used]
    anchor = None
    if extremes and float(prior / unit) <= _NORMAL[1]:
        known = [(*extremes[i], rate * factor) for i, rate, factor in zip(used, rates, factors, strict=True)]
        anchor = _anchor(known + ([(*extremes[-1], base_scale / unit)] if base_fisher is not None else []))
    merged = matched_step(
        base,
        base_fisher,
        [thetas[i] for i in used],
        [fishers[i] for i in used],
        rates,
        factors,
        base_scale / unit,
        prior / unit,
        anchor is not None,
    )
    return merged._replace(shares=_spread(merged.shares, used, len(weights)))


def _anchor(models: Sequence[tuple[float, float, float]]) -> int | None:
    """Return which of (smallest F, largest F, factor) has a product safely above 0, if no sum can overflow."""
    least = [low * factor for low, _, factor in models]
    best = max(range(len(models)), key=least.__getitem__)
    greatest = max(high * max(factor, 1.0) for _, high, factor in models)
    return best if least[best] >= _NORMAL[0] and greatest <= _NORMAL[1] else None


def fisher_mean(
    thetas: Sequence[Tensor],
    fishers: Sequence[Tensor],
    weights: Sequence[Factor],
    coefficients: Sequence[Factor],
    normal: bool,
) -> Merged:
    """The heart of :func:`squisher`: all w_i are positive, ``coefficients`` are ``w_i scales_i`` up to a factor.

    A running mean: each model moves the mean of those before it by its share of the information so far, and no
    entry can leave the range of its inputs. ``normal``: the first model's product is safely above 0 in every entry.
    """
    blank = None
    if not normal:
        largest = _largest(fishers)
        blank = largest == 0
        fishers = [fisher / largest for fisher in fishers]
    parts = [_times(fisher, c) for fisher, c in zip(fishers, coefficients, strict=True)]
    if blank is not None:
        parts = [torch.where(blank, weight, part) for part, weight in zip(parts, weights, strict=True)]
    fell_back = _count(blank, thetas[0])
    if len(parts) == 1:
        return Merged(thetas[0].clone(), [thetas[0].new_full((), thetas[0].numel())], fell_back)
    values, total = thetas[0], parts[0]
    for theta, part in zip(thetas[1:], parts[1:], strict=True):
        total = total + part
        share = part / (total if normal else total.clamp_min(_TINY))
        values = torch.lerp(values, theta, share)
    shares = [*((part / total).sum() for part in parts[1:-1]), share.sum()]
    return Merged(values, [values.numel() - _sum(shares), *shares], fell_back)


def matched_step(
    base: Tensor,
    base_fisher: Tensor | None,
    thetas: Sequence[Tensor],
    fishers: Sequence[Tensor],
    weights: Sequence[Factor],
    scales: Sequence[Factor],
    base_scale: Factor,
    prior: Factor,
    normal: bool,
) -> Merged:
    """The heart of :func:`ubgm_squisher`: all w_i are positive, the factors are relative to the largest of them.

    ``normal``: the sum of all Fishers is safely above 0 in every entry.
    """
    blank = None
    if not normal:
        # In units of the entry's largest F, or of the prior where that is larger still.
        largest = _largest([*fishers, *([] if base_fisher is None else [base_fisher])])
        blank = largest == 0
        prior = torch.as_tensor(prior, dtype=largest.dtype, device=largest.device)
        largest = torch.where(blank, 1.0, torch.maximum(largest, prior))
        prior = prior / largest
        fishers = [fisher / largest for fisher in fishers]
        base_fisher = None if base_fisher is None else base_fisher / largest
    common = prior if base_fisher is None else _plus(_times(base_fisher, base_scale), prior)
    own = [_times(fisher, scale) for fisher, scale in zip(fishers, scales, strict=True)]
    total = _plus(_sum([_times(part, weight) for part, weight in zip(own, weights, strict=True)]), common)
    values, shares = base, []
    for theta, part, weight in zip(thetas, own, weights, strict=True):
        share = _times(_plus(part, common) / total, weight)
        share = share if blank is None else torch.where(blank, 0.0, share)
        values = torch.addcmul(values, share, theta - base)
        shares.append(share.sum())
    return Merged(values, shares, _count(blank, base))


def weighted_mean(thetas: Sequence[Tensor], weights: Sequence[float], base: Tensor | None = None) -> Tensor:
    """Return the weighted mean, the merge of a tensor without Fishers: ``sum_i w_i theta_i / sum_i w_i``.

    With a base, ``theta_0 + sum_i w_i (theta_i - theta_0) / sum_i w_i``, which is the same up to rounding.

    Args:
        thetas: The models' weights.
        weights: w_i, not negative, not all 0.
        base: theta_0.

    Returns:
        The mean, shaped like the weight.
    """
    total, used = sum(weights), [(theta, w) for theta, w in zip(thetas, weights, strict=True) if w > 0]
    if base is None:
        mean = _sum([theta * (w / total) for theta, w in used])
    else:
        # No step where both are equal, which they can be at infinity, as in the buffer of a mask.
        mean = _sum([torch.where(theta == base, 0, theta - base) * (w / total) for theta, w in used]) + base
    low, high = bounds([theta for theta, _ in used])
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
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _times(tensor: Tensor, factor: Factor) -> Tensor:
    return tensor if isinstance(factor, float) and factor == 1.0 else tensor * factor


def _plus(tensor: Tensor, term: Factor) -> Tensor:
    return tensor if isinstance(term, float) and term == 0.0 else tensor + term


def _count(blank: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros((), dtype=torch.int64) if blank is None else blank.sum()


def _spread(shares: Sequence[Tensor], used: Sequence[int], count: int) -> list[Tensor]:
    found = dict(zip(used, shares, strict=True))
    return [found[i] if i in found else torch.zeros_like(shares[0]) for i in range(count)]


def relative(factors: Sequence[float]) -> list[float]:
    """Return the factors divided by the largest of them, none so small that float32 would make it 0."""
    largest = max(factors)
    return [max(factor / largest, _TINY) for factor in factors]
