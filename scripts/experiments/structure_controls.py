"""Sources and controls of the structures: what the factors of ``structure`` are made of, on the same models.

The models, texts and scores are those of ``structure``: six text tasks, heads apart and equal, seeds 31 to 35.

Decided before a reported seed was looked at:

* Nothing is chosen. Each structure has the defaults of the package (block 128; damping 0.1, 0.01 and 0.03; 10 steps).
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
from collections.abc import Callable
from pathlib import Path

from scripts.experiments import encoder, structure_factors, structure_tasks
from scripts.experiments.merging import Models as TaskModels
from scripts.experiments.runner import TIMINGS, Experiment, Result, Settings, cpu_seconds, main
from scripts.experiments.structure_merges import STRUCTURES, Models, Weights, structured

TEXTS = 128
ROWS = {
    **{f"{kind}-d": f"`structure: {kind}`, from d alone" for kind in STRUCTURES},
    **{f"{kind}-next": f"control: `structure: {kind}`, another's v" for kind in STRUCTURES},
    **{f"{kind}-rotated": f"control: `structure: {kind}`, rotated factors" for kind in STRUCTURES},
    "regmean": "RegMean, from data",
    "kfac": "K-FAC, from data",
}


def cell(settings: Settings, work: Path) -> Result:
    """Merge by each source and control, and score, for one seed and one start of the heads."""
    tasks, models, training = structure_tasks.trained(settings, work)
    test, seconds = {}, {}
    for row, make in _merges(tasks, models, settings["seed"]).items():
        began = cpu_seconds()
        weights = make()
        seconds[row] = round(cpu_seconds() - began, 2)
        test[row] = models.score(weights, "test")
    return {"test": test, TIMINGS: {"merge": seconds, "training": training}}


def _merges(tasks: TaskModels, models: Models, seed: int) -> dict[str, Callable[[], Weights]]:
    """Return the merge of each row."""
    swapped = another(models)
    kept: list[dict[str, structure_factors.Moments]] = []

    def data() -> dict[str, structure_factors.Moments]:
        if not kept:
            kept.append(from_data(tasks, models))
        return kept[0]

    return {
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
    full=structure_tasks.FULL_CELLS,
    quick=structure_tasks.QUICK_CELLS,
)


if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
