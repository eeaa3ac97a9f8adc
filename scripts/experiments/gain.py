"""The one table and the picture of the top README.md: accuracy of six merged tasks, from the results of ``merging``."""

from collections.abc import Mapping
from typing import Any

from scripts.experiments import drawing, merging
from scripts.experiments.tables import Table, mean_sd, spread

SETTINGS = {"apart": "classifiers start from different seeds", "equal": "classifiers start from one seed"}
ROWS = {
    "single": "the six models, each on its own task",
    "linear": "plain average (`linear`)",
    "fisher": "`squisher` with Fishers computed from data",
    "squisher": "`squisher` with Squishers",
    "control": "control: `squisher`, each model with another model's Squisher",
}


def block(report: Mapping[str, Any]) -> str:
    """Return the block: a row for each merge, a column for each way in which the classifiers started."""
    rows = [(label, [mean_sd(merging.means(report, heads, row)) for heads in SETTINGS]) for row, label in ROWS.items()]
    cell = report["cells"][0]
    tasks, seeds = len(cell["settings"]["tasks"]), len({one["settings"]["seed"] for one in report["cells"]})
    gains = " and ".join(mean_sd(_gains(report, heads, "squisher", "linear")) for heads in SETTINGS)
    others = " and ".join(mean_sd(_gains(report, heads, "squisher", "fisher")) for heads in SETTINGS)
    note = (
        f"Mean accuracy in % over {tasks} text tasks, mean ± standard deviation over {seeds} seeds. Seed by seed, the "
        f"Squisher gains {gains} points on the plain average, and differs by {others} points from the computed Fisher. "
        "The gain is large where the classifiers of all runs start alike, because the plain average suffers there."
    )
    return Table("", list(SETTINGS.values()), rows, [note]).markdown()


def _gains(report: Mapping[str, Any], heads: str, row: str, other: str) -> list[float]:
    """Return the points by which a row is above another one, for each seed."""
    pairs = zip(merging.means(report, heads, row), merging.means(report, heads, other), strict=True)
    return [first - second for first, second in pairs]


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the picture: mean and standard deviation of each row, a panel for each start of the classifiers."""
    figure = drawing.new(8, 2.1)
    panels = figure.subplots(1, len(SETTINGS), sharex=True, sharey=True)
    labels = [label.replace("`", "") for label in ROWS.values()]
    for axes, (heads, title) in zip(panels, SETTINGS.items(), strict=True):
        for place, row in enumerate(ROWS):
            mean, deviation = spread(merging.means(report, heads, row))
            filled = "0.2" if row == "squisher" else "white"
            axes.errorbar(mean, place, xerr=deviation, fmt="o", color="0.2", markerfacecolor=filled, markersize=6)
        axes.set_title(title, fontsize=9)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    panels[0].invert_yaxis()
    figure.supxlabel("mean accuracy on held-out texts (%)", fontsize=8)
    return {"gain.png": drawing.png(figure)}
