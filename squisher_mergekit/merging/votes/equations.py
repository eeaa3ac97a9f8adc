"""Merges with options of the vote, as pure functions of tensors: power, abstention, elected sign, lambda.

The conventions are those of :mod:`squisher_mergekit.merging.equations`. A mask of the kept entries takes a model's vote
away where it is False. With the default of every option those equations are used instead.

Numerics: only ratios of the Fishers of an entry count. They are divided by the power of two below the largest, which is
exact, so that equal and opposite votes cancel out exactly. Powers are taken of ratios in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from squisher_mergekit.merging import equations
from squisher_mergekit.merging.equations import Extremes, Merged, relative

# Products of a Fisher and a step stay within float32 where every Fisher is in this range.
_SAFE = (1e-24, 1e30)


def voted_mean(
    thetas: Sequence[Tensor],
    fishers: Sequence[Tensor],
    weights: Sequence[float],
    scales: Sequence[float],
    base: Tensor,
    *,
    kept: Sequence[Tensor | None] | None = None,
    power: float = 1.0,
    elected: bool = False,
    based: Tensor | None = None,
    extremes: Extremes | None = None,
) -> Merged:
    """Fisher merging of the models that vote: ``sum_i w_i F_i^p theta_i / sum_i w_i F_i^p`` over the voters.

    A model votes where its entry is kept and, with ``elected``, where ``sign(theta_i - theta_0)`` is the sign of
    ``sum_i w_i F_i^p (theta_i - theta_0)`` over the kept entries. Where all F that are kept are 0, w_i takes the place
    of ``w_i F_i^p`` in both. Where no model votes, the base value.

    Args:
        thetas: The models' weights.
        fishers: Their Fishers up to a factor, not negative, shaped like the weight.
        weights: w_i, not negative, not all 0.
        scales: One positive factor a model.
        base: theta_0.
        kept: For each model a mask (bool) of the entries where it votes, None for all.
        power: p, not negative; 0 gives the weighted mean.
        elected: Elect a sign.
        based: Mask (bool) of the entries that the base has, None for all; every model that keeps another entry votes.
        extremes: The smallest and the largest entry of each Fisher, if known.

    Returns:
        The merged weight. ``fell_back`` counts entries where models vote without information, ``sign_conflicts`` the
        kept entries of each model that move against the elected sign.

    Source: the election is that of TIES (Yadav et al., 2023), weighted by F; the powers are those of OTA-merge
    (Mahdavi et al., 2025).

    Example:
        >>> theta, one = [torch.tensor([2.0, 3.0]), torch.tensor([-1.0, 1.0])], torch.ones(2)
        >>> voted_mean(theta, [one, one], [1.0, 1.0], [1.0, 1.0], torch.zeros(2), elected=True).values
        tensor([2., 2.])
    """
    used = [i for i, weight in enumerate(weights) if weight > 0]
    masks = [None if kept is None else kept[i] for i in used]
    shown = [_masked(fishers[i], mask) for i, mask in zip(used, masks, strict=True)]
    known = [extremes[i] for i in used] if extremes and all(mask is None for mask in masks) else None
    rates, factors = relative([weights[i] for i in used]), [scales[i] for i in used]
    parts = _safe_votes(shown, rates, factors, known) if known and power == 1 else None
    blank = None
    if parts is None:
        blank = _largest(shown) == 0
        if elected and based is None:
            # A model without a step decides nothing, and its F must not make those of the others vanish.
            shown = [torch.where(thetas[i] == base, 0, fisher) for i, fisher in zip(used, shown, strict=True)]
        parts = _votes(shown, rates, factors, power, blank)
    if blank is not None:
        parts = [_masked(part, mask) for part, mask in zip(parts, masks, strict=True)]
        blank = blank & any_kept(masks, blank)
    voters, conflicts = masks, list[Tensor]()
    agreeing: Sequence[Tensor | None] = [None] * len(used)
    if elected:
        agreeing, conflicts = _agreeing(parts, [thetas[i] for i in used], base, masks, based)
        voters = list(agreeing)
    values, total, share = _running_mean(base, [thetas[i] for i in used], parts, agreeing, positive=blank is None)
    last = share.sum()
    voted = _sum_of_signs(torch.sign(total, out=share))
    silent = total.numel() - voted
    shares = _summed_shares(parts, agreeing, total, voted, last)
    if blank is not None:
        silent = silent - ((total <= torch.finfo(total.dtype).tiny) & blank).sum()
    merged = Merged(values, shares, _count(blank, base), voted=voters, sign_conflicts=conflicts)
    return _spread(merged, used, masks, len(weights), silent)


def powered_mean(
    thetas: Sequence[Tensor],
    fishers: Sequence[Tensor],
    weights: Sequence[float],
    scales: Sequence[float],
    power: float,
) -> Merged:
    """Fisher merging with powers of the Fishers: ``sum_i w_i F_i^p theta_i / sum_i w_i F_i^p``.

    Args:
        thetas: The models' weights.
        fishers: Their Fishers up to a factor, not negative.
        weights: w_i, not negative, not all 0.
        scales: One positive factor a model.
        power: p, not negative; 0 gives the weighted mean.

    Returns:
        The merged weight.

    Example:
        >>> theta = [torch.tensor([0.0]), torch.tensor([1.0])]
        >>> powered_mean(theta, [torch.tensor([1.0]), torch.tensor([9.0])], [1.0, 1.0], [1.0, 1.0], 0.5).values
        tensor([0.7500])
    """
    used = [i for i, weight in enumerate(weights) if weight > 0]
    ratios, blank = raised_power([fishers[i] for i in used], [scales[i] for i in used], power)
    placed = dict(zip(used, ratios, strict=True))
    every = [placed.get(i, ratios[0]) for i in range(len(weights))]
    return equations.squisher(thetas, every, weights, [1.0] * len(weights))._replace(fell_back=blank.sum())


def voted_step(
    base: Tensor,
    base_fisher: Tensor | None,
    thetas: Sequence[Tensor],
    fishers: Sequence[Tensor],
    weights: Sequence[float],
    scales: Sequence[float],
    base_scale: float = 1.0,
    *,
    kept: Sequence[Tensor | None] | None = None,
    power: float = 1.0,
    prior: Tensor | float = 0.0,
) -> Merged:
    """Gradient matching of the models that vote, with F^p for every F; see :func:`.equations.ubgm_squisher`.

    Args:
        base: theta_0.
        base_fisher: F_0 up to ``base_scale``; None for 0.
        thetas: The models' weights.
        fishers: Their Fishers up to a factor, not negative.
        weights: w_i, not negative, not all 0.
        scales: One positive factor a model.
        base_scale: The factor of ``base_fisher``.
        kept: For each model a mask (bool) of the entries where it votes, None for all.
        power: p, not negative.
        prior: d, in units of the p-th power of the largest scale (0-dim if a tensor).

    Returns:
        The merged weight.

    Example:
        >>> zero, one = torch.zeros(2), torch.ones(2)
        >>> mask = torch.tensor([True, False])
        >>> voted_step(zero, None, [one, 3 * one], [one, one], [1.0, 1.0], [1.0, 1.0], kept=[None, mask]).values
        tensor([2., 1.])
    """
    used = [i for i, weight in enumerate(weights) if weight > 0]
    masks = [None if kept is None else kept[i] for i in used]
    unit = max([scales[i] for i in used] + ([] if base_fisher is None else [base_scale]))
    own = [_masked(fishers[i], mask).double() * (scales[i] / unit) for i, mask in zip(used, masks, strict=True)]
    own += [] if base_fisher is None else [base_fisher.double() * (base_scale / unit)]
    largest = _largest(own)
    blank = largest == 0
    prior = torch.as_tensor(prior, dtype=torch.float64, device=base.device)
    # The Fisher that the prior amounts to.
    root = prior ** (1 / power) if power else torch.zeros_like(prior)
    largest = torch.where(blank, 1, torch.maximum(largest, root))
    raised = [(fisher / largest) ** power for fisher in own]
    common = (root / largest) ** power if power else prior.expand(base.shape)
    common = torch.where(prior > 0, common, 0)
    if base_fisher is not None:
        common = common + raised.pop()
    votes = [_masked(part * weights[i], mask) for i, part, mask in zip(used, raised, masks, strict=True)]
    total = common
    for vote in votes:
        total = total + vote
    values, shares = base, []
    for i, part, mask in zip(used, raised, masks, strict=True):
        share = _masked((part + common) / total * weights[i], mask)
        share = torch.where(blank, 0, share).to(base.dtype)
        values = torch.addcmul(values, share, thetas[i] - base)
        shares.append(share.sum())
    voting = any_kept(masks, blank)
    merged = Merged(values, shares, (blank & voting).sum(), voted=masks)
    return _spread(merged, used, masks, len(weights), (~voting).sum())


def extended(base: Tensor, values: Tensor, extent: float) -> Tensor:
    """Return ``theta_0 + lambda (theta - theta_0)``; lambda 1 returns the values themselves.

    Example:
        >>> extended(torch.zeros(2), torch.tensor([1.0, -2.0]), 1.5)
        tensor([ 1.5000, -3.0000])
    """
    return values if extent == 1 else torch.lerp(base, values, extent)


def raised_power(fishers: Sequence[Tensor], scales: Sequence[float], power: float) -> tuple[list[Tensor], Tensor]:
    """Return ``(F_i / u)^p`` of the scaled Fishers, u the power of two below the largest F of the entry.

    Returns:
        The powers, and the mask of the entries where all Fishers are 0.

    Example:
        >>> raised_power([torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0])], [1.0, 1.0], 0.5)
        ([tensor([0.5000, 0.0000]), tensor([1., 0.])], tensor([False,  True]))
    """
    unit = max(scales)
    scaled = [fisher.double() * (scale / unit) for fisher, scale in zip(fishers, scales, strict=True)]
    largest = _largest(scaled)
    blank = largest == 0
    unit_of_entry = torch.where(blank, 1, _power_of_two(largest))
    return [((part / unit_of_entry) ** power).to(fishers[0].dtype) for part in scaled], blank


def any_kept(masks: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Return the mask of the entries that at least one model keeps."""
    found = torch.zeros_like(like, dtype=torch.bool)
    for mask in masks:
        if mask is None:
            return torch.ones_like(found)
        found = found | mask
    return found


def information(
    fishers: Sequence[Tensor | None], factors: Sequence[float], voted: Sequence[Tensor | None]
) -> Tensor | None:
    """Return ``sum_i factor_i F_i`` over the models that vote, in float64; None without a Fisher.

    Example:
        >>> information([torch.ones(2), torch.ones(2)], [1.0, 2.0], [None, torch.tensor([True, False])])
        tensor([3., 1.], dtype=torch.float64)
    """
    total = None
    for fisher, factor, mask in zip(fishers, factors, voted, strict=True):
        if fisher is not None:
            part = _masked(fisher.double() * factor, None if mask is None else mask > 0)
            total = part if total is None else total + part
    return total


def _safe_votes(
    fishers: Sequence[Tensor], rates: Sequence[float], scales: Sequence[float], extremes: Extremes
) -> list[Tensor] | None:
    """Return ``w_i F_i`` up to a common factor; None if a product of it and a step could leave float32."""
    coefficients = relative([rate * scale for rate, scale in zip(rates, scales, strict=True)])
    lowest = min(low * c for (low, _), c in zip(extremes, coefficients, strict=True))
    if 0 < lowest < _SAFE[0]:
        # A power of two, so that equal and opposite votes still cancel out exactly.
        factor = 2.0 ** math.ceil(math.log2(_SAFE[0] / lowest))
        coefficients = [c * factor for c in coefficients]
        lowest *= factor
    highest = max(high * max(c, 1.0) for (_, high), c in zip(extremes, coefficients, strict=True))
    if lowest < _SAFE[0] or highest > _SAFE[1] or max(coefficients) > _SAFE[1]:
        return None
    return [_times(fisher, c) for fisher, c in zip(fishers, coefficients, strict=True)]


def _votes(
    fishers: Sequence[Tensor], rates: Sequence[float], scales: Sequence[float], power: float, blank: Tensor
) -> list[Tensor]:
    """Return ``w_i F_i^p`` up to a factor of the entry, w_i where ``blank`` is True."""
    if power == 1:
        coefficients = relative([rate * scale for rate, scale in zip(rates, scales, strict=True)])
        unit = _power_of_two(_largest(fishers))
        parts = [_times(fisher / unit, c) for fisher, c in zip(fishers, coefficients, strict=True)]
    else:
        ratios, _ = raised_power(fishers, scales, power)
        parts = [ratio * rate for ratio, rate in zip(ratios, rates, strict=True)]
    return [torch.where(blank, rate, part) for rate, part in zip(rates, parts, strict=True)]


def _power_of_two(values: Tensor) -> Tensor:
    """Return the power of two below each number, at least the smallest normal one."""
    whole, exponent = (torch.int64, 0x7FF << 52) if values.dtype == torch.float64 else (torch.int32, 0x7F800000)
    return (values.view(whole) & exponent).view(values.dtype).clamp_min(torch.finfo(values.dtype).tiny)


def _agreeing(
    parts: Sequence[Tensor],
    thetas: Sequence[Tensor],
    base: Tensor,
    masks: Sequence[Tensor | None],
    based: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return where each model agrees with the elected sign, as 0 and 1, and its sign conflicts.

    The sign conflicts of a model are the number of its kept entries that move against the elected sign.
    """
    steps = [theta - base for theta in thetas]
    pull = parts[0] * steps[0]
    for part, step in zip(parts[1:], steps[1:], strict=True):
        pull.addcmul_(part, step)
    elected = pull.sign_()
    agreeing, conflicts = [], []
    for step, mask in zip(steps, masks, strict=True):
        # Numbers -1, 0 and 1 in place of masks: all of this stays in vector instructions.
        signs = step.mul_(elected).sign_()
        signs = signs if based is None else torch.where(based, signs, 1)
        signs = signs if mask is None else signs.mul_(mask)
        balance = _sum_of_signs(signs)
        agreeing.append(signs.clamp_min_(0))
        conflicts.append((_sum_of_signs(agreeing[-1]) - balance).long())
    return agreeing, conflicts


def _running_mean(
    base: Tensor,
    thetas: Sequence[Tensor],
    parts: Sequence[Tensor],
    agreeing: Sequence[Tensor | None],
    positive: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean of the weights by the votes of the agreeing models, the sum of the votes, and the last share.

    Each model moves the mean of those before it by its share of the votes so far, beginning at the base. Buffers are
    used again, as a new one is cold in the cache. ``positive``: all parts are above 0.
    """
    tiny, agrees = torch.finfo(base.dtype).tiny, agreeing[0]
    total = parts[0].clone() if agrees is None else parts[0] * agrees
    share = agrees.clone() if positive and agrees is not None else total / total.clamp_min(tiny)
    values, vote = torch.lerp(base, thetas[0], share), None
    for theta, part, agrees in zip(thetas[1:], parts[1:], agreeing[1:], strict=True):
        vote = part if agrees is None else torch.mul(part, agrees, out=vote)
        share = torch.div(vote, torch.clamp_min(total.add_(vote), tiny, out=share), out=share)
        values.lerp_(theta, share)
    return values, total, share


def _summed_shares(
    parts: Sequence[Tensor], agreeing: Sequence[Tensor | None], total: Tensor, voted: Tensor, last: Tensor
) -> list[Tensor]:
    """Return the sum of each model's shares, which all sum to ``voted``; clamp ``total`` in place."""
    if len(parts) == 1:
        return [last]
    total.clamp_min_(torch.finfo(total.dtype).tiny)
    inner = [
        part if agrees is None else part * agrees for part, agrees in zip(parts[1:-1], agreeing[1:-1], strict=True)
    ]
    shares = [*((vote / total).sum() for vote in inner), last]
    return [voted - sum(shares[1:], start=shares[0]), *shares]


def _sum_of_signs(signs: Tensor) -> Tensor:
    """Return the exact sum; float32 counts up to 2^24."""
    return signs.sum(dtype=torch.float64 if signs.numel() > 1 << 24 else signs.dtype)


def _spread(merged: Merged, used: Sequence[int], masks: Sequence[Tensor | None], count: int, silent: Tensor) -> Merged:
    """Return the merge with one number for each model, 0 for a model of weight 0."""
    zero = torch.zeros_like(merged.shares[0])
    nothing = merged.values.new_zeros((), dtype=torch.int64)
    shares, voted = dict(zip(used, merged.shares, strict=True)), dict(zip(used, merged.voted, strict=True))
    conflicts = dict(zip(used, merged.sign_conflicts, strict=False))
    counts = {i: nothing if mask is None else mask.numel() - mask.sum() for i, mask in zip(used, masks, strict=True)}
    return merged._replace(
        shares=[shares.get(i, zero) for i in range(count)],
        abstained=[counts.get(i, nothing) for i in range(count)],
        silent=silent,
        voted=[voted.get(i) for i in range(count)],
        sign_conflicts=[conflicts.get(i, nothing) for i in range(count)] if conflicts else [],
    )


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    largest = tensors[0]
    for tensor in tensors[1:]:
        largest = torch.maximum(largest, tensor)
    return largest


def _masked(tensor: Tensor, mask: Tensor | None) -> Tensor:
    return tensor if mask is None else torch.where(mask, tensor, 0)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor * factor


def _count(blank: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros((), dtype=torch.int64) if blank is None else blank.sum()
