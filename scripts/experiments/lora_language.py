"""Merges of LoRA adapters of a generative model: three text tasks as prompts, and the loss on general text.

The model and the prompts are those of ``structure_language``: SmolLM2-135M-Instruct, dequantised from four bits, whose
answer is the class with the most likely first token of its word. Each task trains a LoRA of peft on the linear layers
of the last six of thirty layers; all else is frozen, so that the hidden states below are computed once. There is no
head: all models share their outputs. The Fishers of the merged weights are lifted from the adapters' optimizer states.

Decided before a reported seed was looked at:

* Tasks bbc, newsgroups and spam; 240 training texts each, 40 steps of 8, prompts of at most 48 tokens, AdamW, gradients
  clipped at 1. r = 16, alpha = 32; the learning rate of 1e-3 is ten times that of ``structure_language``, a common
  rule for adapters. Each task draws its own A. 30 validation texts and 70 test texts a task.
* Choices by the mean accuracy on the validation texts, one option at a time, with the lists of ``lora_merging``; test
  texts are read once a row. Rows have the meanings of ``lora_merging``.
* Language-model loss (nats a token) on 60 sentences of newspaper editorials, which belong to no task, for each row and
  for the model before its fine-tuning. Nothing is chosen by it.
* Seeds 61, 62 and 63, which no experiment has used. A seed draws texts, order and A.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from scripts.experiments import device, language, lora_report, lora_rows, structure_adapters, structure_language
from scripts.experiments.encoder import LOG
from scripts.experiments.language import Recipe, States
from scripts.experiments.runner import TIMINGS, Experiment, Result, Settings, cached, key, main
from scripts.experiments.structure_merges import Weights, compared
from scripts.experiments.structure_report import rest, seeds
from scripts.experiments.tables import Table
from squisher_mergekit import Fisher, extract, load_fisher
from squisher_mergekit.models.lora.pairs import AdaptedWeights, read_lora
from squisher_mergekit.models.weights import Weights as WeightFiles

LAYERS = r"model\.layers\..*_proj"
"""Names of the modules with an adapter: the linear layers of the trained part."""
LIFTED, GROUP = "lifted", "three tasks as prompts"


def cell(settings: Settings, work: Path) -> Result:
    """Fine-tune adapters, search, merge and score for one seed."""
    adapter = settings["adapter"]

    def train(recipe: Recipe, place: int, top: Any, start: Weights, given: States) -> tuple[Weights, Fisher, Path]:
        base = saved_base(top, settings["layers"], work)
        folder = fine_tune(recipe, adapter, place, top, base, given, work)
        lora = read_lora(WeightFiles(folder, "adapter_model"), WeightFiles(base))
        merged = AdaptedWeights(lora)
        read = device.placed({name: merged.read(name) for name in lora.pairs})
        return read, load_fisher(folder / LIFTED), folder

    models, measured, training = structure_language.trained(settings, work, train)
    table = lora_rows.shared(len(models.weights), adapter["r"])
    result = structure_language.separated(compared(models, table, measured), measured(models.base))
    result[TIMINGS]["training"] = training
    return result


def saved_base(top: Any, layers: int, work: Path) -> Path:
    """Return the folder of the last layers as a model of their own, the base of the adapters."""
    return cached(work / f"smollm2-last-{layers}", top.save_pretrained)


def fine_tune(
    recipe: Recipe, adapter: Mapping[str, Any], number: int, top: Any, base: Path, given: States, work: Path
) -> Path:
    """Fine-tune an adapter of the last layers on training prompts, or return an earlier result.

    Args:
        recipe: Recipe of the fine-tuning.
        adapter: Rank, alpha and learning rate.
        number: Number of the task, which draws the matrices A.
        top: The last layers, which end as they began.
        base: Folder of the last layers.
        given: Hidden states of the training prompts.
        work: Folder of trained models.

    Returns:
        The folder of the adapter, with the state of its optimizer, ``lifted`` with the Fisher of the merged weights,
        and ``log.json`` as of :func:`language.fit`.
    """

    def make(folder: Path) -> None:
        top.name_or_path = str(base)
        set_seed(recipe.seed + 1000 * (number + 1))
        adapted: Any = structure_adapters.with_adapter(top, adapter["r"], adapter["lora_alpha"], LAYERS, heads=False)
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=adapter["lr"])
        log = language.fit(top, optimizer, recipe, given)
        adapted.save_pretrained(folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        adapted.unload()
        extract(folder, folder / LIFTED, base=base, lift=True, examples_per_step=recipe.batch)
        (folder / LOG).write_text(json.dumps(log))

    return cached(work / "models" / f"smollm2-lora-{recipe.data}-{key(asdict(recipe), adapter, number)}", make)


_ADAPTER = {"r": 16, "lora_alpha": 32, "lr": 1e-3}
_FULL: dict[str, Any] = {
    "tasks": ("bbc", "newsgroups", "spam"),
    "steps": 40,
    "train": 240,
    "validation": 30,
    "test": 70,
    "layers": 6,
    "length": 48,
    "general": 60,
    "adapter": _ADAPTER,
}
_QUICK = {**_FULL, "steps": 4, "train": 40, "validation": 10, "test": 30, "layers": 2, "general": 8}
EXPERIMENT = Experiment(
    "lora_language",
    "Merges of LoRA adapters of a generative model.",
    cell,
    full=[{"seed": seed, **_FULL} for seed in (61, 62, 63)],
    quick=[{"seed": 0, **_QUICK}],
    gpu=True,
)


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return the tables of accuracies and differences, and the one of losses on general text."""
    cells = report["cells"]
    count = seeds(cells, report, 1)
    title = (
        f"**Three LoRA adapters of a generative model, r = {cells[0]['settings']['adapter']['r']}.** Accuracy in %, "
        f"mean ± standard deviation over {count}, {cells[0]['settings']['test']} held-out texts a task"
    )
    labels = {row: label for row, label in lora_report.ROWS.items() if row in cells[0]["result"]["test"]}
    return [
        *lora_report.tables(title, {GROUP: cells}, rest(report, EXPERIMENT.name)),
        structure_language.losses(cells, labels, count),
    ]


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the picture of mean accuracies by row."""
    return {"lora_language.png": lora_report.picture({GROUP: report["cells"]})}


if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
