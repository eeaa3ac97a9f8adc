"""Every merge method with two, three and four models, beside its merge of six.

The models, texts and scores are those of ``merge_methods``, heads apart and equal, of all its seeds. A count
takes the first tasks of the list tweets, bbc, newsgroups, election, reuters, spam. Tables show six models as
``merge_methods`` has them for the same seeds.

Decided, and committed, before any result of this experiment was looked at; merges of all six models of these seeds were
known:

* Three settings a method, the first three of ``merge_methods``. With three, most methods choose the scale of the step
  alone. The merges of six models had nine settings.
* The best mean accuracy on the validation texts of the count chooses; of equal settings the first counts. Test texts
  are read once a method. The field is that of ``merge_methods``, chosen anew for each count.
* Every row is reported. Differences of the structures to the field are taken seed by seed, with t intervals of 95 %.
  This table makes no recommendation; that of ``merge_methods`` rests on six models alone.
* Seeds 49 and 50 were added after the results of seeds 46 to 48 had been looked at, as most intervals of three seeds
  contained 0. Nothing else changed, and the number of seeds does not depend on their results.
"""

import sys
from collections.abc import Mapping
from typing import Any

from scripts.experiments import merge_methods, method_report, structure_counts, structure_report, structure_tasks
from scripts.experiments.merging import HEADS, TASKS
from scripts.experiments.method_rows import ROWS, STRUCTURE, methods
from scripts.experiments.runner import Experiment, main
from scripts.experiments.structure_counts import COUNTS
from scripts.experiments.structure_report import Cell
from scripts.experiments.tables import Table, difference

SEEDS = merge_methods.SEEDS
SETTINGS = 3  # of a method
DRAWN = ("single", "linear", "task_arithmetic", "ties", "squisher", "change-sign", "columns", "kron")

EXPERIMENT = Experiment(
    "merge_methods_counts",
    "Every merge method with two, three and four models.",
    merge_methods.cell,
    full=[
        {**one, "tasks": TASKS[:count], "budget": SETTINGS}
        for one in merge_methods.FULL_CELLS
        if one["seed"] in SEEDS
        for count in COUNTS
    ],
    quick=[{**one, "budget": 1} for one in structure_tasks.QUICK_CELLS],
    gpu=True,
)


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return a table for each start of the heads: a column for each count of models."""
    found = [_table(heads, groups) for heads, groups in _groups(report).items()]
    last = found[-1]
    missing = structure_report.rest(report, EXPERIMENT.name)
    return [*found[:-1], Table(last.title, last.columns, last.rows, [*last.notes, *missing])]


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the picture of mean accuracies by count, of some rows, one panel for each start of the heads."""
    return {"merge_methods_counts.png": structure_counts.picture(_groups(report), {row: ROWS[row] for row in DRAWN})}


def _groups(report: Mapping[str, Any]) -> dict[str, dict[int, list[Cell]]]:
    """Return the cells of each count, by the start of the heads."""
    six = structure_report.results("merge_methods")
    found = {heads: structure_counts.by_count(report, heads, six, SEEDS) for heads in HEADS}
    return {heads: groups for heads, groups in found.items() if groups}


def _table(heads: str, groups: Mapping[int, list[Cell]]) -> Table:
    title = f"**Every merge method by the number of models, {HEADS[heads]}.**"
    return structure_counts.counted(title, ROWS, groups, [_less_field(count, cells) for count, cells in groups.items()])


def _less_field(count: int, cells: list[Cell]) -> str:
    """Return the field of a count, seed by seed, and the points of each structure above it."""
    names = "; ".join(ROWS[method_report.field(one)] for one in cells)
    structures = [row for row, method in methods(count, 0).items() if method.family == STRUCTURE]
    gaps = ", ".join(f"{ROWS[row]} {difference(method_report.less_field(cells, row))}" for row in structures)
    return f"{count} models: the field is {names}. Points above it: {gaps}."


if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
