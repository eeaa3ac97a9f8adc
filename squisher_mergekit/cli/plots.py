"""Pictures of Fishers, drawn by matplotlib (extra ``plots``)."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import torch

from squisher_mergekit.errors import NotFoundError
from squisher_mergekit.fisher import compare
from squisher_mergekit.fisher.summary import BINS_PER_DECADE, FIRST_DECADE, Summary
from squisher_mergekit.merging.reports.heat_maps import letter, share_maps, tail

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
except ImportError as error:
    raise NotFoundError(
        'a plot needs matplotlib, which is not installed; pip install "squisher-mergekit[plots]"'
    ) from error

_KINDS = 20
_HEIGHT = 0.85
_MANY = 1000
_BINS_IN_ONE = 10
_BINS_IN_ONE_OF_FEW = 25


def histogram(summary: Summary, title: str) -> bytes:
    """Draw the histograms of log10 F, a curve for each of the twenty most numerous kinds of layer.

    Args:
        summary: The statistics of the Fisher.
        title: Title of the picture.

    Returns:
        The PNG file.
    """
    sizes = {kind: int(counts.sum()) for kind, counts in summary.histograms.items()}
    most = sorted(sizes, key=lambda kind: -sizes[kind])[:_KINDS]
    kinds = [kind for kind in sizes if kind in most]
    figure = Figure(figsize=(9, 1.8 + 0.45 * max(len(kinds), 4)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels = []
    for row, kind in enumerate(kinds):
        zeros = summary.zero_counts[kind]
        share = f", {zeros / (zeros + sizes[kind]):.1%} zero" if zeros else ""
        labels.append(f"{kind}\n{zeros + sizes[kind]:,} entries{share}")
        # Narrow bins would show few entries as needles.
        width = _BINS_IN_ONE if sizes[kind] >= _MANY else _BINS_IN_ONE_OF_FEW
        counts = summary.histograms[kind].reshape(-1, width).sum(1).double()
        heights = -row + _HEIGHT * counts / max(counts.max().item(), 1.0)
        edges = [FIRST_DECADE + place * width / BINS_PER_DECADE for place in range(len(counts) + 1)]
        axes.stairs(heights.tolist(), edges, baseline=-row, fill=True, alpha=0.6, color=f"C{row % 10}")
        axes.stairs(heights.tolist(), edges, baseline=None, color=f"C{row % 10}", linewidth=0.8)
    filled = torch.stack(list(summary.histograms.values())).sum(0).nonzero() if sizes else torch.empty(0)
    if len(filled):
        low, high = (FIRST_DECADE + int(place) / BINS_PER_DECADE for place in (filled.min(), filled.max()))
        axes.set_xlim(low - 0.5, high + 0.5)
    axes.set_yticks([-row for row in range(len(kinds))], labels, fontsize="small", verticalalignment="bottom")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-len(kinds) + 0.9, 1.0)
    axes.grid(axis="x", linewidth=0.3)
    axes.spines[["left", "right", "top"]].set_visible(False)
    shown = "" if len(kinds) == len(sizes) else f", the {len(kinds)} most numerous of {len(sizes)} kinds of layer"
    axes.set_xlabel(f"log10 F ({summary.scaling}, positive entries; each curve to its own height{shown})")
    axes.set_title(tail(title), fontsize="medium", loc="left")
    return png(figure)


def scatter(comparison: compare.Comparison, a: str, b: str) -> bytes:
    """Draw log10 B against log10 A, as the number of entries in each small square, with the line of equality.

    Args:
        comparison: The comparison of the Fishers A and B.
        a: Name of A, along the x axis.
        b: Name of B, along the y axis.

    Returns:
        The PNG file.
    """
    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    counts, low, high = _window(comparison.histogram)
    edges = [FIRST_DECADE + place / compare.BINS_PER_DECADE for place in range(low, high + 1)]
    if counts.sum():
        mesh = axes.pcolormesh(edges, edges, counts.T.double().numpy(), norm=LogNorm(vmin=1), cmap="viridis")
        figure.colorbar(mesh, label="entries in a square of 1/20 decade", shrink=0.8)
    axes.axline((edges[0], edges[0]), slope=1, color="black", linewidth=0.8, linestyle="--", label="A = B")
    axes.set(xlim=(edges[0], edges[-1]), ylim=(edges[0], edges[-1]), aspect="equal")
    axes.set(xlabel=f"log10 F of A ({comparison.scaling})", ylabel=f"log10 F of B ({comparison.scaling})")
    axes.legend(loc="upper left", fontsize="small")
    axes.grid(linewidth=0.3)
    axes.set_title("\n".join([f"A: {tail(a)}", f"B: {tail(b)}", *_captions(comparison)]), fontsize="medium", loc="left")
    return png(figure)


def heat_maps(report: Mapping[str, Any], title: str, shown: Callable[[str], str] = str) -> bytes:
    """Draw the share of each model by layer and kind of matrix, with the figures of the vote and without signal.

    Args:
        report: Report of a run, with ``by_tensor``.
        title: Title of the picture.
        shown: Function from the label of a model to its name in the picture.

    Returns:
        The PNG file.
    """
    maps = share_maps(report, shown)
    labels = [f"{letter(place)} = {tail(shown(label))}" for place, label in enumerate(report["effective_weight"])]
    across = min(len(maps), 4)
    down = -(-len(maps) // across)
    rows, columns = len(maps[0].rows), len(maps[0].columns)
    width, height = 1.6 + across * (0.5 + 0.34 * columns), 1.2 + 0.2 * len(labels) + down * (1.2 + 0.2 * rows)
    figure = Figure(figsize=(max(width, 6), height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
    for axes, found in zip(panels, maps, strict=False):
        grid = [[found.values.get((row, column), float("nan")) for column in found.columns] for row in found.rows]
        mesh = axes.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if value == value:
                    shade = "white" if value > 0.6 else "black"
                    axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=shade)
        axes.set_title(found.title, fontsize="medium", loc="left")
        axes.set_xticks(range(columns), [column or "(alone)" for column in found.columns], rotation=90, fontsize=7)
        axes.set_yticks(range(rows), [tail(row, 30) for row in found.rows], fontsize=7)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    for axes in panels[len(maps) :]:
        axes.set_axis_off()
    figure.colorbar(mesh, ax=list(panels), label="share of the entries", shrink=0.6)
    figure.suptitle("\n".join([tail(title), *labels]), fontsize="small", x=0.01, ha="left")
    return png(figure)


def merged_steps(report: Mapping[str, Any], title: str, shown: Callable[[str], str] = str) -> bytes:
    """Draw the share of each model in the merged step of each layer, and the conflict beside it.

    Args:
        report: Report of :func:`~squisher_mergekit.merging.coupling.report.structure_report`.
        title: Title of the picture.
        shown: Function from the label of a model to its name in the picture.

    Returns:
        The PNG file.
    """
    layers, labels = list(report["layers"]), list(report["share"])
    figure = Figure(figsize=(9, 2.2 + 0.22 * len(layers) + 0.2 * len(labels)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    ends = {negative: [0.0] * len(layers) for negative in (False, True)}
    for place, label in enumerate(labels):
        shares = [report["layers"][layer]["share"].get(label, 0.0) for layer in layers]
        # A negative share is drawn to the left of 0.
        starts = [ends[share < 0][row] for row, share in enumerate(shares)]
        left.barh(layers, shares, left=starts, height=_HEIGHT, color=f"C{place % 10}", label=tail(shown(label)))
        for row, share in enumerate(shares):
            ends[share < 0][row] += share
    left.set_xlabel("share of the merged step")
    right.barh(layers, [report["layers"][layer]["conflict"] for layer in layers], height=_HEIGHT, color="0.5")
    right.set_xlabel("conflict (0: none, 1: models cancel out)")
    left.invert_yaxis()
    left.tick_params(axis="y", labelsize="small")
    for axes in (left, right):
        axes.grid(axis="x", linewidth=0.3)
        axes.spines[["right", "top"]].set_visible(False)
    figure.legend(loc="outside lower center", fontsize="small")
    figure.suptitle(tail(title), fontsize="medium")
    return png(figure)


def sweep_scores(scores: Mapping[str, float], best: str | None, lower: bool) -> bytes:
    """Draw the score of each point of a sweep, the best one filled.

    Args:
        scores: Label of a point -> score.
        best: Label of the best point.
        lower: True if the lowest score is the best.

    Returns:
        The PNG file.
    """
    figure = Figure(figsize=(8, 1.4 + 0.26 * len(scores)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels = [name.replace(",", ", ") for name in scores]
    axes.hlines(range(len(scores)), min(scores.values()), list(scores.values()), color="0.8", linewidth=1)
    filled = ["0.15" if name == best else "white" for name in scores]
    axes.scatter(list(scores.values()), range(len(scores)), c=filled, edgecolors="0.15", zorder=3)
    axes.set_yticks(range(len(scores)), [tail(text) for text in labels], fontsize="small")
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.set_xlabel(f"score ({'lower' if lower else 'higher'} is better; filled: the best)")
    axes.grid(axis="x", linewidth=0.3)
    axes.spines[["right", "top", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return png(figure)


def _window(histogram: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """Return the square part of a histogram with all of its entries, and its first and last index."""
    filled = (histogram.sum(0) + histogram.sum(1)).nonzero()
    low, high = (int(filled.min()), int(filled.max()) + 1) if len(filled) else (0, len(histogram))
    low, high = max(low - 5, 0), min(high + 5, len(histogram))
    return histogram[low:high, low:high], low, high


def _captions(comparison: compare.Comparison) -> list[str]:
    """Return the captions: the rank correlation, and the shares of zeros, which a logarithmic picture cannot show."""
    over_all = comparison.over_all
    known = over_all.spearman is not None
    shares = [f"{zeros / max(over_all.entries, 1):.2%}" for zeros in comparison.zeros]
    return [
        f"{over_all.entries:,} entries" + (f", rank correlation {over_all.spearman:.4f}" if known else ""),
        f"not shown: {shares[0]} zero in A alone, {shares[1]} in B alone, {shares[2]} in both",
    ]


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()
