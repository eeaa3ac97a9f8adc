"""What a Fisher holds, in numbers: a row for each tensor, and one over all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.fisher.config import Scaling
from squisher_mergekit.fisher.mapping import Fisher, Moments, check_values

# A bin of the histograms is a hundredth of a decade wide, from below float32's smallest number to above its largest.
BINS_PER_DECADE = 100
FIRST_DECADE, LAST_DECADE = -46, 39


@dataclass(frozen=True)
class Row:
    """One tensor: its entries at the summary's scaling, in units of one squared gradient; ``zeros`` is their share."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    minimum: float
    median: float
    maximum: float
    zeros: float


@dataclass(frozen=True)
class Summary:
    """All rows, and over all entries: count, share of zeros, extremes, mean, and the median to 1.2 %.

    ``scaling``: at which scale all of it is.
    ``histograms``: kind of layer -> number of positive entries in each bin of log10 F, ``BINS_PER_DECADE`` a decade.
    ``zero_counts``: kind of layer -> number of entries that are exactly 0.
    """

    rows: tuple[Row, ...]
    entries: int
    mean: float
    histograms: dict[str, Tensor] = field(repr=False)
    zero_counts: dict[str, int]
    scaling: Scaling = "raw"

    @property
    def zeros(self) -> float:
        """Share of all entries that are exactly 0."""
        return sum(self.zero_counts.values()) / self.entries if self.entries else 0.0

    @property
    def minimum(self) -> float:
        """Smallest entry."""
        return min((row.minimum for row in self.rows), default=0.0)

    @property
    def maximum(self) -> float:
        """Largest entry."""
        return max((row.maximum for row in self.rows), default=0.0)

    @property
    def median(self) -> float:
        """Lower median over all entries: the middle of its bin, so within a factor of 10^(1/200)."""
        rank = (self.entries + 1) // 2 - sum(self.zero_counts.values())
        if rank <= 0:
            return 0.0
        total = torch.stack(list(self.histograms.values())).sum(0).cumsum(0)
        return float(10 ** centre(int(torch.searchsorted(total, rank))))


def centre(index: int) -> float:
    """Return log10 of the middle of a bin."""
    return FIRST_DECADE + (index + 0.5) / BINS_PER_DECADE


def known_scaling(fisher: Fisher) -> Scaling:
    """Return ``debiased``, or ``raw`` where a number that it needs is not recorded.

    Example:
        >>> from squisher_mergekit.fisher.config import FisherConfig
        >>> from squisher_mergekit.tensors.safetensors import MemoryStore
        >>> known_scaling(Fisher(MemoryStore({"w": torch.ones(3)}), FisherConfig(statistic="ema")))
        'raw'
    """
    try:
        for name in fisher:
            fisher.factor(name, "debiased")
    except ConfigError:
        return "raw"
    return "debiased"


def summarize(fisher: Fisher, names: Iterable[str] | None = None, scaling: Scaling = "raw") -> Summary:
    """Read every tensor once, one at a time, and describe it.

    Args:
        fisher: What to describe.
        names: Its names, perhaps wrapped in a progress bar.
        scaling: At which scale; it moves the numbers, and no scaled tensor is made.

    Returns:
        Rows in the order of the names.

    Raises:
        ConfigError: A number that the scaling needs is not recorded.
        ValuesError: An entry is NaN, infinite or negative.

    Example:
        >>> from squisher_mergekit.fisher.config import FisherConfig
        >>> from squisher_mergekit.tensors.safetensors import MemoryStore
        >>> summary = summarize(Fisher(MemoryStore({"w": torch.tensor([0.0, 1.0, 4.0])}), FisherConfig()))
        >>> summary.rows[0].median, round(summary.zeros, 3), summary.maximum
        (1.0, 0.333, 4.0)
    """
    rows: list[Row] = []
    sums = Moments()
    bins = (LAST_DECADE - FIRST_DECADE) * BINS_PER_DECADE
    histograms: dict[str, Tensor] = {}
    zero_counts: Counter[str] = Counter()
    for name in fisher if names is None else names:
        tensor = fisher[name]
        check_values(tensor, name, fisher.location)
        sums.add(fisher, name, scaling)
        offset, factor = fisher.offset(name, scaling), fisher.factor(name, scaling)
        zeros = int((tensor == offset).sum())
        zero_counts[kind_of(name)] += zeros
        histogram = histograms.setdefault(kind_of(name), torch.zeros(bins, dtype=torch.int64))
        _count(tensor.reshape(-1), histogram, offset, factor)
        raw = (tensor.min(), tensor.flatten().median(), tensor.max()) if tensor.numel() else ()
        low, median, high = [(value.item() - offset) * factor for value in raw] or [0.0] * 3
        share = zeros / max(tensor.numel(), 1)
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows.append(Row(name, tuple(tensor.shape), dtype, low, median, high, share))
    return Summary(tuple(rows), sums.count, sums.mean, histograms, dict(zero_counts), scaling)


def _count(flat: Tensor, histogram: Tensor, offset: float, factor: float) -> None:
    """Add the positive entries, scaled, to a histogram of their log10, a block at a time."""
    for start in range(0, flat.numel(), Moments.BLOCK):
        block = (flat[start : start + Moments.BLOCK].to(torch.float64) - offset) * factor
        places = (block[block > 0].log10() - FIRST_DECADE) * BINS_PER_DECADE
        histogram += torch.bincount(places.long().clamp(0, len(histogram) - 1), minlength=len(histogram))


def human_bytes(size: int) -> str:
    """Write a size with three digits.

    Example:
        >>> human_bytes(28_000_000_000), human_bytes(512)
        ('28 GB', '512 B')
    """
    power = min(int(math.log10(size)) // 3, 4) if size else 0
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def kind_of(name: str) -> str:
    """Return the kind of layer a parameter belongs to: its name without indices, ``weight`` and ``bias``.

    Example:
        >>> kind_of("model.layers.3.mlp.up_proj.weight"), kind_of("bert.embeddings.LayerNorm.bias")
        ('mlp.up_proj', 'embeddings.LayerNorm')
    """
    parts = name.split(".")
    if len(parts) > 1 and parts[-1] in ("weight", "bias"):
        parts = parts[:-1]
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    inner = [part for part in parts[(first or 0) :] if not part.isdigit()]
    if first is None:
        inner = inner[-2:] if len(inner) > 2 else inner[-1:]
    return ".".join(inner) or name
