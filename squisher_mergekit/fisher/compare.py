"""Comparison of two Fishers, per tensor and over all entries, with one tensor of each in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.fisher.config import Scaling
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.summary import FIRST_DECADE, LAST_DECADE, known_scaling
from squisher_mergekit.fisher.values import Moments, check_values

SAMPLE = 10_000_000
SEED = 0
BINS_PER_DECADE = 20


@dataclass(frozen=True)
class Agreement:
    """Measures of agreement between two Fishers A and B over a set of entries; an undefined measure is None.

    Args:
        entries: Number of entries.
        spearman: Rank correlation, with ties at their average rank.
        log_correlation: Correlation of log F over the entries that are positive in both.
        ratio: Mean of A over mean of B.
        factor: Median of ``max(A/B, B/A)`` over the entries that are positive in both.
        zeros_a: Share of entries of A that are 0.
        zeros_b: Share of entries of B that are 0.
    """

    entries: int
    spearman: float | None
    log_correlation: float | None
    ratio: float | None
    factor: float | None
    zeros_a: float
    zeros_b: float


@dataclass(frozen=True)
class TensorAgreement(Agreement):
    """Agreement of two Fishers over one tensor."""

    name: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Comparison of two Fishers over their common tensors.

    Args:
        rows: The agreement of each tensor.
        over_all: The agreement over all entries.
        sample: Number of entries behind ``over_all.spearman`` and ``over_all.factor``.
        only_a: Names of the tensors that A alone has.
        only_b: Names of the tensors that B alone has.
        scaling: The scale at which both are compared.
        histogram: Number of entries that are positive in both, by log10 A (rows) and log10 B (columns), with
            ``BINS_PER_DECADE`` bins a decade from ``FIRST_DECADE``.
        zeros: Numbers of entries that are 0 in A alone, in B alone, and in both.
    """

    rows: tuple[TensorAgreement, ...]
    over_all: Agreement
    sample: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    scaling: Scaling
    histogram: Tensor = field(repr=False)
    zeros: tuple[int, int, int] = (0, 0, 0)


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Return the rank correlation of two tensors, with ties at their average rank.

    Args:
        a: A tensor of any shape, without NaN.
        b: A tensor with as many entries.

    Returns:
        A number from -1 to 1, computed in float64; None for fewer than two entries or for a constant tensor.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 10.0, 100.0, 50.0]))
        0.8
    """
    return pearson(average_ranks(a), average_ranks(b))


def average_ranks(values: Tensor) -> Tensor:
    """Return the rank of each entry, from 1, as a flat float64 tensor; equal entries share their average rank.

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
    """Return the correlation of two flat tensors, computed in float64; None if one is constant.

    Example:
        >>> pearson(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, -1.0]))
        -1.0
    """
    sums = _Covariance()
    for start in range(0, a.numel(), Moments.BLOCK):
        sums.add(a[start : start + Moments.BLOCK], b[start : start + Moments.BLOCK])
    return sums.correlation


def common(a: Fisher, b: Fisher) -> list[str]:
    """Return the names of the common tensors of A and B, and check their shapes.

    Raises:
        MismatchError: No tensor is common to both, or a shape differs.
    """
    names = [name for name in a if name in b]
    if not names:
        one, other = next(iter(a), "nothing"), next(iter(b), "nothing")
        raise MismatchError(
            f"two Fishers must have tensors with equal names, but {a.location} and {b.location} share none "
            f"({one} in the first, {other} in the second); give Fishers of one architecture"
        )
    for name in names:
        first, second = a.info(name).shape, b.info(name).shape
        if first != second:
            raise MismatchError(
                f"two Fishers must have tensors of equal shapes, but {name} is {list(first)} in "
                f"{a.location} and {list(second)} in {b.location}; give Fishers of one architecture"
            )
    return names


def common_scaling(a: Fisher, b: Fisher) -> Scaling:
    """Return ``debiased`` if the metadata of both Fishers allow it, else ``raw``."""
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

    The overall rank correlation and factor need all entries in order. Beyond ``sample`` entries, they are computed on a
    sample of that size, drawn evenly over all tensors with a fixed seed. All other numbers are exact.

    Args:
        a: The first Fisher.
        b: The second Fisher, of the same architecture.
        names: The names from :func:`common`, wrapped in a progress bar; by default the same names.
        scaling: The scale of both. Within a tensor it changes only the ratio and the factor.
        sample: Largest number of entries to sort for the overall numbers.
        whole: If False, the rank correlation and factor of a tensor are computed on its part of the sample, which is
            faster.

    Returns:
        The comparison.

    Raises:
        MismatchError: No tensor is common to both, or a shape differs.
        ConfigError: The scaling needs a number that the metadata lack.
        ValuesError: An entry is NaN, infinite or negative.

    Example:
        >>> from squisher_mergekit.fisher.config import FisherConfig
        >>> a, b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 2.0, 4.0])
        >>> result = compare(*(Fisher({"w": tensor}, FisherConfig()) for tensor in (a, b)))
        >>> result.over_all.spearman, result.over_all.ratio, result.over_all.factor, result.zeros
        (1.0, 0.5, 2.0, (0, 0, 1))
    """
    shared = common(a, b)
    entries = sum(math.prod(a.info(name).shape) for name in shared)
    share = min(1.0, sample / entries) if entries else 1.0
    generator = torch.Generator().manual_seed(SEED)
    total, rows, samples = _AgreementTotals(), [], []
    bins = (LAST_DECADE - FIRST_DECADE) * BINS_PER_DECADE
    histogram = torch.zeros(bins, bins, dtype=torch.int64, device="cpu")
    for name in shared if names is None else names:
        first, second = _read(a, name, scaling), _read(b, name, scaling)
        sampled = _sample(first, second, share, generator)
        sums = _AgreementTotals()
        for start in range(0, first.numel(), Moments.BLOCK):
            sums.add(first[start : start + Moments.BLOCK], second[start : start + Moments.BLOCK], histogram)
        agreement = sums.agreement(*((first, second) if whole else sampled))
        rows.append(TensorAgreement(**vars(agreement), name=name, shape=tuple(a.info(name).shape)))
        total.merge(sums)
        samples.append(sampled)
    drawn = [torch.cat(each) for each in zip(*samples, strict=True)] or [torch.empty(0, device="cpu")] * 2
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


class _Covariance:
    """Running covariance of two flat tensors, in float64, a block at a time."""

    def __init__(self) -> None:
        self.count = 0
        self.means = (0.0, 0.0)
        self.squares = [0.0, 0.0, 0.0]

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add a block of entries."""
        if not a.numel():
            return
        other = _Covariance()
        wide_a, wide_b = a.to(torch.float64), b.to(torch.float64)
        other.count, other.means = a.numel(), (wide_a.mean().item(), wide_b.mean().item())
        wide_a, wide_b = wide_a - other.means[0], wide_b - other.means[1]
        other.squares = [torch.dot(x, y).item() for x, y in ((wide_a, wide_a), (wide_b, wide_b), (wide_a, wide_b))]
        self.merge(other)

    def merge(self, other: _Covariance) -> None:
        """Merge the covariance of other entries (Chan, Golub and LeVeque, 1979)."""
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
        """Correlation of the two tensors; None if one is constant."""
        # A constant tensor leaves rounding errors of this size, not zero.
        noise = [self.count * (1e-15 * mean) ** 2 for mean in self.means]
        if self.count < 2 or self.squares[0] <= noise[0] or self.squares[1] <= noise[1]:
            return None
        return max(-1.0, min(1.0, self.squares[2] / math.sqrt(self.squares[0] * self.squares[1])))


class _AgreementTotals:
    """Running sums behind an agreement, a block at a time."""

    def __init__(self) -> None:
        self.entries = 0
        self.sum_a = self.sum_b = 0.0
        self.zeros_a = self.zeros_b = self.zeros_both = 0
        self.logs = _Covariance()

    def add(self, a: Tensor, b: Tensor, histogram: Tensor) -> None:
        """Add a block of entries to the sums and to the histogram."""
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

    def merge(self, other: _AgreementTotals) -> None:
        """Add the sums over other entries."""
        for key in ("entries", "sum_a", "sum_b", "zeros_a", "zeros_b", "zeros_both"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        self.logs.merge(other.logs)

    def agreement(self, a: Tensor, b: Tensor) -> Agreement:
        """Return the agreement, with rank correlation and factor computed on the given entries."""
        first, second = (each.to(torch.float64) for each in _positive(a, b))
        log_ratio = first.log_().sub_(second.log_()).abs_()
        del first, second
        return Agreement(
            entries=self.entries,
            spearman=spearman(a, b),
            log_correlation=self.logs.correlation,
            ratio=self.sum_a / self.sum_b if self.sum_b else None,
            factor=math.exp(log_ratio.median().item()) if len(log_ratio) else None,
            zeros_a=self.zeros_a / self.entries if self.entries else 0.0,
            zeros_b=self.zeros_b / self.entries if self.entries else 0.0,
        )


def _count(log_a: Tensor, log_b: Tensor, histogram: Tensor) -> None:
    """Count entries in a histogram, within their bounding box, which is far smaller than the whole histogram."""
    bins = [((log - FIRST_DECADE) * BINS_PER_DECADE).long().clamp(0, len(histogram) - 1) for log in (log_a, log_b)]
    (top, bottom), (left, right) = ((int(index.min()), int(index.max()) + 1) for index in bins)
    box = torch.bincount((bins[0] - top) * (right - left) + bins[1] - left, minlength=(bottom - top) * (right - left))
    histogram[top:bottom, left:right] += box.view(bottom - top, right - left)


def _positive(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries of A and of B where both are positive."""
    both = (a > 0) & (b > 0)
    return a[both], b[both]


def _read(fisher: Fisher, name: str, scaling: Scaling) -> Tensor:
    """Read one tensor, check its entries, and return it flat and scaled, in float32 or wider, on the CPU."""
    check_values(fisher[name], name, fisher.location)
    return fisher.scaled(name, scaling).reshape(-1).cpu()


def _sample(a: Tensor, b: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a stratified random sample: one entry from each of as many equal stretches as the share gives."""
    size = a.numel()
    count = size if share == 1 else round(size * share)
    if count == size:
        return a, b
    draws = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
    starts = torch.arange(count, dtype=torch.float64, device="cpu") + draws
    indices = (starts * (size / max(count, 1))).long().clamp_max(size - 1)
    return a[indices], b[indices]
