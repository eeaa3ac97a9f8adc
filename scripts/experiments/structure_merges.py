"""Merges, searches and scores that the experiments on structures share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mergekit.merge_methods import merge_state_dicts
from torch import Tensor

from scripts.experiments.runner import TIMINGS, Result, cpu_seconds

Weights = Mapping[str, Tensor]
Scores = dict[str, float]
Options = Mapping[str, Any]
STRUCTURES = ("rows", "columns", "kron")
SHARES, LAMBDAS = (0.1, 0.05, 0.2), (1.0, 0.7, 1.5)
MASKED = {"share": SHARES, "lambda": LAMBDAS}
ROWS = {
    "single": "single models, each on its own task",
    "linear": "plain average (`linear`)",
    "task_arithmetic": "`task_arithmetic`, tuned",
    "ties": "`ties`, tuned",
    "ota": "OTA-merge, tuned",
    "masked": "diagonal with OTA-merge's mask, tuned",
    "diagonal": "`squisher`, diagonal, `normalize` tuned",
    "rows": "`structure: rows`",
    "columns": "`structure: columns`",
    "kron": "`structure: kron`",
    "rows-tuned": "`structure: rows`, tuned",
    "columns-tuned": "`structure: columns`, tuned",
    "kron-tuned": "`structure: kron`, tuned",
}


@dataclass(frozen=True)
class Models:
    """Models over one base, and their scores.

    Attributes:
        base: weights that all were trained from.
        weights: merged weights of each model.
        fishers: Squisher of each model.
        score: function from merged weights, or None for each model's own, and ``validation`` or ``test`` to the
            accuracy in % on each task.
    """

    base: Weights
    weights: Mapping[str, Weights]
    fishers: Mapping[str, Mapping[str, Tensor]]
    score: Callable[[Weights | None, str], Scores]


def mean(found: Mapping[str, float]) -> float:
    """Return the mean of the scores of the tasks."""
    return sum(found.values()) / len(found)


def linear(models: Models) -> Weights:
    """Return the plain average."""
    return merged(models.weights, "linear", weight=1.0)


def merged(weights: Mapping[str, Weights], method: str, base: str | None = None, **parameters: Any) -> Weights:
    """Return the result of a merge method of mergekit, in memory."""
    found: Weights = merge_state_dicts(dict(weights), method, base=base, parameters=parameters)
    return found


def over_base(models: Models, method: str, **parameters: Any) -> Weights:
    """Return the result of a merge method that takes a base."""
    return merged({"base": models.base, **models.weights}, method, "base", **parameters)


def diagonal(models: Models, normalize: str = "none") -> Weights:
    """Return the merge by diagonal Squishers."""
    return merged(models.weights, "squisher", fisher=dict(models.fishers), normalize=normalize)


def structured(models: Models, structure: str, *, use_v: bool = True, **options: Any) -> Weights:
    """Return the merge by a structure; without ``use_v`` the factors follow from the task vectors alone."""
    fishers = {name: fisher if use_v else "none" for name, fisher in models.fishers.items()}
    rates = {"base": 0.0, **dict.fromkeys(models.weights, 1.0)}
    given = {"fisher": {"base": "auto" if use_v else "none", **fishers}, "weight": rates}
    return over_base(models, "squisher", structure=structure, **given, **options)


def moved(models: Models, weights: Weights, scale: float) -> Weights:
    """Return ``theta_0 + scale (theta - theta_0)``, mergekit's lambda."""
    return {name: origin + scale * (weights[name] - origin) for name, origin in models.base.items()}


def masked(models: Models, share: float, power: float) -> Weights:
    """Return the mean of masked task vectors, weighted by ``v^power``.

    A model keeps the share of its entries with the largest ``v d^2`` over all tensors. Entries that it does not keep
    have no vote; an entry that no model keeps is the base's. OTA-merge has a power of 0.5.
    """
    total = {name: torch.zeros_like(origin) for name, origin in models.base.items()}
    votes = {name: torch.zeros_like(origin) for name, origin in models.base.items()}
    for name, weights in models.weights.items():
        steps = {key: weights[key] - origin for key, origin in models.base.items()}
        squares = {key: models.fishers[name][key].to(step.device) for key, step in steps.items()}
        scores = {key: squares[key] * step.square() for key, step in steps.items()}
        least = _threshold(scores.values(), share)
        for key, step in steps.items():
            vote = squares[key].pow(power) * ((scores[key] >= least) & (scores[key] > 0))
            total[key] += vote * step
            votes[key] += vote
    return {
        key: origin + torch.where(votes[key] > 0, total[key] / torch.where(votes[key] > 0, votes[key], 1), 0)
        for key, origin in models.base.items()
    }


def _threshold(scores: Iterable[Tensor], share: float) -> float:
    """Return the smallest score that is kept."""
    flat = torch.cat([score.reshape(-1) for score in scores])
    kept = max(round(share * len(flat)), 1)
    return float(flat.kthvalue(len(flat) - kept + 1).values)


@dataclass(frozen=True)
class Row:
    """Row of a table.

    Attributes:
        make: function from models and options to merged weights.
        lists: values of each option, tried in this order, one option at a time.
        untuned: key of the row with the first value of each option, if there is one.
    """

    make: Callable[..., Weights]
    lists: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    untuned: str = ""


def scaled(make: Callable[..., Weights]) -> Callable[..., Weights]:
    """Return a merge with an option ``lambda``; a search merges once for each value of the other options."""
    kept: dict[str, Weights] = {}

    def make_scaled(models: Models, **options: Any) -> Weights:
        scale, key = options.pop("lambda"), repr((id(models), options))
        if key not in kept:
            kept[key] = make(models, **options)
        return moved(models, kept[key], scale)

    return make_scaled


def _ties(models: Models, density: float) -> Weights:
    return over_base(models, "ties", weight=1.0, density=density)


def _task_arithmetic(models: Models, weight: float) -> Weights:
    return over_base(models, "task_arithmetic", weight=weight)


def rows(count: int, widest: int = 1536) -> dict[str, Row]:
    """Return the rows of merges by their keys in ``ROWS``; the untuned structures come with the tuned ones.

    Args:
        count: Number of models; task arithmetic starts at the plain average.
        widest: Largest side of a matrix, as a block that couples all.
    """

    def by_mask(power: float) -> Row:
        return Row(scaled(lambda models, share: masked(models, share, power)), MASKED)

    def by_structure(kind: str) -> Row:
        blocks = (128, 32, 384) if kind == "kron" else (128, 32, 384, widest)
        return Row(lambda models, block: structured(models, kind, block=block), {"block": blocks}, untuned=kind)

    return {
        "linear": Row(linear),
        "task_arithmetic": Row(_task_arithmetic, {"weight": (1 / count, 0.3, 0.4, 0.6, 1.0)}),
        "ties": Row(scaled(_ties), {"density": SHARES, "lambda": LAMBDAS}),
        "ota": by_mask(0.5),
        "masked": by_mask(1.0),
        "diagonal": Row(diagonal, {"normalize": ("none", "mean", "l2")}),
        **{f"{kind}-tuned": by_structure(kind) for kind in STRUCTURES},
    }


@dataclass
class Trial:
    """Merge with some options.

    Attributes:
        options: the options.
        weights: the merged weights.
        seconds: CPU time of the merge; one that only moves along lambda counts as the whole merge.
        accuracy: mean accuracy on the validation texts; None for a row without a choice.
    """

    options: dict[str, Any]
    weights: Weights
    seconds: float
    accuracy: float | None = None


class Search:
    """Choice of the options of a row, one at a time, by the mean accuracy on the validation texts.

    Attributes:
        first: trial with the first value of each option.
        best: best trial; of equal ones the first.
        tried: accuracy of every trial by its options.
    """

    def __init__(self, models: Models, row: Row) -> None:
        self._models, self._row = models, row
        self._seconds: dict[str, float] = {}
        self.tried: dict[str, float] = {}
        self.first = self.best = self._try({option: values[0] for option, values in row.lists.items()})
        for option, values in row.lists.items():
            start = dict(self.best.options)
            for value in values:
                if (options := {**start, option: value}) != start:
                    trial = self._try(options)
                    self.best = trial if (trial.accuracy or 0) > (self.best.accuracy or 0) else self.best

    def _try(self, options: dict[str, Any]) -> Trial:
        began, key = cpu_seconds(), _unscaled(options)
        weights = self._row.make(self._models, **options)
        self._seconds[key] = round(max(self._seconds.get(key, 0.0), cpu_seconds() - began), 2)
        if not options:
            return Trial(options, weights, self._seconds[key])
        accuracy = round(mean(self._models.score(weights, "validation")), 4)
        self.tried[shown(options)] = accuracy
        return Trial(options, weights, self._seconds[key], accuracy)


def shown(options: Options) -> str:
    """Return options as text."""
    return ", ".join(f"{name} {f'{one:.4g}' if isinstance(one, float) else one}" for name, one in options.items())


def _unscaled(options: Options) -> str:
    return shown({name: value for name, value in options.items() if name != "lambda"})


def compared(models: Models, table: Mapping[str, Row], score: Callable[..., Scores] | None = None) -> Result:
    """Search, merge and score each row, and each model on its own task.

    Args:
        models: The models.
        table: The rows.
        score: Function from merged weights, or None for each model's own, to the scores on test texts; by default the
            accuracy on each task.

    Returns:
        ``test``: scores of each row; ``chosen`` and ``searched``: options; and the CPU time of one merge with the
        chosen options under ``TIMINGS``.
    """
    measure = score or (lambda weights: models.score(weights, "test"))
    test = {"single": measure(None)}
    chosen, searched, seconds = {}, {}, {}
    for name, row in table.items():
        found = Search(models, row)
        seconds[name] = found.best.seconds
        if row.untuned:
            seconds[row.untuned] = found.first.seconds
            test[row.untuned] = measure(found.first.weights)
        same = row.untuned and found.best is found.first
        test[name] = test[row.untuned] if same else measure(found.best.weights)
        if row.lists:
            chosen[name], searched[name] = found.best.options, found.tried
    return {"test": test, "chosen": chosen, "searched": searched, TIMINGS: {"merge": seconds}}
