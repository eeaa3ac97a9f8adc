"""Merges of two, three, four and six models with a structure: how much there is to gain as models are added.

The models, texts and scores are those of ``structure``, heads apart and equal, of its seeds 41 to 43 alone, which keeps
the cost below an hour. A count takes the first tasks of the list tweets, bbc, newsgroups, election, reuters, spam.
Tables show six as ``structure`` has it for the same seeds.

Decided before a reported seed was looked at:

* Rows: single models, ``linear``, ``ties``, the diagonal merge, and ``rows``, ``columns`` and ``kron`` with the
  defaults of the package. ``ties`` and the diagonal merge are tuned as in ``structure``, on the tasks of the count.
* Differences to the better of ``ties`` and the diagonal merge are taken seed by seed, with t intervals of 95 %.
"""

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.experiments import drawing, structure_report, structure_tasks
from scripts.experiments.merging import HEADS, TASKS
from scripts.experiments.runner import TIMINGS, Experiment, Result, Settings, main
from scripts.experiments.structure_merges import ROWS, STRUCTURES, Row, compared, rows, structured
from scripts.experiments.structure_report import Cell
from scripts.experiments.tables import Table, mean_sd, spread

COUNTS = (2, 3, 4)
SHOWN = ("single", "linear", "ties", "diagonal", *STRUCTURES)
RIVALS = ("ties", "diagonal")
MARKS = "_s^oxDv+"


def cell(settings: Settings, work: Path) -> Result:
    """Merge the first tasks of the list, and score, for one seed and one start of the heads."""
    _, models, training = structure_tasks.trained(settings, work)
    tuned = rows(len(models.weights))
    plain = {kind: Row(lambda given, kind=kind: structured(given, kind)) for kind in STRUCTURES}
    result = compared(models, {name: tuned[name] for name in ("linear", *RIVALS)} | plain)
    result[TIMINGS]["training"] = training
    return result


def _cells(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**settings, "tasks": TASKS[:count]} for count in COUNTS]


EXPERIMENT = Experiment(
    "structure_counts",
    "Merges of two, three, four and six models with a structure.",
    cell,
    full=[one for settings in structure_tasks.FIRST_CELLS for one in _cells(settings)],
    quick=structure_tasks.QUICK_CELLS,
)


def by_count(
    report: Mapping[str, Any],
    heads: str,
    six: Mapping[str, Any] | None,
    seeds: Collection[int] = structure_tasks.FIRST_SEEDS,
) -> dict[int, list[Cell]]:
    """Return the cells of each count of models, of some seeds; another report has those of six."""
    found: dict[int, list[Cell]] = {}
    for source in (report, six or {"cells": []}):
        for one in structure_report.cells_of(source, heads=heads):
            if one["settings"]["seed"] in seeds:
                found.setdefault(len(one["settings"]["tasks"]), []).append(one)
    return dict(sorted(found.items()))


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return a table for each start of the heads: a column for each count of models."""
    six = structure_report.results("structure")
    found = {heads: by_count(report, heads, six) for heads in HEADS}
    return [_table(heads, groups) for heads, groups in found.items() if groups]


def _table(heads: str, groups: Mapping[int, list[Cell]]) -> Table:
    title = f"**Number of models, {HEADS[heads]}.**"
    notes = [
        f"{count} models: {' '.join(structure_report.findings(cells, rivals=RIVALS))}"
        for count, cells in groups.items()
    ]
    return counted(title, {row: ROWS[row] for row in SHOWN}, groups, notes)


def counted(title: str, labels: Mapping[str, str], groups: Mapping[int, list[Cell]], notes: Sequence[str]) -> Table:
    """Return a table of mean accuracies with a column for each count of models.

    Args:
        title: Beginning of the title.
        labels: Key of a row -> its label.
        groups: Count of models -> its cells.
        notes: Paragraphs below the table.
    """
    body = [
        (label, [mean_sd(structure_report.means(cells, row)) for cells in groups.values()])
        for row, label in labels.items()
    ]
    columns = [f"{count} models, {structure_report.number(cells)}" for count, cells in groups.items()]
    scale = "Mean accuracy over the tasks in %, mean ± standard deviation over seeds"
    return Table(f"{title} {scale}", columns, body, notes)


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the picture of mean accuracies by count, one panel for each start of the heads."""
    six = structure_report.results("structure")
    groups = {heads: by_count(report, heads, six) for heads in HEADS}
    return {"structure_counts.png": picture(groups, {row: ROWS[row] for row in SHOWN})}


def picture(groups: Mapping[str, Mapping[int, Sequence[Cell]]], labels: Mapping[str, str]) -> bytes:
    """Return the picture of mean accuracies by count, one panel for each start of the heads.

    Args:
        groups: Start of the heads -> count of models -> its cells.
        labels: Key of a row -> its label; eight rows at most.
    """
    figure = drawing.new(8, 3.4)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (heads, counts) in zip(panels, groups.items(), strict=True):
        for (row, label), mark in zip(labels.items(), MARKS[: len(labels)], strict=True):
            averages = [spread(structure_report.means(cells, row))[0] for cells in counts.values()]
            axes.plot(list(counts), averages, marker=mark, color="0.2", linewidth=0.8, label=label.replace("`", ""))
        axes.set_xticks(list(counts))
        axes.set_title(HEADS[heads], fontsize=9)
        axes.set_xlabel("models", fontsize=8)
        axes.grid(axis="y", color="0.9")
    panels[0].set_ylabel("mean accuracy (%)")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return drawing.png(figure)


if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
