"""Heat map of the distances between tasks, drawn by matplotlib (extra ``plots``)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from squisher_mergekit.cli import plots  # refuses, with the command to install matplotlib, if it is missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST = 16
_LONGEST = 24


def heat_map(matrix: Tensor, names: Sequence[str], order: Sequence[int], tree: Tensor, title: str) -> bytes:
    """Draw a matrix of distances as a heat map, dark for near tasks, with the tree of clusters above.

    Grey levels show the distances, so that the picture can be printed in black and white. For few tasks each cell has
    its number. The diagonal is hatched.

    Args:
        matrix: Distances, shape ``(n, n)``, from the task of a row to the task of a column.
        names: Names of the tasks.
        order: Order of the tasks in the picture.
        tree: Linkage matrix behind the order.
        title: Title of the picture.

    Returns:
        The PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    count = len(names)
    side = 2.6 + 0.44 * min(max(count, 4), 24)
    figure = Figure(figsize=(side + 1.1, side + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    top, axes = figure.subplots(2, 1, height_ratios=(1, 6), sharex=True)
    shown = matrix[list(order)][:, list(order)].clone().fill_diagonal_(float("nan"))
    image = axes.imshow(shown.numpy(), cmap="Greys_r", aspect="auto")
    for place in range(count):
        axes.add_patch(Rectangle((place - 0.5, place - 0.5), 1, 1, fill=False, hatch="//", edgecolor="0.6", lw=0))
    figure.colorbar(image, ax=axes, label="distance (dark: near)", shrink=0.8)
    labels = [names[place] if len(names[place]) <= _LONGEST else f"{names[place][: _LONGEST - 1]}…" for place in order]
    axes.set_xticks(range(count), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), labels)
    directed = not torch.equal(matrix, matrix.T)
    axes.set_xlabel("target task" if directed else "task")
    axes.set_ylabel("source task" if directed else "task")
    if count <= _MOST:
        _write_cells(axes, shown)
    _draw_tree(top, tree)
    top.set_title(title, fontsize="medium", loc="left")
    return _grey(plots.png(figure))


def _grey(picture: bytes) -> bytes:
    """Return a PNG file in grey levels, which is less than half as large."""
    from PIL import Image  # matplotlib brings it

    stream = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("L").save(stream, "png", optimize=True)
    return stream.getvalue()


def _write_cells(axes: Axes, shown: Tensor) -> None:
    """Write each distance into its cell, black on light cells and white on dark ones."""
    known = shown[~shown.isnan()]
    middle = (0.6 * known.min() + 0.4 * known.max()).item()
    form = ".2f" if known.abs().max() >= 0.1 else ".1e"
    for i, row in enumerate(shown.tolist()):
        for j, value in enumerate(row):
            if i != j:
                color = "black" if value > middle else "white"
                axes.text(j, i, f"{value:{form}}", ha="center", va="center", color=color, fontsize="small")


def _draw_tree(axes: Axes, tree: Tensor) -> None:
    """Draw the tree of clusters above the columns, with heights at the distances of the joins."""
    from scipy.cluster.hierarchy import dendrogram

    drawn = dendrogram(tree.numpy(), no_plot=True)
    for across, up in zip(drawn["icoord"], drawn["dcoord"], strict=True):
        # scipy puts leaf i at 10 i + 5.
        axes.plot([(x - 5) / 10 for x in across], up, color="black", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("distance\nwhen joined", fontsize="small")
    axes.tick_params(axis="x", bottom=False, labelbottom=False)
    axes.spines[["right", "top", "bottom"]].set_visible(False)
