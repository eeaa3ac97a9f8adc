"""The rivals of ``structure: kron`` with wider lists of settings than the nine of ``merge_methods``.

In ``merge_methods`` most methods chose a value at an end of a list, so that a better one may be outside. Here the
strongest methods of mergekit, and OTA-merge, search lists that contain those of ``merge_methods`` and reach well beyond
their ends. ``structure: kron`` keeps the setting that it chose out of nine.

Decided, and committed, before any result of this experiment was looked at; the results of ``merge_methods`` on the same
models were known:

* The models, texts and scores are those of ``merge_methods``: seeds 46 to 50, heads apart and equal. The test texts of
  these seeds have been read, once a method, for ``merge_methods``; this is a check of its result, and no new one.
* **Methods**: ``ties`` and OTA-merge, which were the field of every cell; ``sce``, the next best where heads are equal;
  and ``task_arithmetic``, which users tune most.
* **Lists.** Lambda is 0.3, 0.5, 0.7, 1, 1.5, 2, 3.

  ===================  ====================================================================
  ``task_arithmetic``  weight 1/M, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 1, 1.5
  ``ties``             density 0.1, 0.005, 0.01, 0.02, 0.05, 0.2, 0.4; lambda
  ``sce``              ``select_topk`` 1, 0.02, 0.05, 0.1, 0.3, 0.6; lambda
  OTA-merge            density 0.1, 0.01, 0.02, 0.05, 0.2, 0.4; lambda
  ===================  ====================================================================
* The best mean accuracy on the validation texts chooses; of equal settings the first counts. Test texts are read once a
  method.
* **Comparison**: ``kron`` of ``merge_methods``, seed by seed, less each method with its wider lists, and less the one
  of them that is best on the validation texts, with t intervals of 95 %. Every row is reported.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.experiments import merge_methods, method_report, method_rows, structure_report, structure_tasks
from scripts.experiments.merging import HEADS
from scripts.experiments.method_rows import ROWS, SCALE, Method, compared, grid
from scripts.experiments.runner import TIMINGS, Experiment, Result, Settings, main
from scripts.experiments.structure_merges import mean
from scripts.experiments.structure_report import Cell, means
from scripts.experiments.tables import Table, difference, mean_sd

LAMBDAS = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
OURS = method_report.PRIMARY


def wider(count: int, seed: int) -> dict[str, Method]:
    """Return the methods with their wider lists.

    Args:
        count: Number of models, M.
        seed: Seed of the methods that draw entries.
    """
    scaled = {SCALE: LAMBDAS}
    weights = (1 / count, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 1.0, 1.5)
    settings = {
        "task_arithmetic": grid(weight=weights),
        "ties": grid(density=(0.1, 0.005, 0.01, 0.02, 0.05, 0.2, 0.4), **scaled),
        "sce": grid(select_topk=(1.0, 0.02, 0.05, 0.1, 0.3, 0.6), **scaled),
        "ota": grid(density=(0.1, 0.01, 0.02, 0.05, 0.2, 0.4), **scaled),
    }
    found = method_rows.methods(count, seed)
    return {name: replace(found[name], settings=lists) for name, lists in settings.items()}


def cell(settings: Settings, work: Path) -> Result:
    """Search, merge and score for one seed and one start of the heads."""
    _, models, training = structure_tasks.trained(settings, work)
    table = wider(len(models.weights), settings["seed"])
    table = {name: replace(method, settings=method.settings[: settings["budget"]]) for name, method in table.items()}
    result = compared(models, table)
    result[TIMINGS]["training"] = training
    return result


EXPERIMENT = Experiment(
    "merge_methods_wider",
    "The rivals of structure: kron with wider lists of settings.",
    cell,
    full=[{**one, "budget": None} for one in merge_methods.FULL_CELLS],
    quick=[{**one, "budget": 1} for one in structure_tasks.QUICK_CELLS],
    gpu=True,
)


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return a table for each start of the heads, beside the settings that were chosen."""
    nine = structure_report.results("merge_methods") or {"cells": []}
    made = []
    for heads in HEADS:
        cells = structure_report.cells_of(report, heads=heads)
        before = [_same(nine, one) for one in cells]
        if cells and all(before):
            found = wider(len(cells[0]["settings"]["tasks"]), 0)
            made.append(_table(report, heads, cells, [one for one in before if one]))
            made.append(method_report.choices(found, cells, HEADS[heads]))
    missing = structure_report.rest(report, EXPERIMENT.name)
    return [*made[:-2], replace(made[-2], notes=[*made[-2].notes, *missing]), made[-1]] if made else []


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return no picture: the tables are small."""
    return {}


def _same(report: Mapping[str, Any], cell: Cell) -> Cell | None:
    """Return the cell of ``merge_methods`` with the same models, if it is there."""
    settings = cell["settings"]
    found = structure_report.cells_of(report, seed=settings["seed"], heads=settings["heads"])
    return found[0] if found else None


def _table(report: Mapping[str, Any], heads: str, cells: Sequence[Cell], before: Sequence[Cell]) -> Table:
    """Return means with wider lists, their gain over the nine settings, and the lead of ``kron``."""
    ours = means(before, OURS)
    rows, above = [], []
    for row, method in wider(6, 0).items():
        found = means(cells, row)
        gain = [a - b for a, b in zip(found, means(before, row), strict=True)]
        lead = [a - b for a, b in zip(ours, found, strict=True)]
        worst = [min(one["result"]["test"][row].values()) for one in cells]
        numbers = [mean_sd(found), mean_sd(worst), difference(gain), difference(lead)]
        rows.append((ROWS[row], [str(len(method.settings)), *numbers]))
        above.append(f"{ROWS[row]} {sum(gap > 0 for gap in lead)}")
    best = [max(wider(6, 0), key=one["result"]["validation"].__getitem__) for one in cells]
    lead = [a - mean(one["result"]["test"][row]) for a, one, row in zip(ours, cells, best, strict=True)]
    note = (
        f"{ROWS[OURS]} with the setting that it chose out of nine, {mean_sd(ours)}, less the row that is best on the "
        f"validation texts, seed by seed ({'; '.join(ROWS[row] for row in best)}): {difference(lead)} points, above 0 "
        f"in {sum(gap > 0 for gap in lead)} of {len(lead)}. Seeds on which it is above a row: {', '.join(above)}."
    )
    title = (
        f"**Wider lists for the rivals, {HEADS[heads]}.** Accuracy in %, mean ± standard deviation over "
        f"{structure_report.seeds(cells, report, len(HEADS))}; differences with 95 % t intervals"
    )
    columns = ("settings", "mean", "worst task", "less nine settings", "`kron` less it")
    return Table(title, columns, rows, [note])


if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
