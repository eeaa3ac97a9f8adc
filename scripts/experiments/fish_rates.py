"""At which rate to train inside a mask: the search that ``fish_mask.RATES`` comes from.

The fewer weights may change, the further they have to move, so each mask and share has a rate of its own: the best in
the mean over the validation texts of three of the tasks, on seed 100, which is not reported. Rates are half a power of
ten apart, tried up and down until they got worse.

    scripts/experiments/fish_rates.py --full
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from scripts.experiments import fish_mask
from scripts.experiments.fish_mask_report import LABELS, TRAINED
from scripts.experiments.runner import Experiment, Result, Settings, main
from scripts.experiments.tables import Table

TASKS, SEED = ("tweets", "election", "newsgroups"), 100
# Row -> share -> the rates tried.
TRIED: dict[str, dict[str, Sequence[float]]] = {
    "squisher": dict.fromkeys(("0.005", "0.025", "0.1"), (3e-4, 1e-3, 3e-3)),
    "random": {"0.005": (1e-3, 3e-3, 1e-2, 3e-2), "0.025": (1e-3, 3e-3, 1e-2), "0.1": (3e-4, 1e-3, 3e-3)},
}


def cell(settings: Settings, work: Path) -> Result:
    """Train inside the masks of a row at each rate, and score on the validation texts."""
    run, row = fish_mask.Run(fish_mask.recipe_of(settings), work), settings["row"]
    return {
        share: {
            str(rate): run.accuracy(run.trained_inside(run.mask(row, float(share)), rate), "validation")
            for rate in rates
        }
        for share, rates in settings["tried"].items()
    }


def means(report: Mapping[str, Any]) -> dict[tuple[str, str], dict[float, float]]:
    """Return (row, share) -> rate -> accuracy, mean over the tasks."""
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for one in report["cells"]:
        for share, rates in one["result"].items():
            kept = found.setdefault((one["settings"]["row"], share), {})
            for rate, accuracy in rates.items():
                kept.setdefault(float(rate), []).append(accuracy)
    return {key: {rate: mean(values) for rate, values in sorted(rates.items())} for key, rates in found.items()}


def best(report: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Return row -> the best rate of each share; of equal ones the smallest."""
    found = means(report)
    return {
        row: tuple(max(rates, key=rates.__getitem__) for (name, _), rates in found.items() if name == row)
        for row in TRAINED
    }


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return the accuracies by mask, share and rate, the best one of a row in bold."""
    found = means(report)
    columns = sorted({rate for rates in found.values() for rate in rates})
    rows = []
    for (name, share), rates in found.items():
        top = max(rates.values())
        shown = {rate: f"**{value:.1f}**" if value == top else f"{value:.1f}" for rate, value in rates.items()}
        rows.append((f"{LABELS[name]}, {float(share):.1%}", [shown.get(rate, "") for rate in columns]))
    tasks = dict.fromkeys(one["settings"]["task"] for one in report["cells"])
    title = (
        f"**Learning rates inside a mask**: accuracy (%) on validation texts, mean over {', '.join(tasks)}, seed {SEED}"
    )
    return [Table(title, [f"{rate:g}" for rate in columns], rows)]


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return none."""
    return {}


_SIZES = {key: fish_mask.EXPERIMENT.full[0][key] for key in ("steps", "train", "validation", "test")}
_SMALL = {key: fish_mask.EXPERIMENT.quick[0][key] for key in _SIZES}
EXPERIMENT = Experiment(
    "fish_rates",
    "FISH mask: which learning rate suits training inside a mask.",
    cell,
    full=[{"task": task, "row": row, "seed": SEED, "tried": TRIED[row], **_SIZES} for row in TRAINED for task in TASKS],
    quick=[{"task": TASKS[0], "row": "random", "seed": SEED, "tried": {"0.1": (1e-3,)}, **_SMALL}],
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
