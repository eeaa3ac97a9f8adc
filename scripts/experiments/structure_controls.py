"""Sources and controls of the structures: ablations of the factors of ``structure`` on the same models.

The models, texts and scores are those of ``structure``: six text tasks, heads apart and equal, seeds 41 to
43 alone, which keeps the cost below an hour.

Decided before a reported seed was looked at:

* Nothing is chosen. Each structure has the defaults of the package (block 128; damping 0.1, 0.01 and 0.03; 10 steps).
* *Recorded*: factors of the gradients, recorded at every fourth of the 40 steps of the fine-tuning in blocks of 128,
  in place of those from d and v.
* *From d alone*: ``fisher: none`` for all models, so that the factors come from the task vectors without v.
* *Another's v*: each model has the v of the next model, with its own task vector.
* *Rotated*: the factors of each model are turned by a random rotation in each block, with the seed of the cell. They
  keep their eigenvalues and lose their directions. Tensors without a structure are merged as before.
* References that need data, from the first 128 training texts of each task: RegMean, with the inputs' second moments
  and its published factor of 0.9 on their off-diagonal entries; and K-FAC as in MaTS, with the second moments of inputs
  and output gradients (true labels), shares by the product of the traces, damping 0.03, 10 steps of conjugate
  gradients, no blocks. Both merge the linear layers; the other tensors are the plain average.
* A control is informative only next to the row that it changes one thing of; differences are taken seed by seed.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.experiments import encoder, structure_factors, structure_merges, structure_report, structure_tasks
from scripts.experiments.merging import HEADS
from scripts.experiments.merging import Models as TaskModels
from scripts.experiments.runner import TIMINGS, Experiment, Result, Settings, cpu_seconds, main
from scripts.experiments.structure_merges import STRUCTURES, Models, Weights, structured
from scripts.experiments.structure_report import Cell, less, means
from scripts.experiments.tables import Table, difference, mean_sd
from squisher_mergekit import Fisher

TEXTS = 128
ROWS = {
    **{f"{kind}-recorded": f"`structure: {kind}`, recorded factors" for kind in STRUCTURES},
    **{f"{kind}-d": f"`structure: {kind}`, from d alone" for kind in STRUCTURES},
    **{f"{kind}-next": f"control: `structure: {kind}`, another's v" for kind in STRUCTURES},
    **{f"{kind}-rotated": f"control: `structure: {kind}`, rotated factors" for kind in STRUCTURES},
    "regmean": "RegMean, from data",
    "kfac": "K-FAC, from data",
}
SHOWN = {key: structure_merges.ROWS[key] for key in ("single", "linear", "diagonal", *STRUCTURES)} | ROWS
"""Rows of tables and pictures; the first six are those of ``structure``."""


def cell(settings: Settings, work: Path) -> Result:
    """Merge by each source and control, and score, for one seed and one start of the heads."""
    tasks, models, training = structure_tasks.trained(settings, work)
    test, seconds = {}, {}
    recorded = structure_tasks.recorded(settings, work)
    for row, make in _merges(tasks, models, recorded, settings["seed"]).items():
        began = cpu_seconds()
        weights = make()
        seconds[row] = round(cpu_seconds() - began, 2)
        test[row] = models.score(weights, "test")
    return {"test": test, TIMINGS: {"merge": seconds, "training": training}}


def _merges(
    tasks: TaskModels, models: Models, recorded: Mapping[str, Fisher], seed: int
) -> dict[str, Callable[[], Weights]]:
    """Return the merge of each row."""
    swapped, with_factors = another(models), replace(models, fishers=recorded)
    kept: list[dict[str, structure_factors.Moments]] = []

    def data() -> dict[str, structure_factors.Moments]:
        if not kept:
            kept.append(from_data(tasks, models))
        return kept[0]

    return {
        **{f"{kind}-recorded": (lambda kind=kind: structured(with_factors, kind)) for kind in STRUCTURES},
        **{f"{kind}-d": (lambda kind=kind: structured(models, kind, use_v=False)) for kind in STRUCTURES},
        **{f"{kind}-next": (lambda kind=kind: structured(swapped, kind)) for kind in STRUCTURES},
        **{
            f"{kind}-rotated": (
                lambda kind=kind: structure_factors.by_factors(models, kind, structure_factors.rotation(seed))
            )
            for kind in STRUCTURES
        },
        "regmean": lambda: structure_factors.regmean(models, data()),
        "kfac": lambda: structure_factors.kfac(models, data()),
    }


def another(models: Models) -> Models:
    """Return the models, each with the v of the next one."""
    fishers = list(models.fishers.values())
    rolled = dict(zip(models.fishers, [*fishers[1:], fishers[0]], strict=True))
    return Models(models.base, models.weights, rolled, models.score)


def from_data(tasks: TaskModels, models: Models) -> dict[str, structure_factors.Moments]:
    """Return the second moments of each model on the first training texts of its task, at its own weights."""
    found = {}
    for task, weights in models.weights.items():
        model = encoder.with_weights(tasks.models[task], weights, head=False)
        batches = encoder.in_order(tasks.parts[task].train[:TEXTS], tasks.length(task), 16)
        found[task] = structure_factors.moments(model, batches)
    return found


EXPERIMENT = Experiment(
    "structure_controls",
    "Sources and controls of the factors of a structure.",
    cell,
    full=structure_tasks.FIRST_CELLS,
    quick=structure_tasks.QUICK_CELLS,
)


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return a table for each start of the heads, next to the rows of ``structure`` for the same cells."""
    found = []
    for heads in HEADS:
        cells = paired(report, structure_report.results("structure"), heads)
        if cells:
            count = structure_report.seeds(cells, report, len(HEADS))
            title = (
                f"**Sources and controls of the factors, {HEADS[heads]}.** Mean accuracy over the tasks in %, mean ± "
                f"standard deviation over {count}"
            )
            found.append(_table(title, cells))
    return found


def paired(report: Mapping[str, Any], main_report: Mapping[str, Any] | None, heads: str) -> list[Cell]:
    """Return the cells with a start of the heads, each with the rows of ``structure`` for the same settings."""
    others = {
        one["settings"]["seed"]: one for one in structure_report.cells_of(main_report or {"cells": []}, heads=heads)
    }
    return [
        {**one, "result": {"test": {**others[seed]["result"]["test"], **one["result"]["test"]}}}
        for one in structure_report.cells_of(report, heads=heads)
        if (seed := one["settings"]["seed"]) in others
    ]


def _table(title: str, cells: list[Cell]) -> Table:
    body = []
    for row, label in SHOWN.items():
        own = row.partition("-")[0]
        gap = difference(less(cells, row, own)) if own in STRUCTURES and own != row else ""
        body.append((label, [mean_sd(means(cells, row)), gap, difference(less(cells, row, "linear"))]))
    columns = ["mean", "less the free structure", "less the plain average"]
    return Table(title, columns, body, [" ".join(_notes(cells))])


def _notes(cells: list[Cell]) -> list[str]:
    """Return one sentence for each structure on its controls, v and recorded factors, and one on the references."""
    lines = []
    for kind in STRUCTURES:
        worst = [name for name in ("next", "rotated") if min(less(cells, kind, f"{kind}-{name}")) <= 0]
        verdict = f"no, at least one control ({', '.join(worst)}) is as good" if worst else "yes, on every seed"
        gain = difference(less(cells, kind, f"{kind}-d"))
        recorded = difference(less(cells, f"{kind}-recorded", kind))
        lines.append(
            f"`{kind}`: do the controls lose? {verdict}; v adds {gain} to the structure from d alone; recorded factors "
            f"add {recorded} to it."
        )
    for row in ("regmean", "kfac"):
        lines.append(f"`kron` less {ROWS[row]}: {difference(less(cells, 'kron', row))}.")
    return lines


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the picture of mean accuracies by row."""
    main_report = structure_report.results("structure")
    groups = {title: paired(report, main_report, heads) for heads, title in HEADS.items()}
    drawn = {title: cells for title, cells in groups.items() if cells}
    return {"structure_controls.png": structure_report.picture(drawn, list(SHOWN), SHOWN)}


if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
