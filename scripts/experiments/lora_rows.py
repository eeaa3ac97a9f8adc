"""Merges of models that were trained as LoRA adapters, for the experiments on them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.experiments import method_rows, structure_merges
from scripts.experiments.structure_merges import LAMBDAS, Models, Row, Weights, diagonal, linear, merged, scaled
from squisher_mergekit import Fisher, load_fisher
from squisher_mergekit.models.lora.low_rank import factorised
from squisher_mergekit.models.lora.pairs import LoraAdapter, read_lora
from squisher_mergekit.models.weights import Weights as WeightFiles

_CHANGE = {"density_by": "change", "density_scope": "model", "trimmed": "abstain"}
VOTES: Mapping[str, Mapping[str, Any]] = {
    "all": {},
    "change 0.1": {"density": 0.1, **_CHANGE},
    "change 0.05": {"density": 0.05, **_CHANGE},
    "change 0.2": {"density": 0.2, **_CHANGE},
    "sign": {"consensus": "sign"},
}
OUT = {"out-r": 1, "out-2r": 2, "out-4r": 4}


def shared(count: int, rank: int) -> dict[str, Row]:
    """Return the rows of merges that need no more than the models and their lifted Fishers.

    Args:
        count: Number of models.
        rank: Rank r of the adapters.
    """
    known = structure_merges.rows(count)
    return {
        "linear": Row(linear),
        "task_arithmetic": known["task_arithmetic"],
        "ties": known["ties"],
        "one": Row(by_one_number),
        "lifted": Row(diagonal),
        "lifted-options": Row(scaled(with_votes), {"votes": tuple(VOTES), "lambda": LAMBDAS}),
        "control": Row(lambda models: diagonal(with_another(models))),
        **{
            row: Row(lambda models, times=times: of_rank(models, diagonal(models), times * rank))
            for row, times in OUT.items()
        },
    }


def dare_ties(count: int, seed: int) -> Row:
    """Return the row of DARE-TIES, with draws of its own for each seed and density.

    Args:
        count: Number of models.
        seed: Seed of the draws.
    """
    scales = tuple(dict.fromkeys((2 / count, 3 / count, 1.0)))
    return Row(scaled(method_rows.seeded("dare_ties", seed)), {"density": (0.5, 0.1, 0.9), "lambda": scales})


def by_one_number(models: Models) -> Weights:
    """Return the average in which each model has one weight, the mean of its Fisher over all entries."""
    count = sum(origin.numel() for origin in models.base.values())
    means = {
        task: sum(fisher[name].sum(dtype=torch.float64).item() for name in models.base) / count
        for task, fisher in models.fishers.items()
    }
    most = max(means.values())
    return merged(models.weights, "linear", weight={task: mean / most for task, mean in means.items()})


def with_votes(models: Models, votes: str) -> Weights:
    """Return the diagonal merge with the options of a key of ``VOTES``."""
    return method_rows.squisher_with(normalize="none", **VOTES[votes])(models)


def with_another(models: Models) -> Models:
    """Return the models, each with the Fisher of the next one."""
    fishers = list(models.fishers.values())
    return replace(models, fishers=dict(zip(models.fishers, fishers[1:] + fishers[:1], strict=True)))


def with_fishers(models: Models, fishers: Sequence[Fisher]) -> Models:
    """Return the models with other Fishers, in their order."""
    return replace(models, fishers=dict(zip(models.fishers, fishers, strict=True)))


def of_rank(models: Models, weights: Weights, rank: int) -> Weights:
    """Return the base with the change to merged weights as an adapter of a rank, as ``--as-adapter`` writes it."""
    found = {}
    for name, origin in models.base.items():
        a, b, _, _ = factorised(weights[name] - origin, min(rank, *origin.shape))
        found[name] = origin + b @ a
    return found


class Factors:
    """Matrices A and B of the adapters of several models over one base.

    Args:
        adapters: Folder of each model's adapter, with the state of its optimizer.
        base: Folder with the config of their base.
    """

    def __init__(self, adapters: Mapping[str, Path], base: Path) -> None:
        files = {task: WeightFiles(folder, "adapter_model") for task, folder in adapters.items()}
        self.loras: dict[str, LoraAdapter] = {
            task: read_lora(weights, WeightFiles(base)) for task, weights in files.items()
        }
        self._folders, self._base = adapters, base

    def merged(self, models: Models, *, by_fisher: bool) -> Weights:
        """Return ``W0 + s B A`` with A and B averaged apart from each other.

        Args:
            models: The same models.
            by_fisher: Weight the entries of A and B by the adapters' own Fishers.
        """
        first = next(iter(self.loras.values()))
        names = [factor for pair in first.pairs.values() for factor in (pair.a, pair.b)]
        weights = {task: {name: lora.weights.read(name) for name in names} for task, lora in self.loras.items()}
        if by_fisher:
            fishers = {task: load_fisher(folder, base=self._base) for task, folder in self._folders.items()}
            found = merged(weights, "squisher", fisher=fishers)
        else:
            found = merged(weights, "linear", weight=1.0)
        made: dict[str, Tensor] = {}
        for name, origin in models.base.items():
            pair = first.pairs[name]
            made[name] = origin + pair.scale * (found[pair.b] @ found[pair.a])
        return made
