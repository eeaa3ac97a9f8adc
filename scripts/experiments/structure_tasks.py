"""Six text tasks over one base, with heads of their own, for the experiments on structures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from scripts.experiments import device, encoder
from scripts.experiments.encoder import Recipe
from scripts.experiments.merging import HEADS, TASKS, task_recipe
from scripts.experiments.merging import Models as TaskModels
from scripts.experiments.runner import Settings
from scripts.experiments.structure_merges import Models
from squisher_mergekit import Fisher, load_fisher

SEEDS = (41, 42, 43, 44, 45)
FIRST_SEEDS = SEEDS[:3]
FULL: dict[str, Any] = {
    "tasks": TASKS,
    "steps": 40,
    "keep_at": (),
    "layers": 6,
    "length": 32,
    "train": 640,
    "validation": 40,
    "test": 160,
    "factors_every": 4,
}
QUICK = {**FULL, "tasks": TASKS[:2], "steps": 4, "layers": 1, "test": 40}
FULL_CELLS = [{"seed": seed, "heads": heads, **FULL} for seed in SEEDS for heads in HEADS]
FIRST_CELLS = [cell for cell in FULL_CELLS if cell["seed"] in FIRST_SEEDS]
QUICK_CELLS = [{"seed": 0, "heads": "equal", **QUICK}]


def trained(settings: Settings, work: Path) -> tuple[TaskModels, Models, float]:
    """Return the models of a seed, fine-tuned on the first call, and the CPU time of their fine-tuning."""
    found = recipes(settings)
    return opened({task: encoder.fine_tune(recipe, work) for task, recipe in found.items()}, found, work)


def recipes(settings: Settings) -> dict[str, Recipe]:
    """Return the recipe of each task's model."""
    return {task: task_recipe(settings, number, task) for number, task in enumerate(settings["tasks"])}


def opened(
    folders: Mapping[str, Path], recipes: Mapping[str, Recipe], work: Path, fisher_texts: int = 0
) -> tuple[TaskModels, Models, float]:
    """Return the fine-tuned models of a seed, and the CPU time of their fine-tuning.

    Args:
        folders: Folder of each task, as :func:`encoder.fine_tune` describes it.
        recipes: Recipe of each task.
        work: Folder of the published encoder.
        fisher_texts: Number of training texts for an empirical Fisher.

    Returns:
        The models with their heads and texts; the same models over the published encoder, with the tensors that have a
        Fisher, which are those that were trained; and the CPU seconds.
    """
    tasks = TaskModels({task: folder / "final" for task, folder in folders.items()}, recipes, fisher_texts)
    seconds = sum(json.loads((folder / encoder.LOG).read_text())["cpu_seconds"] for folder in folders.values())
    fishers = dict(zip(recipes, tasks.squishers, strict=True))
    base = published(work, next(iter(recipes.values())).layers)
    merged = [name for name in base if any(name in fisher for fisher in fishers.values())]
    weights = {task: {name: trunk[name] for name in merged} for task, trunk in zip(recipes, tasks.trunks, strict=True)}
    models = {task: device.placed(found) for task, found in weights.items()}
    origin = device.placed({name: base[name] for name in merged})
    return tasks, Models(origin, models, fishers, tasks.score), round(seconds, 2)


def recorded(settings: Settings, work: Path) -> dict[str, Fisher]:
    """Return the Squishers of a seed's models with the factors that were recorded during the fine-tuning."""
    return {
        task: load_fisher(encoder.fine_tune(recipe, work) / "final" / encoder.RECORDED)
        for task, recipe in recipes(settings).items()
    }


def published(work: Path, layers: int) -> Mapping[str, Tensor]:
    """Return the weights of the published encoder that are merged."""
    model = encoder.load(encoder.encoder(work), layers=layers)
    return {name: tensor.detach() for name, tensor in model.named_parameters() if not name.startswith(encoder.HEAD)}
