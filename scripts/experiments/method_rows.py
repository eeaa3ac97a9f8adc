"""Merge methods side by side: their settings, and the search for the best one on validation texts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from scripts.experiments.runner import TIMINGS, Result, cpu_seconds, key
from scripts.experiments.structure_merges import (
    LAMBDAS,
    SHARES,
    Models,
    Options,
    Scores,
    Weights,
    mean,
    merged,
    moved,
    over_base,
    shown,
    structured,
)
from squisher_mergekit.recipes.grid import points

BUDGET = 9  # settings of a method
SCALE = "lambda"
MERGEKIT, OTA, VOTES, STRUCTURE = "mergekit", "ota", "votes", "structure"
ROWS = {
    "single": "single models, each on its own task",
    "linear": "`linear`, the plain average",
    "multislerp": "`multislerp`",
    "karcher": "`karcher`",
    "model_stock": "`model_stock`",
    "task_arithmetic": "`task_arithmetic`",
    "ties": "`ties`",
    "dare_linear": "`dare_linear`",
    "dare_ties": "`dare_ties`",
    "della": "`della`",
    "della_linear": "`della_linear`",
    "breadcrumbs": "`breadcrumbs`",
    "breadcrumbs_ties": "`breadcrumbs_ties`",
    "sce": "`sce`",
    "ram": "`ram`",
    "ramplus_tl": "`ramplus_tl`",
    "ota-whole": "OTA-merge without its mask",
    "ota": "OTA-merge",
    "squisher": "`squisher` (Eq. 13)",
    "density": "`squisher` + `density`",
    "change-base": "`squisher` + `density_by: change` of the model",
    "change": "`squisher` + the same, `trimmed: abstain`",
    "sign": "`squisher` + `consensus: sign`",
    "change-sign": "`squisher` + `change`, `abstain` and `sign`",
    "ubgm": "`ubgm_squisher`",
    "rows": "`structure: rows`",
    "columns": "`structure: columns`",
    "kron": "`structure: kron`",
    "kron-density": "`structure: kron` + `density`, `abstain`",
}


@dataclass(frozen=True)
class Method:
    """Merge method with the settings that a search tries.

    Attributes:
        make: Function from models and the options of a setting, apart from lambda, to the merged weights.
        settings: Options of each setting, the first of equals wins.
        family: ``mergekit``, ``ota``, ``votes`` or ``structure``.
    """

    make: Callable[..., Weights]
    settings: Sequence[Options]
    family: str = MERGEKIT


def grid(**lists: Sequence[Any]) -> list[dict[str, Any]]:
    """Return a setting for each combination of values; the last option changes first.

    Example:
        >>> grid(density=(0.1, 0.2), epsilon=(1,))
        [{'density': 0.1, 'epsilon': 1}, {'density': 0.2, 'epsilon': 1}]
    """
    return list(points(lists))


def methods(count: int, seed: int, widest: int = 1536, most: int = BUDGET) -> dict[str, Method]:
    """Return the methods by their keys in ``ROWS``.

    Args:
        count: Number of models, M.
        seed: Seed of the methods that draw entries.
        widest: Largest side of a matrix, as a block that couples all.
        most: Largest number of settings of a method; the first ones are taken.
    """
    found = averages() | task_vectors(count, seed) | votes() | structures(widest)
    return {name: replace(method, settings=method.settings[:most]) for name, method in found.items()}


def averages() -> dict[str, Method]:
    """Return the methods of mergekit whose result is an average of the models."""
    longer = (1.0, 0.5, 0.7, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
    around = [*grid(origin=("base",), **{SCALE: (1.0, 0.5, 0.7, 1.5, 2.0)})]
    around += grid(origin=("zero",), **{SCALE: (1.0, 1.5, 2.0, 3.0)})
    return {
        "linear": Method(lambda models: merged(models.weights, "linear", weight=1.0), [{}]),
        "multislerp": Method(_multislerp, around),
        "karcher": Method(lambda models: merged(models.weights, "karcher"), grid(**{SCALE: longer})),
        "model_stock": Method(_over("model_stock"), grid(filter_wise=(False, True), **{SCALE: (1.0, 1.5, 2.0, 3.0)})),
    }


def task_vectors(count: int, seed: int) -> dict[str, Method]:
    """Return the methods of mergekit that merge task vectors; sums start at the scale of an average, 1/M."""
    mean_scales = {SCALE: LAMBDAS}
    sum_scales = {SCALE: tuple(times / count for times in (1, 2, 3))}
    elected_scales = {SCALE: _once(2 / count, 3 / count, 1.0)}
    weights = _once(1 / count, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 1.0)
    drawn, kept = (0.5, 0.1, 0.9), (0.3, 0.1, 0.6)
    thresholds = (1e-5, 1e-4, 1e-3)

    return {
        "task_arithmetic": Method(_over("task_arithmetic"), grid(weight=weights)),
        "ties": Method(_over("ties", weight=1.0), grid(density=SHARES, **mean_scales)),
        "dare_linear": Method(seeded("dare_linear", seed), grid(density=drawn, **sum_scales)),
        "dare_ties": Method(seeded("dare_ties", seed), grid(density=drawn, **elected_scales)),
        "della": Method(seeded("della", seed), grid(density=kept, **mean_scales)),
        "della_linear": Method(seeded("della_linear", seed), grid(density=kept, **sum_scales)),
        "breadcrumbs": Method(_over("breadcrumbs", weight=1.0), grid(density=kept, **sum_scales)),
        "breadcrumbs_ties": Method(_over("breadcrumbs_ties", weight=1.0), grid(density=kept, **elected_scales)),
        "sce": Method(_over("sce"), grid(select_topk=(1.0, 0.1, 0.3), **mean_scales)),
        "ram": Method(_over("ram"), grid(epsilon=thresholds, **mean_scales)),
        "ramplus_tl": Method(_over("ramplus_tl"), grid(epsilon=thresholds, **mean_scales)),
    }


def votes() -> dict[str, Method]:
    """Return OTA-merge and the diagonal merges of this package."""
    scaled = {SCALE: LAMBDAS}
    normalized = grid(normalize=("none", "mean", "l2"), **scaled)
    shares = grid(density=SHARES, **scaled)
    change = {"density_by": "change", "density_scope": "model", "normalize": "none"}
    abstain = {**change, "trimmed": "abstain"}
    return {
        "ota-whole": Method(squisher_with(power=0.5), normalized, OTA),
        "ota": Method(squisher_with(power=0.5, **abstain), shares, OTA),
        "squisher": Method(squisher_with(), normalized, VOTES),
        "density": Method(squisher_with(normalize="none"), grid(density=(0.3, 0.1, 0.6), **scaled), VOTES),
        "change-base": Method(squisher_with(**change), shares, VOTES),
        "change": Method(squisher_with(**abstain), shares, VOTES),
        "sign": Method(squisher_with(consensus="sign"), normalized, VOTES),
        "change-sign": Method(squisher_with(consensus="sign", **abstain), shares, VOTES),
        "ubgm": Method(_ubgm, grid(weight=(1.0, 0.5, 0.25), prior=(0.0, 0.1, 1.0)), VOTES),
    }


def structures(widest: int) -> dict[str, Method]:
    """Return the merges by a structure."""

    def by(kind: str, **fixed: Any) -> Callable[..., Weights]:
        return lambda models, **options: structured(models, kind, **fixed, **options)

    return {
        "rows": Method(by("rows"), grid(block=(128, 384, widest), **{SCALE: LAMBDAS}), STRUCTURE),
        "columns": Method(by("columns"), grid(block=(128, 384, widest), **{SCALE: LAMBDAS}), STRUCTURE),
        "kron": Method(by("kron"), grid(block=(128, 32, 384), **{SCALE: LAMBDAS}), STRUCTURE),
        "kron-density": Method(
            by("kron", trimmed="abstain"), grid(density=(0.5, 0.2, 0.1), **{SCALE: LAMBDAS}), STRUCTURE
        ),
    }


def _once(*values: float) -> tuple[float, ...]:
    """Return the values without repetitions."""
    return tuple(dict.fromkeys(values))


def _over(method: str, **fixed: Any) -> Callable[..., Weights]:
    """Return a merge over the base by a method of mergekit."""
    return lambda models, **options: over_base(models, method, **fixed, **options)


def _multislerp(models: Models, origin: str) -> Weights:
    """Return the merge on a sphere around the base, or around 0."""
    over = over_base if origin == "base" else lambda given, *found, **options: merged(given.weights, *found, **options)
    return over(models, "multislerp", weight=1.0)


def seeded(method: str, seed: int) -> Callable[..., Weights]:
    """Return a merge that draws entries, with draws of its own for each setting."""

    def make(models: Models, density: float) -> Weights:
        spread = {"epsilon": min(0.15, density / 2)} if method.startswith("della") else {}
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(int(key(method, seed, density), 16) % 2**63)
            return over_base(models, method, weight=1.0, density=density, **spread)

    return make


def squisher_with(**fixed: Any) -> Callable[..., Weights]:
    """Return a diagonal merge by the options of ``squisher``."""

    def make(models: Models, **options: Any) -> Weights:
        rates = {"base": 0.0, **dict.fromkeys(models.weights, 1.0)}
        return over_base(
            models, "squisher", fisher={"base": "none", **models.fishers}, weight=rates, **{**fixed, **options}
        )

    return make


def _ubgm(models: Models, **options: Any) -> Weights:
    """Return the merge by ``ubgm_squisher``; the base has no Fisher."""
    return over_base(models, "ubgm_squisher", fisher={"base": "none", **models.fishers}, **options)


@dataclass
class Choice:
    """Best setting of a method.

    Attributes:
        options: Options of the setting.
        weights: Merged weights.
        seconds: CPU time of one merge with it.
        accuracy: Mean accuracy on the validation texts.
        tried: Accuracy of every setting.
    """

    options: Options
    weights: Weights
    seconds: float
    accuracy: float
    tried: dict[str, float]


def best(models: Models, method: Method) -> Choice:
    """Return the setting with the best mean accuracy on the validation texts; of equal ones the first.

    Settings that differ in lambda alone share a merge.
    """
    found: Choice | None = None
    tried: dict[str, float] = {}
    for options, weights, seconds in _merges(models, method):
        accuracy = round(mean(models.score(weights, "validation")), 4)
        tried[shown(options)] = accuracy
        if found is None or accuracy > found.accuracy:
            found = Choice(options, weights, seconds, accuracy, tried)
    if found is None:
        raise ValueError("a method must have a setting, found none")
    return found


def _merges(models: Models, method: Method) -> Iterator[tuple[Options, Weights, float]]:
    """Yield each setting with its merged weights and the CPU time of the merge."""

    def unscaled(options: Options) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name != SCALE}

    for given, group in groupby(method.settings, unscaled):
        began = cpu_seconds()
        weights = method.make(models, **given)
        seconds = round(cpu_seconds() - began, 2)
        for options in group:
            scale = options.get(SCALE, 1.0)
            yield options, weights if scale == 1 else moved(models, weights, scale), seconds


def compared(models: Models, table: Mapping[str, Method], score: Callable[..., Scores] | None = None) -> Result:
    """Search, merge and score each method, and each model on its own task; test texts are read once a method.

    Args:
        models: The models.
        table: The methods.
        score: Function from merged weights, or None for each model's own, to the scores on test texts; by default the
            accuracy on each task.

    Returns:
        ``test``: scores of each row; ``validation``: accuracy of its chosen setting; ``chosen`` and ``searched``:
        options; and the CPU time of one merge with the chosen setting under ``TIMINGS``.
    """
    measure = score or (lambda weights: models.score(weights, "test"))
    result: Result = {"test": {"single": measure(None)}, "validation": {}, "chosen": {}, "searched": {}}
    seconds = {}
    for name, method in table.items():
        choice = best(models, method)
        result["test"][name] = measure(choice.weights)
        result["validation"][name] = choice.accuracy
        result["chosen"][name], result["searched"][name] = dict(choice.options), choice.tried
        seconds[name] = choice.seconds
    return {**result, TIMINGS: {"merge": seconds}}
