"""How two Fishers agree, tensor by tensor and over all entries; one tensor of each is in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.fisher.config import Scaling
from squisher_mergekit.fisher.mapping import Fisher, Moments, check_values
from squisher_mergekit.fisher.summary import FIRST_DECADE, LAST_DECADE, known_scaling

SAMPLE = 10_000_000
SEED = 0
BINS_PER_DECADE = 20


@dataclass(frozen=True)
class Agreement:
    """How two Fishers A and B agree over some entries; None where a number is not defined.

    ``spearman``: rank correlation, ties at their average rank. ``log_correlation``: correlation of log F over entries
    that are positive in both. ``ratio``: mean of A over mean of B. ``factor``: the median of ``max(A/B, B/A)`` over
    entries that are positive in both: half of them differ by less. ``zeros_a``, ``zeros_b``: shares of zeros.
    """

    entries: int
    spearman: float | None
    log_correlation: float | None
    ratio: float | None
    factor: float | None
    zeros_a: float
    zeros_b: float


@dataclass(frozen=True)
class Row(Agreement):
    """The agreement over one tensor."""

    name: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two Fishers, compared over the tensors that both have.

    ``sample``: over how many entries ``over_all.spearman`` and ``over_all.factor`` are; all if it equals
    ``over_all.entries``. ``histogram``: number of entries that are positive in both, by log10 A (rows) and log10 B
    (columns), ``BINS_PER_DECADE`` a decade from ``FIRST_DECADE``. ``zeros``: number of entries that are 0 in A alone,
    in B alone, and in both.
    """

    rows: tuple[Row, ...]
    over_all: Agreement
    sample: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    scaling: Scaling
    histogram: Tensor = field(repr=False)
    zeros: tuple[int, int, int] = (0, 0, 0)


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Return the rank correlation of two tensors: the correlation of their ranks, ties at their average rank.

    Args:
        a: Any shape, no NaN.
        b: As many entries.

    Returns:
        From -1 to 1, in float64; None for fewer than two entries or where all entries of one are equal.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 10.0, 100.0, 50.0]))
        0.8
    """
    return pearson(average_ranks(a), average_ranks(b))


def average_ranks(values: Tensor) -> Tensor:
    """Return the rank of each entry from 1, equal entries at the mean of theirs, flat and in float64.

    Example:
        >>> average_ranks(torch.tensor([5.0, 0.0, 5.0]))
        tensor([2.5000, 1.0000, 2.5000], dtype=torch.float64)
    """
    ordered, order = values.reshape(-1).sort()
    _, lengths = torch.unique_consecutive(ordered, return_counts=True)
    ranks = torch.empty_like(ordered, dtype=torch.float64)
    del ordered
    middles = lengths.cumsum(0).to(torch.float64).sub_(lengths.sub(1), alpha=0.5)
    return ranks.scatter_(0, order, middles if len(middles) == len(order) else middles.repeat_interleave(lengths))


def pearson(a: Tensor, b: Tensor) -> float | None:
    """Return the correlation of two flat tensors in float64; None where one does not vary.

    Example:
        >>> pearson(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, -1.0]))
        -1.0
    """
    sums = _Products()
    for start in range(0, a.numel(), Moments.BLOCK):
        sums.add(a[start : start + Moments.BLOCK], b[start : start + Moments.BLOCK])
    return sums.correlation


def common(a: Fisher, b: Fisher) -> list[str]:
    """Return the names in A of the tensors that both have, after a look at their shapes.

    Raises:
        MismatchError: There is none, or a shape differs.
    """
    names = [name for name in a if name in b]
    if not names:
        one, other = next(iter(a), "nothing"), next(iter(b), "nothing")
        raise MismatchError(
            f"two Fishers can be compared over tensors of one name, but {a.location} and {b.location} share none "
            f"({one} there, {other} here); give Fishers of one architecture"
        )
    for name in names:
        first, second = a.info(name).shape, b.info(name).shape
        if first != second:
            raise MismatchError(
                f"two Fishers can be compared where their shapes are equal, but {name} is {list(first)} in "
                f"{a.location} and {list(second)} in {b.location}; give Fishers of one architecture"
            )
    return names


def common_scaling(a: Fisher, b: Fisher) -> Scaling:
    """Return ``debiased``, or ``raw`` where a number that it needs is not recorded in one of them."""
    return "debiased" if known_scaling(a) == known_scaling(b) == "debiased" else "raw"


def compare(
    a: Fisher,
    b: Fisher,
    names: Iterable[str] | None = None,
    scaling: Scaling = "raw",
    *,
    sample: int = SAMPLE,
    whole: bool = True,
) -> Comparison:
    """Compare two Fishers.

    All numbers are exact but those that need an order over all entries: of more than ``sample`` entries, the overall
    rank correlation and factor are over a sample of that size, drawn evenly over all tensors with a fixed seed.

    Args:
        a: One Fisher.
        b: The other, of the same architecture.
        names: What :func:`common` gave, perhaps wrapped in a progress bar.
        scaling: At which scale both are taken; within a tensor it moves the ratio and the factor alone.
        sample: Largest number of entries to be ordered for the overall numbers.
        whole: Order each tensor whole; otherwise its rank correlation and factor are over its part of the sample, which
            is faster.

    Returns:
        The comparison.

    Raises:
        MismatchError: No tensor is common to both, or a shape differs.
        ConfigError: A number that the scaling needs is not recorded.
        ValuesError: An entry is NaN, infinite or negative.

    Example:
        >>> from squisher_mergekit.fisher.config import FisherConfig
        >>> from squisher_mergekit.tensors.safetensors import MemoryStore
        >>> a, b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 2.0, 4.0])
        >>> result = compare(*(Fisher(MemoryStore({"w": each}), FisherConfig()) for each in (a, b)))
        >>> result.over_all.spearman, result.over_all.ratio, result.over_all.factor, result.zeros
        (1.0, 0.5, 2.0, (0, 0, 1))
    """
    shared = common(a, b)
    entries = sum(math.prod(a.info(name).shape) for name in shared)
    share = min(1.0, sample / entries) if entries else 1.0
    generator = torch.Generator().manual_seed(SEED)
    total, rows, parts = _Totals(), [], []
    bins = (LAST_DECADE - FIRST_DECADE) * BINS_PER_DECADE
    histogram = torch.zeros(bins, bins, dtype=torch.int64)
    for name in shared if names is None else names:
        first, second = _read(a, name, scaling), _read(b, name, scaling)
        part = _sample(first, second, share, generator)
        sums = _Totals()
        for start in range(0, first.numel(), Moments.BLOCK):
            sums.add(first[start : start + Moments.BLOCK], second[start : start + Moments.BLOCK], histogram)
        agreement = sums.agreement(*((first, second) if whole else part))
        rows.append(Row(**vars(agreement), name=name, shape=tuple(a.info(name).shape)))
        total.join(sums)
        parts.append(part)
    drawn = [torch.cat(each) if each else torch.empty(0) for each in zip(*parts, strict=True)] or [torch.empty(0)] * 2
    return Comparison(
        rows=tuple(rows),
        over_all=total.agreement(*drawn),
        sample=drawn[0].numel(),
        only_a=tuple(name for name in a if name not in b),
        only_b=tuple(name for name in b if name not in a),
        scaling=scaling,
        histogram=histogram,
        zeros=(total.zeros_a - total.zeros_both, total.zeros_b - total.zeros_both, total.zeros_both),
    )


class _Products:
    """Means, squares and products about the mean of two flat tensors, in float64, a block at a time."""

    def __init__(self) -> None:
        self.count = 0
        self.means = (0.0, 0.0)
        self.squares = [0.0, 0.0, 0.0]

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add entries."""
        if not a.numel():
            return
        other = _Products()
        wide_a, wide_b = a.to(torch.float64), b.to(torch.float64)
        other.count, other.means = a.numel(), (wide_a.mean().item(), wide_b.mean().item())
        wide_a, wide_b = wide_a - other.means[0], wide_b - other.means[1]
        other.squares = [torch.dot(x, y).item() for x, y in ((wide_a, wide_a), (wide_b, wide_b), (wide_a, wide_b))]
        self.join(other)

    def join(self, other: _Products) -> None:
        """Add what another has seen (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        if not count:
            return
        x, y = (theirs - ours for ours, theirs in zip(self.means, other.means, strict=True))
        weight = self.count * other.count / count
        pairs = zip(self.squares, other.squares, (x * x, y * y, x * y), strict=True)
        self.squares = [ours + theirs + weight * between for ours, theirs, between in pairs]
        share = other.count / count
        self.means = (self.means[0] + x * share, self.means[1] + y * share)
        self.count = count

    @property
    def correlation(self) -> float | None:
        """The correlation; None where one does not vary."""
        # A constant leaves rounding errors of this size behind, not zero.
        noise = [self.count * (1e-15 * mean) ** 2 for mean in self.means]
        if self.count < 2 or self.squares[0] <= noise[0] or self.squares[1] <= noise[1]:
            return None
        return max(-1.0, min(1.0, self.squares[2] / math.sqrt(self.squares[0] * self.squares[1])))


class _Totals:
    """What is summed over entries."""

    def __init__(self) -> None:
        self.entries = 0
        self.sum_a = self.sum_b = 0.0
        self.zeros_a = self.zeros_b = self.zeros_both = 0
        self.logs = _Products()

    def add(self, a: Tensor, b: Tensor, histogram: Tensor) -> None:
        """Add a block of entries, and count them in the histogram."""
        self.entries += a.numel()
        self.sum_a += a.sum(dtype=torch.float64).item()
        self.sum_b += b.sum(dtype=torch.float64).item()
        self.zeros_a += int((a <= 0).sum())
        self.zeros_b += int((b <= 0).sum())
        self.zeros_both += int(((a <= 0) & (b <= 0)).sum())
        log_a, log_b = (each.to(torch.float64).log10() for each in _positive(a, b))
        self.logs.add(log_a, log_b)
        if len(log_a):
            _count(log_a, log_b, histogram)

    def join(self, other: _Totals) -> None:
        """Add what another has seen."""
        for key in ("entries", "sum_a", "sum_b", "zeros_a", "zeros_b", "zeros_both"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        self.logs.join(other.logs)

    def agreement(self, a: Tensor, b: Tensor) -> Agreement:
        """Return the numbers, those that need an order over the given entries."""
        first, second = (each.to(torch.float64) for each in _positive(a, b))
        apart = first.log_().sub_(second.log_()).abs_()
        del first, second
        return Agreement(
            entries=self.entries,
            spearman=spearman(a, b),
            log_correlation=self.logs.correlation,
            ratio=self.sum_a / self.sum_b if self.sum_b else None,
            factor=math.exp(apart.median().item()) if len(apart) else None,
            zeros_a=self.zeros_a / self.entries if self.entries else 0.0,
            zeros_b=self.zeros_b / self.entries if self.entries else 0.0,
        )


def _count(log_a: Tensor, log_b: Tensor, histogram: Tensor) -> None:
    """Add entries to a histogram, within the box that holds them: the whole of it is far larger than most tensors."""
    places = [((log - FIRST_DECADE) * BINS_PER_DECADE).long().clamp(0, len(histogram) - 1) for log in (log_a, log_b)]
    (top, bottom), (left, right) = ((int(place.min()), int(place.max()) + 1) for place in places)
    box = torch.bincount(
        (places[0] - top) * (right - left) + places[1] - left, minlength=(bottom - top) * (right - left)
    )
    histogram[top:bottom, left:right] += box.view(bottom - top, right - left)


def _positive(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries that are positive in both."""
    both = (a > 0) & (b > 0)
    return a[both], b[both]


def _read(fisher: Fisher, name: str, scaling: Scaling) -> Tensor:
    """Return one tensor, checked, flat and at the wanted scale; float32 or wider."""
    check_values(fisher[name], name, fisher.location)
    return fisher.scaled(name, scaling).reshape(-1)


def _sample(a: Tensor, b: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return one entry, drawn at random, of each of as many equal stretches as the share gives."""
    size = a.numel()
    count = size if share == 1 else round(size * share)
    if count == size:
        return a, b
    starts = torch.arange(count, dtype=torch.float64) + torch.rand(count, generator=generator, dtype=torch.float64)
    places = (starts * (size / max(count, 1))).long().clamp_max(size - 1)
    return a[places], b[places]
