"""FISH mask: the few weights that a task needs.

``select`` finds them, :class:`~squisher_mergekit.training.MaskedTraining` changes nothing else while training, and
:mod:`~.resetting` gives all others their pre-trained values back afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from squisher_mergekit.applications import scores
from squisher_mergekit.applications.fish_mask.bases import base_of
from squisher_mergekit.applications.fish_mask.heads import Parts, in_memory, of_tensors, parts_by_name
from squisher_mergekit.applications.masks import Mask
from squisher_mergekit.applications.selection import Scope, choose
from squisher_mergekit.errors import ConfigError, ValuesError
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.fits import check_fits
from squisher_mergekit.fisher.mapping import Fisher, check_values, rescaled
from squisher_mergekit.fisher.summary import known_scaling
from squisher_mergekit.models.roles import matching
from squisher_mergekit.models.weights import Weights, check_alike
from squisher_mergekit.tensors.safetensors import MemoryStore

ScoreName = Literal["fisher", "reset", "movement", "random"]
PASSES = 3
Advance = Callable[[], object]


@dataclass(frozen=True)
class Choice:
    """Which weights are asked for.

    Args:
        keep: The share of entries that is kept, above 0 and at most 1: ``k = floor(keep n)`` of the n entries of all
            floating-point tensors but those that are excluded. The head's are kept first and count among the k.
        score: ``fisher``: F, as in the paper. ``reset``: ``(theta - theta_0)^2 F / 2``, by how much the loss grows if a
            weight goes back to the base's, to second order. ``movement``: ``|theta - theta_0|``. ``random``: drawn
            evenly, the baseline, from the same entries.
        scope: ``global``: the largest scores of all tensors. ``layer``: of each tensor the same share.
        head: Names, or regular expressions that are searched for in names, of tensors that are kept whole; None: the
            head of the model, which has no pre-trained value. A language model's output layer has one, and is none.
        exclude: The same of tensors that are left out: nothing of them is kept, and they do not count.
        seed: Of ``random``.

    Raises:
        ConfigError: A value is out of its range.

    Source: section 3.4 of "Fishers for Free?" (Li et al., ICML 2025), and Sung et al., 2021, who count the head so.

    Example:
        >>> Choice(0.005).count(12345)
        61
    """

    keep: float
    score: ScoreName = "fisher"
    scope: Scope = "global"
    head: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kinds in (("score", ScoreName), ("scope", Scope)):
            if getattr(self, name) not in get_args(kinds):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(kinds))}, found {getattr(self, name)!r}")
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep must be in (0, 1], found {self.keep}; give it as a share, not in %")

    @property
    def takes_fisher(self) -> bool:
        """Whether the score is made of F."""
        return self.score in ("fisher", "reset")

    @property
    def takes_base(self) -> bool:
        """Whether the score is made of the pre-trained values."""
        return self.score in ("reset", "movement")

    def count(self, entries: int) -> int:
        """Return how many of so many entries are kept."""
        return math.floor(self.keep * entries)


@dataclass(frozen=True)
class Plan:
    """What is chosen from, known from headers alone.

    ``sizes``: name -> entries, of what is chosen from, in the order by which ties are broken. ``heads``: kept whole.
    ``excluded``: nothing of them is kept. ``shapes``: of all of them, and of buffers, which are kept and not counted.
    ``kept``: k, of ``entries``, both with the head. ``free``: how many of k are left to choose.
    """

    choice: Choice
    shapes: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    heads: frozenset[str]
    excluded: frozenset[str]
    kept: int
    entries: int
    free: int

    def about(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {
            "made_by": "mask select",
            **asdict(self.choice),
            "kept": self.kept,
            "entries": self.entries,
            "heads": sorted(self.heads),
            "excluded": sorted(self.excluded),
        }


def make_plan(choice: Choice, weights: Weights, parts: Parts) -> Plan:
    """Find what is chosen from, and check that the choice can be met.

    Args:
        choice: What is asked for.
        weights: The model that was trained.
        parts: Its head and buffers.

    Raises:
        ConfigError: A pattern is of no name, or the head alone has more entries than are to be kept.
    """
    infos = {name: weights.infos[name] for name in sorted(weights.infos)}
    shapes = {name: info.shape for name, info in infos.items() if info.dtype.is_floating_point}
    names = [name for name in shapes if name not in parts.buffers]
    excluded = {hit for pattern in choice.exclude for hit in matching(names, pattern, "exclude")}
    heads = set(parts.heads)
    if choice.head is not None:
        heads = {hit for pattern in choice.head for hit in matching(names, pattern, "head")}
    both = sorted(heads & excluded)
    if both:
        raise ConfigError(f"a tensor can be kept as head or excluded, but {both[0]} is to be both; name the head anew")
    entries = {name: math.prod(shapes[name]) for name in names if name not in excluded}
    total, in_heads = sum(entries.values()), sum(entries[name] for name in heads)
    kept = choice.count(total)
    if kept < max(in_heads, 1):
        raise ConfigError(
            f"keep must leave room for the head, which counts, but {choice.keep:g} of {total} entries are {kept} and "
            f"the head ({', '.join(sorted(heads)) or 'none'}) has {in_heads}; keep more, or name another head "
            "(--head, --no-head)"
        )
    sizes = {name: size for name, size in entries.items() if name not in heads}
    return Plan(choice, shapes, sizes, frozenset(heads), frozenset(excluded), kept, total, kept - in_heads)


@dataclass(frozen=True)
class Sources:
    """Where scores come from: the trained weights, the base by the same names, and a Fisher."""

    tuned: Weights
    base: Weights | None = None
    fisher: Fisher | None = None
    _checked: set[str] = field(default_factory=set, repr=False)

    def check(self, plan: Plan) -> str | None:
        """Refuse what headers show to be missing or of other shapes.

        Returns:
            What differs between the weights and those that the Fisher was made at, if that is known.

        Raises:
            ConfigError: The score needs a source that is not there.
            MismatchError: A source lacks a tensor that is chosen from, or has it in another shape.
        """
        choice, differs = plan.choice, None
        if choice.takes_fisher:
            if self.fisher is None:
                raise ConfigError(f"score {choice.score} needs a Fisher; give --fisher, or take movement or random")
            differs = check_fits(self.fisher, self.tuned, plan.sizes)
        if choice.takes_base:
            if self.base is None:
                raise ConfigError(f"score {choice.score} needs the pre-trained model; give --base, or take fisher")
            check_alike(self.tuned, self.base, plan.sizes)
        return differs

    def ranked(self, choice: Choice, name: str) -> Tensor:
        """Return integers that order as the scores of one tensor do."""
        tuned = self.tuned.read(name)
        tensors = {"tuned": tuned}
        if choice.takes_base and self.base is not None:
            tensors["base"] = self.base.read(name)
        if choice.takes_fisher and self.fisher is not None:
            tensors["fisher"] = self.fisher[name]
        self._check_once(name, tensors)
        return scores.ranked(self._score(choice, name), *tensors.values())

    def _score(self, choice: Choice, name: str) -> scores.Score:
        if choice.score == "random":
            return scores.chance(name, choice.seed)
        if choice.score == "movement":
            return scores.movement
        scaled = self._scaled(name)
        if choice.score == "fisher":
            return lambda tuned, fisher: scaled(fisher)
        return lambda tuned, base, fisher: scores.reset_loss(tuned, base, scaled(fisher))

    def _scaled(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return how F is brought to the scale of the mean square per step: tensors may differ in their steps."""
        assert self.fisher is not None
        scaling = known_scaling(self.fisher)
        offset, factor = self.fisher.offset(name, scaling), self.fisher.factor(name, scaling)
        return lambda fisher: rescaled(fisher, offset, factor)

    def _check_once(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        if name in self._checked:
            return
        for key, tensor in tensors.items():
            if key == "fisher" and self.fisher is not None:
                check_values(tensor, name, self.fisher.location)
            elif tensor.numel() and not all(math.isfinite(end.item()) for end in torch.aminmax(tensor)):
                raise ValuesError(f"weights must be finite, but {name} of the {key} model is not; give whole weights")
        self._checked.add(name)


def masks(plan: Plan, sources: Sources, advance: Advance = lambda: None) -> Iterator[tuple[str, Tensor]]:
    """Yield the mask of each floating-point tensor, in the order of their names; scores are never held of two.

    The choice is exact, among the square roots of the scores in float32. Of equal scores the first are kept.

    Args:
        plan: What to choose from.
        sources: Where to read it; each tensor is asked for ``PASSES`` times.
        advance: Called for each tensor that has been read.

    Yields:
        Name, and a bool tensor that is true where the weight is kept.

    Raises:
        ValuesError: An entry of F is NaN, infinite or negative, or a weight is not finite.
    """

    def ranked(name: str) -> Tensor:
        keys = sources.ranked(plan.choice, name)
        advance()
        return keys

    chosen = choose(plan.sizes, ranked, plan.free, scope=plan.choice.scope)
    for name, shape in plan.shapes.items():
        if name in plan.sizes:
            yield next(chosen)
        else:
            yield name, torch.tensor(name not in plan.excluded).expand(shape)


def select(
    model: nn.Module | Mapping[str, Tensor],
    fisher: Mapping[str, Tensor] | None = None,
    keep: float = 0.005,
    *,
    base: nn.Module | Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Mask:
    """Return the mask of the weights that matter most: the k largest scores over all tensors.

    It is the one that ``select_files`` makes of the saved model, entry by entry.

    Args:
        model: That was trained: a model of transformers, or any other; or a mapping from the names on disk to tensors.
        fisher: A Fisher of it, or a mapping from the names on disk to tensors; None where the score needs none.
        keep: See :class:`Choice`.
        base: The model that it was trained from, where the score needs it.
        options: The other fields of a :class:`Choice`.

    Returns:
        The mask, by the names on disk; ``mask.by_parameter(model)`` has those in memory.

    Raises:
        ConfigError: An option is out of range, or the head alone has more entries than are to be kept.
        MismatchError: The Fisher or the base is not of this model, or lacks a tensor that is chosen from.
        ValuesError: F has NaN, infinite or negative entries, or a weight is not finite.

    Source: section 3.4 of "Fishers for Free?" (Li et al., ICML 2025).

    Example:
        >>> weights = {"w": torch.tensor([1.0, 2.0, 3.0]), "classifier.weight": torch.zeros(1)}
        >>> mask = select(weights, {"w": torch.tensor([0.5, 0.1, 0.2])}, keep=0.5)
        >>> mask["w"].tolist(), mask["classifier.weight"].tolist()
        ([True, False, False], [True])
    """
    choice = Choice(keep, **options)
    weights, parts = _opened(model)
    below = None if base is None else base_of(_opened(base)[0], weights)
    if fisher is not None and not isinstance(fisher, Fisher):
        fisher = Fisher(MemoryStore(fisher), FisherConfig(statistic="mean"))
    plan, sources = make_plan(choice, weights, parts), Sources(weights, below, fisher)
    sources.check(plan)
    return Mask({name: mask.clone() for name, mask in masks(plan, sources)}, plan.about())


def _opened(model: nn.Module | Mapping[str, Tensor]) -> tuple[Weights, Parts]:
    if isinstance(model, nn.Module):
        return in_memory(model)
    weights = of_tensors(model)
    return weights, parts_by_name(weights.infos)
