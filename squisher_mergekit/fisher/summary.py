"""Statistics of a Fisher, per tensor and over all entries."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.fisher.config import Scaling
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.values import Moments, check_values

# The bins of the histograms cover the range of float32.
BINS_PER_DECADE = 100
FIRST_DECADE, LAST_DECADE = -46, 39


@dataclass(frozen=True)
class TensorSummary:
    """Statistics of one tensor, in units of one squared gradient at the summary's scaling.

    Args:
        name: Name of the tensor.
        shape: Shape of the tensor.
        dtype: dtype in the file.
        minimum: Smallest entry.
        median: Lower median.
        maximum: Largest entry.
        zeros: Share of entries that are exactly 0.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    minimum: float
    median: float
    maximum: float
    zeros: float


@dataclass(frozen=True)
class Summary:
    """Statistics of a Fisher.

    Args:
        rows: Statistics of each tensor.
        entries: Number of all entries.
        mean: Mean over all entries.
        histograms: Kind of layer -> number of positive entries in each bin of log10 F, ``BINS_PER_DECADE`` a decade.
        zero_counts: Kind of layer -> number of entries that are exactly 0.
        scaling: The scale of all numbers.
    """

    rows: tuple[TensorSummary, ...]
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
        """Lower median over all entries, to a factor of 10^(1/200): the centre of its bin."""
        rank = (self.entries + 1) // 2 - sum(self.zero_counts.values())
        if rank <= 0:
            return 0.0
        total = torch.stack(list(self.histograms.values())).sum(0).cumsum(0)
        return float(10 ** centre(int(torch.searchsorted(total, rank))))


def centre(index: int) -> float:
    """Return log10 of the centre of a bin."""
    return FIRST_DECADE + (index + 0.5) / BINS_PER_DECADE


def known_scaling(fisher: Fisher) -> Scaling:
    """Return ``debiased`` if the metadata allow it, else ``raw``.

    Example:
        >>> from squisher_mergekit.fisher.config import FisherConfig
        >>> known_scaling(Fisher({"w": torch.ones(3)}, FisherConfig(statistic="ema")))
        'raw'
    """
    if fisher.config.as_stored:
        return "raw"
    try:
        for name in fisher:
            fisher.factor(name, "debiased")
    except ConfigError:
        return "raw"
    return "debiased"


def summarize(fisher: Fisher, names: Iterable[str] | None = None, scaling: Scaling = "raw") -> Summary:
    """Compute the statistics of a Fisher, reading each tensor once, one at a time.

    Args:
        fisher: The Fisher.
        names: The names of ``fisher``, wrapped in a progress bar.
        scaling: The scale of the numbers.

    Returns:
        The statistics, with rows in the order of the names.

    Raises:
        ConfigError: The scaling needs a number that the metadata lack.
        ValuesError: An entry is NaN, infinite or negative.

    Example:
        >>> from squisher_mergekit.fisher.config import FisherConfig
        >>> summary = summarize(Fisher({"w": torch.tensor([0.0, 1.0, 4.0])}, FisherConfig()))
        >>> summary.rows[0].median, round(summary.zeros, 3), summary.maximum
        (1.0, 0.333, 4.0)
    """
    rows: list[TensorSummary] = []
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
        histogram = histograms.setdefault(kind_of(name), torch.zeros(bins, dtype=torch.int64, device="cpu"))
        _count(tensor.reshape(-1), histogram, offset, factor)
        raw = (tensor.min(), tensor.flatten().median(), tensor.max()) if tensor.numel() else ()
        low, median, high = [(value.item() - offset) * factor for value in raw] or [0.0] * 3
        share = zeros / max(tensor.numel(), 1)
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows.append(TensorSummary(name, tuple(tensor.shape), dtype, low, median, high, share))
    return Summary(tuple(rows), sums.count, sums.mean, histograms, dict(zero_counts), scaling)


def _count(flat: Tensor, histogram: Tensor, offset: float, factor: float) -> None:
    """Count log10 of the positive scaled entries in a histogram, a block at a time."""
    for start in range(0, flat.numel(), Moments.BLOCK):
        block = (flat[start : start + Moments.BLOCK].to(torch.float64) - offset) * factor
        bins = (block[block > 0].log10() - FIRST_DECADE) * BINS_PER_DECADE
        counts = torch.bincount(bins.long().clamp(0, len(histogram) - 1), minlength=len(histogram))
        histogram += counts.to(histogram.device)


def human_bytes(size: int) -> str:
    """Return a size in bytes as text with three digits.

    Example:
        >>> human_bytes(28_000_000_000), human_bytes(512)
        ('28 GB', '512 B')
    """
    power = min(int(math.log10(size)) // 3, 4) if size else 0
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def kind_of(name: str) -> str:
    """Return the kind of layer of a parameter: its name without indices, ``weight`` and ``bias``.

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


def by_number(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts names with their indices as numbers.

    Example:
        >>> sorted(["h.10", "h.9", "head"], key=by_number)
        ['h.9', 'h.10', 'head']
    """
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def layer_of(name: str) -> str:
    """Return the layer of a parameter: its name up to the first index, or its module if there is none.

    Example:
        >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("lm_head.weight")
        ('model.layers.3', 'lm_head')
    """
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] or parts) if first is None else ".".join(parts[: first + 1])
