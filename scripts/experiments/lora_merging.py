"""Merges of six text tasks that were trained as LoRA adapters: lifted Fishers and other merges.

The tasks are those of ``merging``, the adapters those of ``structure_adapters``: LoRAs of peft on the linear layers of
the encoder, which end as a trainer's do, with the state of the optimizer. ``W = W0 + s B A`` is merged, where A has the
shape ``[r, in]``, B ``[out, r]`` and ``s = alpha / r``; pooler and classifier stay those of the task.

Decided before a reported seed was looked at:

* Seeds 54 to 58, which no experiment has used (``lora_rank`` trained one task of 51 to 53). Each seed has four cells:
  r = 8 and r = 32, each with starts *apart*, where every task draws its classifier and its matrices A, and *alike*,
  where all tasks have one draw of both, as with people who keep the default seed.
* Texts, steps and learning rates are those of ``structure_adapters``: an adapter on each linear layer of the encoder,
  AdamW for 40 steps of 16 texts of at most 32 tokens, gradients clipped at 1, learning rate 2e-3 of the adapter and
  1e-3 of pooler and classifier, no dropout in the adapter. Alpha is 16 for both ranks.
* Pilots, all of seed 0, tried shorter runs for their cost. 40 steps of 8 texts left the task tweets at chance, three
  layers half of the tasks; r = 32 with alpha = 64 trained badly (64.7 for the single models, 44.4 for the average, 63.9
  for lifted F). With 32 steps on texts of 20 tokens, r = 8, apart, the plain average (84.4) was so near to the single
  models (85.6; lifted F 84.2) that no merge could gain: the models hardly interfere. Hence the longer runs, whose
  single models were 9 and 14 points above the average on the seeds of ``structure_adapters``.
* Choices are made for each cell by the mean accuracy on 20 validation texts a task, one option at a time; of equal
  settings the first counts. Test texts, 80 a task, are read once a row.

  ===================== ================================================================================================
  ``task_arithmetic``   weight 1/6, 0.3, 0.4, 0.6, 1
  ``ties``              density 0.1, 0.05, 0.2; then lambda 1, 0.7, 1.5
  ``dare_ties``         density 0.5, 0.1, 0.9; then lambda 2/6, 3/6, 1
  lifted F, options     Eq. 13; ``density_by: change`` of the model, ``trimmed: abstain``, density 0.1, 0.05, 0.2; and
                        ``consensus: sign``; then lambda 1, 0.7, 1.5
  ===================== ================================================================================================

  Every other row has the defaults of its method, and nothing is chosen for it.
* *Lifted F* is that of ``squisher extract --lift``. *Recorded F* is that of
  :class:`~squisher_mergekit.training.LoraRecorder` in the same run. *Estimated F* is the empirical Fisher of the first
  64 training texts at ``W0 + s B A``. *One number per model* weights all entries of a model by the mean of its lifted
  F. The *control* gives each model the lifted F of the next one.
* *A and B apart*: the factors are merged entry by entry, plainly or by the adapters' own Fishers, and then multiplied.
* *As an adapter*: the change from W0 to the merge by lifted F, cut at rank r, 2r and 4r by singular values.
* Primary: lifted F less the plain average, seed by seed (the mean of its four cells), and the control less the average.
  Everything else is stated as it comes out, with t intervals of 95 % over the seeds.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.experiments import encoder, lora_report, lora_rows, structure_adapters, structure_merges, structure_tasks
from scripts.experiments.lora_rows import Factors, with_fishers
from scripts.experiments.merging import HEADS
from scripts.experiments.merging import Models as TaskModels
from scripts.experiments.runner import TIMINGS, Experiment, Result, Settings, main
from scripts.experiments.structure_merges import Models, Row, Weights, diagonal
from scripts.experiments.structure_report import cells_of, number, rest
from scripts.experiments.tables import Table
from squisher_mergekit import Fisher, load_fisher

SEEDS, RANKS = (54, 55, 56, 57, 58), (8, 32)
ALIKE = "equal"  # value of the setting ``heads``
STARTS = dict(zip(HEADS, ("apart", "alike"), strict=True))


def cell(settings: Settings, work: Path) -> Result:
    """Fine-tune adapters, search, merge and score for one seed, rank and start."""
    recipes = structure_tasks.recipes(settings)
    adapter, alike = settings["adapter"], settings["heads"] == ALIKE
    folders = {
        task: structure_adapters.fine_tune(recipe, adapter, 0 if alike else place, work)
        for place, (task, recipe) in enumerate(recipes.items())
    }
    tasks, models, training = structure_tasks.opened(folders, recipes, work, settings["fisher_texts"])
    result = structure_merges.compared(models, rows(folders, tasks, models, settings))
    result[TIMINGS]["training"] = training
    return result


def rows(folders: Mapping[str, Path], tasks: TaskModels, models: Models, settings: Settings) -> dict[str, Row]:
    """Return the rows of merges by their keys in ``lora_report.ROWS``.

    Args:
        folders: Folder of each task, as :func:`structure_adapters.fine_tune` describes it.
        tasks: The models with their texts.
        models: The same models, with the tensors that are merged.
        settings: Settings of the cell.
    """
    count = len(folders)
    base = next(iter(folders.values())) / "final"
    factors = Factors({task: folder / "adapter" for task, folder in folders.items()}, base)
    recorded = [load_fisher(folder / "final" / encoder.RECORDED) for folder in folders.values()]

    def by(fishers: Sequence[Fisher]) -> Weights:
        return diagonal(with_fishers(models, fishers))

    return lora_rows.shared(count, settings["adapter"]["r"]) | {
        "dare_ties": lora_rows.dare_ties(count, settings["seed"]),
        "apart": Row(lambda models: factors.merged(models, by_fisher=False)),
        "apart-fisher": Row(lambda models: factors.merged(models, by_fisher=True)),
        "recorded": Row(lambda models: by(recorded)),
        "computed": Row(lambda models: by(estimated(tasks, models))),
    }


def estimated(tasks: TaskModels, models: Models) -> list[Fisher]:
    """Return the empirical Fisher of the merged tensors of each model, at its own weights."""
    for model in tasks.models.values():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in models.base)
    return tasks.estimated()


_FULL = {
    **structure_tasks.FULL,
    "validation": 20,
    "test": 80,
    "factors_every": 0,
    "fisher_texts": 64,
}
_QUICK = {**_FULL, **structure_tasks.QUICK, "factors_every": 0, "fisher_texts": 16}


def _adapter(rank: int) -> dict[str, Any]:
    return {**structure_adapters.ADAPTER, "r": rank, "record": True}


EXPERIMENT = Experiment(
    "lora_merging",
    "Merges of six text tasks that were trained as LoRA adapters, with lifted Fishers and without.",
    cell,
    full=[
        {"seed": seed, "heads": heads, **_FULL, "adapter": _adapter(rank)}
        for seed in SEEDS
        for rank in RANKS
        for heads in HEADS
    ],
    quick=[{"seed": 0, "heads": ALIKE, **_QUICK, "adapter": _adapter(RANKS[0])}],
)


def groups(report: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the cells of each rank and start that has any, by its short name."""
    found = {
        f"r = {rank}, {short}": cells_of(report, heads=heads, adapter=_adapter(rank))
        for rank in RANKS
        for heads, short in STARTS.items()
    }
    return {name: cells for name, cells in found.items() if cells}


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return the tables of means, differences and worst tasks, with a column for each rank and start."""
    found = groups(report)
    most = max(found.values(), key=len)
    title = (
        f"**Six tasks trained as LoRA adapters, ranks {' and '.join(map(str, RANKS))}.** Accuracy in %, mean ± "
        f"standard deviation over {number(most)}, {most[0]['settings']['test']} held-out texts a task; starts apart: "
        "each task draws its classifier and its matrices A, alike: all have one draw"
    )
    return lora_report.tables(title, found, rest(report, EXPERIMENT.name))


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the picture of mean accuracies by row."""
    return {"lora_merging.png": lora_report.picture(groups(report))}


if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
