"""Pictures of a Fisher; matplotlib comes with the extra ``plots``."""

from __future__ import annotations

import io

import torch

from squisher_mergekit.errors import NotFoundError
from squisher_mergekit.fisher.summary import BINS_PER_DECADE, FIRST_DECADE, LAST_DECADE, Summary

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise NotFoundError(
        'a plot needs matplotlib, which is not installed; pip install "squisher-mergekit[plots]"'
    ) from error

_LINES = 20
_BINS_IN_ONE = 10


def histogram(summary: Summary, title: str) -> bytes:
    """Draw how log10 F is distributed, a line for each kind of layer (the most numerous twenty).

    Args:
        summary: Of a Fisher.
        title: Above the picture.

    Returns:
        A PNG.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    sizes = {kind: int(counts.sum()) for kind, counts in summary.histograms.items()}
    width = _BINS_IN_ONE / BINS_PER_DECADE
    edges = [FIRST_DECADE + i * width for i in range(round((LAST_DECADE - FIRST_DECADE) / width) + 1)]
    for number, kind in enumerate(sorted(sizes, key=lambda kind: -sizes[kind])[:_LINES]):
        counts = summary.histograms[kind].reshape(-1, _BINS_IN_ONE).sum(1)
        zeros = summary.zero_counts[kind]
        label = kind + (f" ({zeros / (zeros + sizes[kind]):.0%} zero)" if zeros else "")
        share = counts.double() / max(sizes[kind], 1) / width
        style = ("-", "--", ":")[number // 10 % 3]
        axes.stairs(share.tolist(), edges, label=label, linestyle=style)
    held = torch.stack(list(summary.histograms.values())).sum(0).nonzero() if sizes else torch.empty(0)
    if len(held):
        low, high = (FIRST_DECADE + int(place) / BINS_PER_DECADE for place in (held.min(), held.max()))
        axes.set_xlim(low - 0.5, high + 0.5)
    axes.set(xlabel=f"log10 F ({summary.scaling}, positive entries)", ylabel="density", title=title)
    axes.legend(fontsize="x-small")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()
