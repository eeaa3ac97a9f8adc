"""Which single weights of a model are pruned: what is asked for, the plan by shapes alone, and the masks.

Files and live models share all of it: both are read tensor by tensor, by the names in ``model.safetensors``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from squisher_mergekit.applications import scores
from squisher_mergekit.applications.selection import Scope, check_share, choose
from squisher_mergekit.errors import ConfigError, ValuesError
from squisher_mergekit.fisher.config import Scaling
from squisher_mergekit.fisher.mapping import check_values, rescaled
from squisher_mergekit.models.roles import Role, ignored

ScoreName = Literal["fisher", "magnitude", "random", "taylor_squared"]
Normalize = Literal["layer", "none"]
Rounds = Literal["harmonic", "geometric", "linear"]
# The least of each layer beside what is kept over all. Settled on two seeds of scripts/experiments/pruning.py.
_LEAST = 1 / 3
# How often `masks` asks for each tensor: to check it, and for the choice.
PASSES, PATTERN_PASSES = 4, 2
_ROWS = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """What is asked for.

    Args:
        sparsity: The share, in [0, 1), of the entries that are chosen from which becomes 0; rounded to the entry.
        score: ``fisher``: ``theta^2 F / 2``. ``magnitude``: ``|theta|``. ``random``: drawn evenly, the baseline.
            ``taylor_squared``: ``(theta g)^2`` with g the mean gradient, the squared mean where the Fisher has the mean
            of squares; in memory only.
        normalize: ``none``: scores are compared as they are. ``layer``: each is divided by the mean score of its
            tensor; a small layer, of which every weight matters more, then loses as much as a large one.
        scope: ``global``: the lowest scores of all tensors go. ``layer``: of each tensor the same share.
        least: Of each tensor at least this share is kept, whatever its scores. Without it a global choice empties whole
            layers: theta^2 F differs by orders of magnitude between them, and where training has not come F is 0. By
            default a third of the share that is kept over all.
        pattern: ``(n, m)``: of each m weights in a row along the input axis the n with the largest scores are kept, as
            sparse matrix units need them. It takes the place of sparsity, scope and least.
        ignore: Names, or regular expressions that are searched for in names, of tensors to leave alone.
        default_ignore: Leave embeddings, norms, biases and the output layer alone as well.
        scaling: Of the Fisher; it matters where tensors differ in their steps and ``normalize`` is ``none``.
        seed: Of ``random``.

    Raises:
        ConfigError: A value is out of its range, or two do not go together.

    Example:
        >>> Recipe(0.75).keep(1000)
        250
    """

    sparsity: float | None = None
    score: ScoreName = "fisher"
    normalize: Normalize = "none"
    scope: Scope = "global"
    least: float | None = None
    pattern: tuple[int, int] | None = None
    ignore: tuple[str, ...] = ()
    default_ignore: bool = True
    scaling: Scaling = "debiased"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kinds in (("score", ScoreName), ("normalize", Normalize), ("scope", Scope), ("scaling", Scaling)):
            if getattr(self, name) not in get_args(kinds):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(kinds))}, found {getattr(self, name)!r}")
        if (self.sparsity is None) == (self.pattern is None):
            raise ConfigError(
                f"either a sparsity or a pattern must be given, found {self.sparsity} and {self.pattern}: a pattern of "
                "n in m makes 1 - n/m of the weights 0"
            )
        if self.sparsity is not None:
            check_share("sparsity", self.sparsity)
        check_share("least", self.floor)
        if self.pattern is not None and not 0 < self.pattern[0] < self.pattern[1] <= 128:
            raise ConfigError(f"a pattern n:m must have 0 < n < m <= 128, found {':'.join(map(str, self.pattern))}")

    @property
    def floor(self) -> float:
        """The share of each tensor that is kept whatever its scores are."""
        if self.least is not None:
            return self.least
        return 0.0 if self.sparsity is None else _LEAST * (1 - self.sparsity)

    def keep(self, entries: int) -> int:
        """Return how many of so many entries are kept."""
        if self.pattern is not None:
            return entries * self.pattern[0] // self.pattern[1]
        assert self.sparsity is not None
        return entries - round(entries * self.sparsity)

    def about(self) -> dict[str, Any]:
        """Return it as JSON takes it; what the pattern replaces is left out."""
        known = asdict(self) | {"least": self.floor}
        left_out = ("sparsity", "scope", "least", "normalize") if self.pattern else ("pattern",)
        return {key: value for key, value in known.items() if key not in left_out}


@dataclass(frozen=True)
class Plan:
    """What will be chosen from, known from shapes alone.

    ``shapes``: of every floating-point tensor, in the order of their names, by which ties are broken. ``ignored``: name
    -> why it is left alone. ``axes``: name -> the axis along which a pattern runs.
    """

    recipe: Recipe
    shapes: Mapping[str, tuple[int, ...]]
    ignored: Mapping[str, str]
    axes: Mapping[str, int]

    @property
    def sizes(self) -> dict[str, int]:
        """Name -> number of entries, of the tensors that are chosen from."""
        return {name: math.prod(shape) for name, shape in self.shapes.items() if name not in self.ignored}

    @property
    def passes(self) -> int:
        """How often each tensor is asked for."""
        return PASSES if self.recipe.pattern is None else PATTERN_PASSES


def make_plan(
    recipe: Recipe,
    shapes: Mapping[str, tuple[int, ...]],
    roles: Mapping[str, Role],
    axes: Mapping[str, int | None] | None = None,
) -> Plan:
    """Find what is chosen from, and check that the recipe can be met.

    Args:
        recipe: What is asked for.
        shapes: Of every floating-point tensor.
        roles: Of those that are no ordinary matrix.
        axes: Name -> its input axis, None where that is not known; needed for a pattern.

    Raises:
        ConfigError: Nothing is left to choose from, a name to ignore is none, ``least`` alone would keep more than the
            sparsity allows, or the pattern does not divide a row.

    Example:
        >>> make_plan(Recipe(0.5), {"a.weight": (2, 3), "a.bias": (2,)}, {"a.bias": "bias"}).sizes
        {'a.weight': 6}
    """
    names = sorted(shapes, key=_natural)
    why = ignored(roles, names, recipe.ignore, get_args(Role) if recipe.default_ignore else ())
    plan = Plan(recipe, {name: tuple(shapes[name]) for name in names}, why, {})
    entries = sum(plan.sizes.values())
    if not entries:
        raise ConfigError(
            f"something must be left to choose from, but all {len(names)} tensors are ignored; "
            + ("ignore fewer names" if recipe.ignore else "take --no-default-ignore (default_ignore=False)")
        )
    if recipe.pattern is not None:
        return Plan(recipe, plan.shapes, why, _pattern_axes(plan, axes or {}))
    floors = sum(math.ceil(size * recipe.floor) for size in plan.sizes.values())
    if floors > recipe.keep(entries):
        raise ConfigError(
            f"sparsity and least must go together, but keeping at least {recipe.floor:g} of each tensor takes {floors} "
            f"entries, and a sparsity of {recipe.sparsity:g} keeps {recipe.keep(entries)} of {entries}; lower one"
        )
    return plan


def _natural(name: str) -> list[int | str]:
    """Order layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def _pattern_axes(plan: Plan, axes: Mapping[str, int | None]) -> dict[str, int]:
    assert plan.recipe.pattern is not None
    n, m = plan.recipe.pattern
    found = {}
    for name in plan.sizes:
        shape, axis = plan.shapes[name], axes.get(name)
        if axis is None:
            raise ConfigError(
                f"a pattern runs along a weight's inputs, but which axis of {name}, {list(shape)}, they are is not "
                f"known; ignore it (--ignore '{name}')"
            )
        if shape[axis] % m:
            raise ConfigError(
                f"a pattern of {n}:{m} needs inputs that {m} divides, but {name}, {list(shape)}, has {shape[axis]}; "
                f"ignore it (--ignore '{name}') or take another pattern"
            )
        found[name] = axis
    return found


@dataclass(frozen=True)
class Inputs:
    """Where tensors come from, by name.

    ``weight``: the weights. ``beside``: what the score takes beside them, F as stored or the mean gradient; None if
    nothing. ``scale``: offset and factor of F (see :meth:`~squisher_mergekit.Fisher.factor`). ``location``: of what is
    beside, for messages.
    """

    weight: Callable[[str], Tensor]
    beside: Callable[[str], Tensor] | None = None
    scale: Callable[[str], tuple[float, float]] = lambda name: (0.0, 1.0)
    location: str = "memory"


def masks(plan: Plan, inputs: Inputs, advance: Callable[[], object] = lambda: None) -> Iterator[tuple[str, Tensor]]:
    """Yield the mask of each tensor that is chosen from, in the order of their names; scores are never held of two.

    The choice is exact, among the square roots of the scores in float32: scores closer than 2.4e-7 of themselves can
    count as equal. Of equal ones the first are kept. A weight that is 0 already goes before all others.

    Args:
        plan: What to choose from.
        inputs: Where to read it; each tensor is asked for ``plan.passes`` times.
        advance: Called for each tensor that has been read.

    Yields:
        Name, and a bool tensor that is true where the weight is kept.

    Raises:
        ValuesError: A weight, a gradient or an entry of F is not finite, or F is negative.

    Example:
        >>> theta, fisher = {"w": torch.tensor([1.0, -2.0, 3.0])}, {"w": torch.tensor([2.0, 4.0, 1.0])}
        >>> plan = make_plan(Recipe(1 / 3), {"w": (3,)}, {})
        >>> dict(masks(plan, Inputs(theta.get, fisher.get)))["w"]
        tensor([False,  True,  True])
    """
    recipe, units = plan.recipe, {}
    for name in plan.sizes:
        units[name] = _checked_mean(plan, inputs, name)
        advance()

    def ranked(name: str) -> Tensor:
        score, tensors = _scored(recipe, inputs, name)
        keys = scores.ranked(score, *tensors, unit=units[name])
        keys.add_(1).masked_fill_(tensors[0].detach().cpu() == 0, 0)
        advance()
        return keys

    if recipe.pattern is None:
        keep = recipe.keep(sum(plan.sizes.values()))
        yield from choose(plan.sizes, ranked, keep, scope=recipe.scope, least=recipe.floor)
        return
    for name in plan.sizes:
        yield name, largest_of(ranked(name), *recipe.pattern, axis=plan.axes[name])


def _checked_mean(plan: Plan, inputs: Inputs, name: str) -> float:
    """Check the values of one tensor, and return what its scores are measured by."""
    recipe = plan.recipe
    score, tensors = _scored(recipe, inputs, name)
    if recipe.score == "fisher":
        check_values(tensors[1], name, inputs.location)
    finite = tensors if recipe.score == "taylor_squared" else tensors[:1]
    for what, tensor in zip(("weights", "a mean gradient"), finite, strict=False):
        low, high = torch.aminmax(tensor) if tensor.numel() else (tensor.new_zeros(()),) * 2
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise ValuesError(
                f"{what} must be finite, but {name} holds NaN or infinite entries; take a sound checkpoint"
            )
    if recipe.normalize == "none" or recipe.pattern is not None:
        return 1.0
    return scores.mean(score, *tensors)


def _scored(recipe: Recipe, inputs: Inputs, name: str) -> tuple[scores.Score, tuple[Tensor, ...]]:
    """Return the score of blocks of one tensor, and what it is made of."""
    weight = inputs.weight(name)
    if recipe.score == "magnitude":
        return scores.magnitude, (weight,)
    if recipe.score == "random":
        return scores.chance(name, recipe.seed), (weight,)
    assert inputs.beside is not None
    if recipe.score == "taylor_squared":
        return scores.taylor_squared, (weight, inputs.beside(name))
    offset, factor = inputs.scale(name)

    def saliency(theta: Tensor, raw: Tensor) -> Tensor:
        return scores.saliency(theta, rescaled(raw, offset, factor))

    return saliency, (weight, inputs.beside(name))


def largest_of(keys: Tensor, n: int, m: int, axis: int = -1) -> Tensor:
    """Return which entries are among the n largest of each m consecutive ones along an axis.

    Args:
        keys: Integers, of any shape; m divides the axis.
        n: How many of each m are kept.
        m: How many go together.
        axis: Along which.

    Returns:
        bool, shaped alike; of equal entries the first are kept.

    Example:
        >>> largest_of(torch.tensor([[3, 1, 2, 2, 9, 9, 9, 0]]), 2, 4).int()
        tensor([[1, 0, 1, 0, 1, 1, 0, 0]], dtype=torch.int32)
    """
    moved = keys.movedim(axis, -1)
    groups = moved.reshape(-1, m)
    kept = torch.empty(groups.shape, dtype=torch.bool)
    for start in range(0, len(groups), _ROWS):
        block = groups[start : start + _ROWS]
        for i in range(m):
            own = block[:, i : i + 1]
            before = (block[:, :i] >= own).sum(1) + (block[:, i + 1 :] > own).sum(1)
            kept[start : start + _ROWS, i] = before < n
    return kept.reshape(moved.shape).movedim(-1, axis)


def schedule(sparsity: float, rounds: int, kind: Rounds = "harmonic") -> tuple[float, ...]:
    """Return the sparsity to reach in each of several rounds of pruning and retraining.

    With p the last and i = 1 to n, ``harmonic``: ``i p / (i p + n (1 - p))``, each round removes ``p / (i p + n (1 -
    p))`` of what is left, less and less. ``geometric``: ``1 - (1 - p)^(i/n)``, always the same share of what is left.
    ``linear``: ``i p / n``, always as many.

    Args:
        sparsity: p, in [0, 1).
        rounds: n, at least 1.
        kind: See above.

    Returns:
        Sparsities of the whole, not of what the round before left; the last is p.

    Raises:
        ConfigError: A value is out of its range.

    Source: ``harmonic`` is what the pruning experiments of "Fishers for Free?" (section 3.3, Table 5) build on.

    Example:
        >>> [round(each, 4) for each in schedule(0.75, 3)]
        [0.5, 0.6667, 0.75]
    """
    check_share("sparsity", sparsity)
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1, found {rounds}")
    if kind not in get_args(Rounds):
        raise ConfigError(f"kind must be one of {', '.join(get_args(Rounds))}, found {kind!r}")
    shares = {
        "harmonic": lambda i: i * sparsity / (i * sparsity + rounds * (1 - sparsity)),
        "geometric": lambda i: 1 - (1 - sparsity) ** (i / rounds),
        "linear": lambda i: i * sparsity / rounds,
    }
    return (*(shares[kind](i) for i in range(1, rounds)), sparsity)
