"""Merges of a generative model with a structure: four text tasks as prompts, and the loss on general text.

The model is SmolLM2-135M-Instruct, dequantised from four bits; its last ten of thirty layers are fine-tuned on each
task and merged, all else is frozen, so that the hidden states below are computed once. A text of a task stands in a
prompt that ends with a question, and the answer is one word for each class: the class with the most likely first token
of its word counts. Training maximises the likelihood of that token among all tokens.

Decided before a reported seed was looked at:

* Tasks tweets, bbc, newsgroups, spam; 320 training texts each, 40 steps of 8, prompts of at most 48 tokens, AdamW with
  a learning rate of 1e-4, gradients clipped at 1. 40 validation texts and 100 test texts a task. There is no head, so
  all models share their outputs.
* A pilot on seed 0 trained the models and merged nothing. Before and after fine-tuning, its accuracies on 200 texts
  were 84.0 and 91.5 (tweets), 77.0 and 95.0 (bbc), 35.0 and 69.5 (newsgroups), 54.5 and 90.5 (spam). Nothing changed
  after it but the numbers of texts, so that three seeds fit into 90 CPU-minutes.
* Rows and searches are those of ``structure``, chosen by the mean accuracy on the validation texts alone.
* Language-model loss (nats a token) on 100 sentences of newspaper editorials, which belong to no task, for each row and
  for the model before its fine-tuning, so that forgetting shows. Nothing is chosen by it.
* Seeds 31, 32 and 33. A seed draws texts and order; there is no dropout.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from scripts.experiments import device, language, structure_report
from scripts.experiments.encoder import LOG
from scripts.experiments.language import Recipe, States
from scripts.experiments.runner import TIMINGS, Experiment, Result, Settings, main
from scripts.experiments.structure_merges import ROWS, Models, Scores, Weights, compared, rows
from scripts.experiments.structure_report import Cell
from scripts.experiments.tables import Table, mean_sd
from squisher_mergekit import Fisher, load_fisher

BEFORE, LOSS = "base", "loss"
LABEL = "the model before its fine-tuning"
Measure = Callable[[Weights | None], Scores]
# From a recipe, its number, the layers, their published weights and the states of the training prompts to the merged
# weights, their Fisher, and a folder with the log.
Train = Callable[[Recipe, int, Any, Weights, States], tuple[Weights, Fisher, Path]]


def cell(settings: Settings, work: Path) -> Result:
    """Fine-tune, search, merge and score for one seed."""
    models, measured, training = trained(settings, work)
    result = separated(compared(models, rows(len(models.weights)), measured), measured(models.base))
    result[TIMINGS]["training"] = training
    return result


def trained(settings: Settings, work: Path, train: Train | None = None) -> tuple[Models, Measure, float]:
    """Return the models of a seed, fine-tuned on the first call.

    Args:
        settings: Settings of the cell.
        work: Folder of the published model and of trained ones.
        train: Function that fine-tunes a model; by default all weights of the last layers.

    Returns:
        The models; the function from merged weights, or None for each model's own, to the accuracies on test texts and
        the loss on general text; and the CPU time of the fine-tuning.
    """
    given = {name: settings[name] for name in ("seed", "steps", "train", "validation", "test", "layers", "length")}
    recipes = {task: Recipe(task, **given) for task in settings["tasks"]}
    bottom, top = language.split(work, settings["layers"])
    start, weights, fishers, folders, parts = language.layers_of(top), {}, {}, [], {}
    for place, (task, recipe) in enumerate(recipes.items()):
        own = recipe.parts()
        found = {
            part: language.states(bottom, *language.prompts_of(recipe, getattr(own, part), work))
            for part in ("train", "validation", "test")
        }
        prompts = found.pop("train")
        made = (train or _whole(work))(recipe, place, top, start, prompts)
        weights[task], fishers[task], parts[task] = made[0], made[1], found
        folders.append(made[2])
    other = language.general(settings["general"], settings["length"], settings["seed"], work)
    elsewhere = language.states(bottom, other, None)
    first = {task: language.answers(task, work) for task in recipes}
    base = {name: start[name] for name in next(iter(weights.values()))}

    def score(merged: Weights | None, part: str) -> Scores:
        found = {}
        for task, own in weights.items():
            language.load(top, own if merged is None else merged)
            found[task] = language.accuracy(top, parts[task][part], first[task])
        return found

    def measured(merged: Weights | None) -> Scores:
        found = score(merged, "test")
        losses = []
        for own in weights.values() if merged is None else [merged]:
            language.load(top, own)
            losses.append(language.loss(top, elsewhere))
        return {**found, LOSS: round(sum(losses) / len(losses), 6)}

    seconds = sum(json.loads((folder / LOG).read_text())["cpu_seconds"] for folder in folders)
    return Models(base, weights, fishers, score), measured, round(seconds, 2)


def _whole(work: Path) -> Train:
    """Return the fine-tuning of all weights of the last layers."""

    def train(recipe: Recipe, place: int, top: Any, start: Weights, given: States) -> tuple[Weights, Fisher, Path]:
        folder = language.fine_tune(recipe, top, start, given, work)
        return device.placed(load_file(folder / "model.safetensors")), load_fisher(folder), folder

    return train


def separated(result: Result, base: Scores) -> Result:
    """Return a result with the scores of the base, and the losses apart from the accuracies."""
    test = {**result["test"], BEFORE: base}
    losses = {row: found[LOSS] for row, found in test.items()}
    accuracies = {row: {task: value for task, value in found.items() if task != LOSS} for row, found in test.items()}
    return {**result, "test": accuracies, LOSS: losses}


FULL: dict[str, Any] = {
    "tasks": tuple(language.PROMPTS),
    "steps": 40,
    "train": 320,
    "validation": 40,
    "test": 100,
    "layers": 10,
    "length": 48,
    "general": 100,
}
QUICK = {
    **FULL,
    "tasks": ("tweets", "spam"),
    "steps": 4,
    "train": 32,
    "validation": 10,
    "test": 20,
    "layers": 2,
    "general": 8,
}
EXPERIMENT = Experiment(
    "structure_language",
    "Merges of a generative model with a structure.",
    cell,
    full=[{"seed": seed, **FULL} for seed in (31, 32, 33)],
    quick=[{"seed": 0, **QUICK}],
)


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return the table of accuracies, and the one of losses on general text."""
    cells = report["cells"]
    count = structure_report.seeds(cells, report, 1)
    title = f"**Four tasks as prompts of a generative model.** Accuracy in %, mean ± standard deviation over {count}"
    labels = {BEFORE: LABEL, **ROWS}
    return [
        structure_report.compared(cells, title, labels, notes=structure_report.rest(report, EXPERIMENT.name)),
        losses(cells, labels, count),
    ]


def losses(cells: Sequence[Cell], labels: Mapping[str, str], count: str) -> Table:
    """Return the table of losses on general text.

    Args:
        cells: Cells with the losses of their rows.
        labels: Label of each row.
        count: Number of seeds as text.
    """
    found = {row: [one["result"][LOSS][row] for one in cells] for row in labels}
    changes = {row: [a - b for a, b in zip(values, found[BEFORE], strict=True)] for row, values in found.items()}
    body = [(label, [mean_sd(found[row], 3), mean_sd(changes[row], 3)]) for row, label in labels.items()]
    title = (
        f"**Loss on general text**, nats a token, {cells[0]['settings']['general']} sentences of editorials, {count}"
    )
    return Table(title, ["loss", "more than before fine-tuning"], body)


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the picture of mean accuracies by row."""
    groups = {"four tasks as prompts": report["cells"]}
    return {"structure_language.png": structure_report.picture(groups, list(ROWS))}


if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
