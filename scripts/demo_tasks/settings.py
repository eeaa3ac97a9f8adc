"""The two settings: which texts, which models, which merges, and how a merge is written for mergekit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.demo_tasks.data import SENTIMENT_BASE, SENTIMENT_DOMAINS, TASKS, Source

SWAPPED = "squisher, swapped accumulators"


@dataclass(frozen=True)
class Merge:
    """A row of the table. ``swapped``: each model gets the accumulator of the next one, as a control."""

    name: str
    method: str
    with_base: bool = False
    swapped: bool = False

    @property
    def reads_fisher(self) -> bool:
        """Whether the method reads accumulators at all."""
        return "squisher" in self.method


@dataclass(frozen=True)
class Setting:
    """What is trained and merged.

    ``base``: the data set on which the common base is fine-tuned first, if any. ``sources``: one model each.
    ``own_heads``: each task is scored with the head of its own model; otherwise all share one, which is merged too.
    ``seed_stride``: between the seeds of the runs. At 0, heads start equal, as in runs that all fix the same seed; that
    ties class i of every task to one direction of the encoder, which the plain average suffers from most.
    """

    name: str
    base: Mapping[str, Source]
    sources: Mapping[str, Source]
    labels: int
    own_heads: bool
    merges: tuple[Merge, ...]
    n_train: int = 800
    n_test: int = 200
    seed_stride: int = 0

    @property
    def scoring(self) -> str:
        """How a row is scored, as a line under the table."""
        if self.own_heads:
            scored = "Each set is scored with the pooler and classifier of its own model on the encoder of the row.\n"
            if self.seed_stride:
                return scored + "Each run had a seed of its own, so the heads started apart."
            return scored + (
                "All runs had one seed, so the heads started equal, which hurts the plain average; with --own-seeds"
                " it is far better,\nand little or nothing is left to gain on it."
            )
        return "Every row is scored as it is: pooler and classifier are shared and merged with the rest."


FOUR_TASKS = Setting(
    name="tasks",
    base={},
    sources=TASKS,
    labels=5,  # as many as the task with the most classes has, so that the heads have one shape
    own_heads=True,
    merges=(Merge("linear", "linear"), Merge("squisher", "squisher"), Merge(SWAPPED, "squisher", swapped=True)),
)
SHARED_HEAD = Setting(
    name="ubgm",
    base=SENTIMENT_BASE,
    sources=SENTIMENT_DOMAINS,
    labels=2,
    own_heads=False,
    merges=(
        Merge("linear", "linear"),
        Merge("task_arithmetic", "task_arithmetic", with_base=True),
        Merge("squisher", "squisher"),
        Merge("ubgm_squisher", "ubgm_squisher", with_base=True),
    ),
)


def merge_config(merge: Merge, models: Mapping[str, Path], base: Path | None) -> str:
    """Return the configuration for mergekit. JSON is YAML; paths are absolute, so that no name is taken for a Hub id.

    Args:
        merge: The method and what it is given.
        models: Checkpoint of each model, each with its ``optimizer.pt``, which ``fisher: auto`` finds.
        base: Checkpoint of the base, if there is one.
    """
    names = list(models)
    entries = []
    for number, name in enumerate(names):
        parameters: dict[str, float | str] = {} if merge.method == "squisher" else {"weight": 1.0}
        if merge.swapped:
            parameters["fisher"] = str(models[names[(number + 1) % len(names)]].resolve())
        entries.append({"model": str(models[name].resolve()), **({"parameters": parameters} if parameters else {})})
    config: dict[str, object] = {"merge_method": merge.method, "models": entries, "dtype": "float32"}
    if merge.with_base:
        assert base is not None, merge.name
        config["base_model"] = str(base.resolve())
    return json.dumps(config, indent=2) + "\n"


def bytes_read(merge: Merge, models: Mapping[str, Path], base: Path | None) -> tuple[int, int]:
    """Return the sizes of the files that a merge opens: of weights, and of ``optimizer.pt`` with its first moments."""
    folders = [*models.values(), *([base] if merge.with_base and base is not None else [])]
    weights = sum((folder / "model.safetensors").stat().st_size for folder in folders)
    accumulators = sum((folder / "optimizer.pt").stat().st_size for folder in folders) if merge.reads_fisher else 0
    return weights, accumulators
