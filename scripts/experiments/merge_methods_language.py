"""Every merge method side by side on a generative model, with the loss on general text.

Models, texts and scores are those of ``structure_language``; methods and the order of their settings are those of
``merge_methods``.

Decided, and committed, before any result of this experiment was looked at:

* Seeds 34, 35 and 36, which no experiment has used.
* Three settings a method, the first three of ``merge_methods``, so that a cell takes about as long as one of
  ``structure_language``. With three, most methods choose the scale of the step alone.
* The best mean accuracy on the validation texts chooses; of equal settings the first counts. Test texts, and the
  sentences of general text, are read once a method. Nothing is chosen by the loss.
* The primary comparison and any recommendation are those of ``merge_methods``. This table makes no recommendation; it
  shows whether the same order holds for a generative model, and how much each method forgets.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.experiments import method_report, method_rows, structure_language, structure_report
from scripts.experiments.runner import TIMINGS, Experiment, Result, Settings, main
from scripts.experiments.structure_language import BEFORE
from scripts.experiments.tables import Table

SETTINGS = 3  # of a method


def cell(settings: Settings, work: Path) -> Result:
    """Fine-tune, search, merge and score for one seed."""
    models, measured, training = structure_language.trained(settings, work)
    table = method_rows.methods(len(models.weights), settings["seed"], most=settings["budget"])
    result = structure_language.separated(method_rows.compared(models, table, measured), measured(models.base))
    result[TIMINGS]["training"] = training
    return result


EXPERIMENT = Experiment(
    "merge_methods_language",
    "Every merge method side by side on a generative model.",
    cell,
    full=[{"seed": seed, "budget": SETTINGS, **structure_language.FULL} for seed in (34, 35, 36)],
    quick=[{"seed": 0, "budget": 1, **structure_language.QUICK}],
    gpu=True,
)


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return the table of accuracies, and the one of losses on general text."""
    cells = report["cells"]
    labels = {BEFORE: structure_language.LABEL, **method_rows.ROWS}
    losses = structure_language.losses(cells, labels, structure_report.seeds(cells, report, 1))
    return [*method_report.tables(report, EXPERIMENT), losses]


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the picture of mean accuracies by row."""
    return {"merge_methods_language.png": method_report.picture(report)}


if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
