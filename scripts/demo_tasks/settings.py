"""The two settings of the demo: texts, models and merges, and the configuration of a merge for mergekit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.demo_tasks.data import SENTIMENT_BASE, SENTIMENT_DOMAINS, TASKS, Source

SWAPPED = "squisher, swapped accumulators"


@dataclass(frozen=True)
class Merge:
    """Row of the table.

    Attributes:
        name: label of the row.
        method: merge method.
        with_base: True if the merge takes the common base.
        swapped: True if each model gets the accumulator of the next model, as a control.
    """

    name: str
    method: str
    with_base: bool = False
    swapped: bool = False

    @property
    def reads_fisher(self) -> bool:
        """True if the method reads accumulators."""
        return "squisher" in self.method


@dataclass(frozen=True)
class Setting:
    """Models of a demo, their data, and their merges.

    Attributes:
        name: name of the setting, and of its folder.
        base: data set of the common base, or empty.
        sources: data set of each model.
        labels: width of the classifiers.
        own_heads: True if each task is scored with the head of its own model; otherwise all share a merged head.
        merges: rows of the table.
        n_train: number of training texts of a task.
        n_test: number of held-out texts of a task.
        seed_stride: difference between the seeds of two runs. At 0 the heads start equal, as in runs with the same
            seed. That ties class i of every task to one direction of the encoder, which hurts the plain average most.
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
        """Description of the scoring, for a line below the table."""
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
    labels=5,  # the largest number of classes of a task, so that all heads have one shape
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
    """Return the configuration of a merge as JSON, which is YAML, with absolute paths, which are no Hub ids.

    Args:
        merge: Row of the table.
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
    """Return the bytes of the weights and of the ``optimizer.pt`` files that a merge opens."""
    folders = [*models.values(), *([base] if merge.with_base and base is not None else [])]
    weights = sum((folder / "model.safetensors").stat().st_size for folder in folders)
    accumulators = sum((folder / "optimizer.pt").stat().st_size for folder in folders) if merge.reads_fisher else 0
    return weights, accumulators
