"""Learning rates for training inside a mask: the search for ``fish_mask.RATES``.

Fewer weights have to move further, so each mask and share has its own rate: the one with the highest accuracy on the
validation texts of three tasks, on seed 100, which is not reported. Rates are half a power of ten apart, and the search
went up and down until the accuracy fell.

    python -m scripts.experiments.fish_rates --full
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
# Row -> share -> rates.
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
    """Return a mapping from (row, share) and rate to the mean accuracy over the tasks."""
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for one in report["cells"]:
        for share, rates in one["result"].items():
            kept = found.setdefault((one["settings"]["row"], share), {})
            for rate, accuracy in rates.items():
                kept.setdefault(float(rate), []).append(accuracy)
    return {key: {rate: mean(values) for rate, values in sorted(rates.items())} for key, rates in found.items()}


def best(report: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Return a mapping from rows and shares to the best rate, the smallest of equally good ones."""
    found = means(report)
    return {
        row: tuple(max(rates, key=rates.__getitem__) for (name, _), rates in found.items() if name == row)
        for row in TRAINED
    }


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return the table of accuracies by mask, share and rate, with the best of a row in bold."""
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
    """Return no picture."""
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
