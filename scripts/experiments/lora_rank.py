"""Rank correlation of lifted and recorded Fishers of a LoRA with the average of the squared gradient of W itself.

The published encoder trains a LoRA on one text task, as in ``structure_adapters``. Hooks of this module form the
gradient G of each wrapped weight and average ``G^2`` entry by entry, after clipping; that average, of the size of the
weights, is the truth. Three Fishers of rank 1 are compared with it within each of the 36 weights:

* *lifted* from the adapter and its optimizer's state (``squisher extract --lift``),
* *recorded* by :class:`~squisher_mergekit.training.LoraRecorder`,
* *rows x columns*: the means of the truth itself, the most that rank 1 can show.

Rank correlations are Spearman's. Of each run the median over the weights is taken. Besides, the scale of a Fisher is
``log(mean F / mean G^2)`` of a weight; its mean over weights and its standard deviation show bias and error.

Decided before a run was looked at: the task bbc, 40 steps, seeds 51 to 53, and the settings of ``structure_adapters``.
"""

import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from scripts.experiments import encoder, structure_adapters, structure_tasks
from scripts.experiments.runner import Experiment, Result, Settings, main
from scripts.experiments.tables import Table, mean_sd
from squisher_mergekit import load_fisher
from squisher_mergekit.fisher.compact import outer_of_means
from squisher_mergekit.fisher.compare import spearman
from squisher_mergekit.training import LoraRecorder

BETA, BASE = 0.999, "base_model.model."
KINDS = ("lifted", "recorded", "rows x columns")


class SquaredGradients:
    """Average of the squared gradient of each wrapped weight, entry by entry.

    Args:
        adapted: The model of peft.
    """

    def __init__(self, adapted: nn.Module) -> None:
        self._gradients: dict[str, Tensor] = {}
        self._averages: dict[str, Tensor] = {}
        self._steps = 0
        for name, module in adapted.named_modules():
            if hasattr(module, "lora_A"):
                module.register_forward_hook(self._hook(f"{name.removeprefix(BASE)}.weight"))

    def add(self, factor: float) -> None:
        """Add the squares of the gradients since the last call, times a factor before squaring."""
        self._steps += 1
        for name, gradient in self._gradients.items():
            gradient *= factor
            average = self._averages.setdefault(name, torch.zeros_like(gradient))
            average.mul_(BETA).addcmul_(gradient, gradient, value=1 - BETA)
        self._gradients.clear()

    def averages(self) -> dict[str, Tensor]:
        """Return the averages without bias, by name of the weight."""
        return {name: average / (1 - BETA**self._steps) for name, average in self._averages.items()}

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs = args[0].detach().flatten(0, -2)

            def add(gradient: Tensor) -> None:
                new = gradient.flatten(0, -2).mT @ inputs
                self._gradients[name] = self._gradients[name] + new if name in self._gradients else new

            output.register_hook(add)

        return hook


def cell(settings: Settings, work: Path) -> Result:
    """Train an adapter, and compare its Fishers with the truth."""
    (recipe,) = structure_tasks.recipes(settings).values()
    model = encoder.start(recipe, work)
    with tempfile.TemporaryDirectory() as folder:
        base, saved = Path(folder) / "base", Path(folder) / "adapter"
        model.save_pretrained(base)
        model.name_or_path = str(base)
        adapter = settings["adapter"]
        set_seed(recipe.seed + 1000)
        adapted = structure_adapters.with_adapter(model, adapter["r"], adapter["lora_alpha"])
        set_seed(recipe.seed)
        optimizer = torch.optim.AdamW(structure_adapters.groups(adapted, adapter["lr"], adapter["head_lr"]))
        truth, recorder = SquaredGradients(adapted), LoraRecorder(adapted, BETA, recipe.seed)

        def before(step: int, norm: Tensor) -> None:
            truth.add(min(1.0, recipe.clip / (norm.item() + 1e-6)))
            recorder.update()

        log = encoder.fit(adapted, optimizer, recipe, before)
        adapted.save_pretrained(saved)
        torch.save(optimizer.state_dict(), saved / "optimizer.pt")
        lifted, recorded = load_fisher(saved, base=base, lift=True), recorder.fisher()
        weights = {
            name: _compared(square, {"lifted": lifted[name], "recorded": recorded[name]})
            for name, square in truth.averages().items()
        }
    return {"weights": weights, "losses": [log["losses"][0], log["losses"][-1]], "clipped": log["clipped_share"]}


def _compared(truth: Tensor, fishers: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return rank correlation and logarithm of the scale of each Fisher of one weight."""
    exact = {"rows x columns": outer_of_means(truth.mean(1), truth.mean(0))}
    return {
        kind: {
            "spearman": spearman(fisher, truth) or 0.0,
            "log_scale": (fisher.double().mean().log() - truth.double().mean().log()).item(),
        }
        for kind, fisher in {**fishers, **exact}.items()
    }


def medians(report: Mapping[str, Any], kind: str) -> list[float]:
    """Return the median over the weights of a Fisher's rank correlation, for each run."""
    return [
        statistics.median(weight[kind]["spearman"] for weight in one["result"]["weights"].values())
        for one in report["cells"]
    ]


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return the table: a row for each Fisher, with the correlations of the runs and the scale over all weights."""
    rows = []
    for kind in KINDS:
        runs = medians(report, kind)
        scales = [weight[kind]["log_scale"] for one in report["cells"] for weight in one["result"]["weights"].values()]
        cells = [f"{statistics.median(runs):.3f}", ", ".join(f"{one:.3f}" for one in runs), mean_sd(scales, 2)]
        rows.append((kind, cells))
    weights = len(report["cells"][0]["result"]["weights"])
    title = f"**Rank correlation with the average of the squared gradient**, median over {weights} weights of a LoRA"
    return [Table(title, ["median of the runs", "runs", "log of the scale, over weights"], rows)]


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return no picture: the table is small."""
    return {}


_FULL = {**structure_tasks.FULL, "tasks": ("bbc",), "factors_every": 0, "adapter": structure_adapters.ADAPTER}
_QUICK = {**_FULL, "steps": 4, "layers": 1}
EXPERIMENT = Experiment(
    "lora_rank",
    "Rank correlation of lifted and recorded Fishers of a LoRA with the squared gradient of the weights.",
    cell,
    full=[{"seed": seed, "heads": "apart", **_FULL} for seed in (51, 52, 53)],
    quick=[{"seed": 0, "heads": "apart", **_QUICK}],
)


if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
