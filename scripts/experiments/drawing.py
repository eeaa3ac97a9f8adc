"""Shared parts of the pictures, which need neither colours nor a screen."""

import io
from collections.abc import Sequence
from typing import Any

from scripts.experiments.tables import spread


def new(width: float, height: float) -> Any:
    """Return an empty figure of the given size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any, dpi: int = 110) -> bytes:
    """Return a figure as a PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi)
    return data.getvalue()


def curve(
    axes: Any, places: Sequence[float], values: Sequence[Sequence[float]], style: tuple[str, str, str], label: str
) -> None:
    """Draw means over seeds with standard deviations.

    Args:
        axes: Axes of matplotlib.
        places: Horizontal positions of the points.
        values: Values of each point, one for each seed.
        style: Marker, line, and fill of the marker.
        label: Label in the legend.
    """
    mark, line, fill = style
    spreads = [spread(seeds) for seeds in values]
    axes.errorbar(
        places,
        [mean for mean, _ in spreads],
        [deviation for _, deviation in spreads],
        fmt=mark + line,
        color="0.2",
        markerfacecolor=fill,
        markersize=5.5,
        linewidth=1,
        elinewidth=0.7,
        label=label,
    )
