"""Table and picture of the top README.md: accuracy of six merged tasks, from the results of ``merge_methods``."""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.experiments import drawing, method_report, structure_report
from scripts.experiments.method_rows import BUDGET
from scripts.experiments.structure_merges import STRUCTURES
from scripts.experiments.structure_report import Cell
from scripts.experiments.tables import Table, difference, mean_sd, spread

SETTINGS = {"apart": "classifiers start from different seeds", "equal": "classifiers start from one seed"}
SOURCE = "merge_methods"
"""Experiment whose results are shown."""
RIVAL, BEST = "ties", "kron"
ROWS = {
    "single": "the six models, each on its own task",
    "linear": "plain average (`linear`)",
    "task_arithmetic": "`task_arithmetic`",
    RIVAL: "`ties`",
    "ota": "OTA-merge",
    "squisher": "`squisher`",
    "change-sign": "`squisher` with `density` and `consensus: sign`",
    "columns": "`squisher` with `structure: columns`",
    BEST: "`squisher` with `structure: kron`",
}


def block(report: Mapping[str, Any]) -> str:
    """Return the block: a row for each merge, a column for each way in which the classifiers started."""
    found = [structure_report.cells_of(report, heads=heads) for heads in SETTINGS]
    rows = [(label, [mean_sd(structure_report.means(cells, row)) for cells in found]) for row, label in ROWS.items()]
    tasks, seeds = len(found[0][0]["settings"]["tasks"]), structure_report.number(found[0])
    gains = " and ".join(difference(structure_report.less(cells, BEST, RIVAL)) for cells in found)
    field = " and ".join(difference(method_report.less_field(cells, BEST)) for cells in found)
    worst = "; ".join(f"{_worst(cells, BEST):.1f} against {_worst(cells, RIVAL):.1f}" for cells in found)
    note = (
        f"Mean accuracy in % over {tasks} text tasks, mean ± standard deviation over {seeds}. Each method has up to "
        f"{BUDGET} settings, chosen for each seed on validation texts. Seed by seed, `{BEST}` less `{RIVAL}` is "
        f"{gains} points, and less the method of mergekit, or OTA-merge, that is best on the validation texts, "
        f"{field} (95 % t intervals). The worst task of a seed, on average, `{BEST}` against `{RIVAL}`: {worst}."
    )
    return Table("", list(SETTINGS.values()), rows, [note]).markdown()


def _worst(cells: Sequence[Cell], row: str) -> float:
    """Return the accuracy of the worst task of a seed, mean over the seeds."""
    return spread([min(one["result"]["test"][row].values()) for one in cells])[0]


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the picture: mean and standard deviation of each row, a panel for each start of the classifiers."""
    figure = drawing.new(8, 2.6)
    panels = figure.subplots(1, len(SETTINGS), sharex=True, sharey=True)
    labels = [label.replace("`", "") for label in ROWS.values()]
    for axes, (heads, title) in zip(panels, SETTINGS.items(), strict=True):
        for place, row in enumerate(ROWS):
            mean, deviation = spread(structure_report.means(structure_report.cells_of(report, heads=heads), row))
            filled = "0.2" if row in STRUCTURES else "white"
            axes.errorbar(mean, place, xerr=deviation, fmt="o", color="0.2", markerfacecolor=filled, markersize=6)
        axes.set_title(title, fontsize=9)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    panels[0].invert_yaxis()
    figure.supxlabel("mean accuracy on held-out texts (%)", fontsize=8)
    return {"gain.png": drawing.png(figure)}
