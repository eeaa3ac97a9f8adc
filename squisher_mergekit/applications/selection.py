"""Selection of weights by score: one engine for pruning, FISH masks and trimmed task vectors.

Three words say which share of n entries is kept:

* ``keep``: share of the entries that is kept, ``floor(keep n)`` of them;
* ``sparsity``: ``1 - keep``, the share that becomes 0; ``n - round(sparsity n)`` entries are kept;
* ``density``: share of each tensor of a task vector that is kept, :func:`~squisher_mergekit.tensors.topk.keep_count`.

A selection takes three steps. :class:`Selection` states the request. :func:`plan_selection` applies it to shapes: the
plan has every count and can be inspected before a weight is read. :func:`select_masks` streams over the tensors and
yields exact top-k masks; it never keeps the scores of two tensors in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from squisher_mergekit.applications import scores
from squisher_mergekit.errors import ConfigError, ValuesError
from squisher_mergekit.fisher.mapping import rescaled
from squisher_mergekit.fisher.values import check_values
from squisher_mergekit.tensors.topk import largest_of_many, pattern_mask

Score = Literal["fisher", "saliency", "reset", "movement", "magnitude", "taylor_squared", "random"]
Scope = Literal["global", "layer"]
Normalize = Literal["none", "layer"]
# Score -> tensors that it needs beside the weight, in the order of its function's arguments.
NEEDED: Mapping[Score, tuple[str, ...]] = {
    "fisher": ("fisher",),
    "saliency": ("fisher",),
    "reset": ("base", "fisher"),
    "movement": ("base",),
    "magnitude": (),
    "taylor_squared": ("gradient",),
    "random": (),
}
_NAMES = {"weight": ("weights", ""), "base": ("weights", " of the base model"), "gradient": ("a mean gradient", "")}


def check_choices(**options: tuple[object, Any]) -> None:
    """Raise if an option has none of its allowed values.

    Args:
        options: Name -> value and the ``Literal`` of the allowed values.

    Raises:
        ConfigError: A value is not allowed.
    """
    for name, (value, allowed) in options.items():
        if value not in get_args(allowed):
            raise ConfigError(f"{name} must be one of {', '.join(get_args(allowed))}, found {value!r}")


def check_share(name: str, value: float) -> None:
    """Raise if a share is not in [0, 1).

    Args:
        name: Name of the option.
        value: The share.

    Raises:
        ConfigError: The share is out of range.
    """
    if not 0 <= value < 1:
        raise ConfigError(f"{name} must be in [0, 1), found {value}; give it as a share, not in %")


def check_keep(value: float) -> None:
    """Raise if the share to keep is not in (0, 1].

    Raises:
        ConfigError: The share is out of range.
    """
    if not 0 < value <= 1:
        raise ConfigError(f"keep must be in (0, 1], found {value}; give it as a share, not in %")


@dataclass(frozen=True)
class Selection:
    """Request to keep the entries with the largest scores.

    Args:
        keep: Share of the entries to keep, in (0, 1]; or, as an ``int``, their number. Unused with ``pattern``.
        score: Score of an entry: ``fisher`` F, ``saliency`` theta^2 F / 2, ``reset`` (theta - theta_0)^2 F / 2,
            ``movement`` |theta - theta_0|, ``magnitude`` |theta|, ``taylor_squared`` (theta g)^2, or ``random``.
        scope: ``global`` keeps the largest scores of all tensors; ``layer`` keeps the same share of each tensor.
        min_keep: Share of each tensor, in [0, 1), that is kept whatever its scores are; rounded up.
        pattern: ``(n, m)`` keeps the n largest of each m consecutive entries along the input axis, in place of
            ``keep``, ``scope`` and ``min_keep``.
        always: Names of tensors that are kept whole; their entries count.
        never: Names of tensors of which nothing is kept; their entries do not count.
        normalize: ``layer`` divides the scores of a tensor by their mean; ``none`` compares them as they are.
        drop_zeros: Rank entries whose weight is 0 below all others.
        seed: Seed of the random scores.

    Raises:
        ConfigError: A value is out of range.

    Example:
        >>> Selection(0.5, "magnitude", min_keep=0.1).keep
        0.5
    """

    keep: float = 1.0
    score: Score = "fisher"
    scope: Scope = "global"
    min_keep: float = 0.0
    pattern: tuple[int, int] | None = None
    always: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()
    normalize: Normalize = "none"
    drop_zeros: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(score=(self.score, Score), scope=(self.scope, Scope), normalize=(self.normalize, Normalize))
        check_share("min_keep", self.min_keep)
        if not (isinstance(self.keep, int) and self.keep >= 0):
            check_keep(self.keep)
        if self.pattern is not None and not 0 < self.pattern[0] < self.pattern[1] <= 128:
            raise ConfigError(f"a pattern n:m must have 0 < n < m <= 128, found {':'.join(map(str, self.pattern))}")
        both = sorted(self.always & self.never)
        if both:
            raise ConfigError(f"a tensor can be kept whole or left out, but {both[0]} is to be both; name it once")

    def count(self, entries: int) -> int:
        """Return the number of entries to keep.

        Example:
            >>> Selection(0.29).count(100), Selection(7).count(12345), Selection(pattern=(2, 4)).count(8)
            (29, 7, 4)
        """
        if self.pattern is not None:
            return entries * self.pattern[0] // self.pattern[1]
        return self.keep if isinstance(self.keep, int) else math.floor(_product(self.keep, entries))


@dataclass(frozen=True)
class SelectionPlan:
    """Selection applied to the shapes of a model, before any weight is read.

    Attributes:
        selection: The request.
        shapes: Name -> shape of every floating-point tensor, in the order that breaks ties.
        outside: Name -> reason, for tensors that the selection does not touch: all is kept, nothing counts.
        axes: Name -> input axis, for a pattern.
    """

    selection: Selection
    shapes: Mapping[str, tuple[int, ...]]
    outside: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Name -> number of entries, of the tensors to choose from."""
        fixed = {*self.outside, *self.selection.always, *self.selection.never}
        return {name: math.prod(shape) for name, shape in self.shapes.items() if name not in fixed}

    @cached_property
    def whole(self) -> int:
        """Number of entries in tensors that are kept whole and count."""
        return sum(math.prod(self.shapes[name]) for name in self.selection.always)

    @property
    def entries(self) -> int:
        """Number of entries that count."""
        return sum(self.sizes.values()) + self.whole

    @property
    def keep(self) -> int:
        """Number of entries to keep, of those that count."""
        return self.selection.count(self.entries)

    @cached_property
    def min_counts(self) -> dict[str, int]:
        """Name -> number of its own largest entries that a tensor keeps before tensors are compared."""
        return min_counts(self.sizes, self.keep - self.whole, self.selection.scope, self.selection.min_keep)

    @property
    def passes(self) -> int:
        """Number of times that each tensor is read."""
        if self.selection.pattern is not None:
            return 1
        return 4 if self.selection.normalize == "layer" else 3


def plan_selection(
    selection: Selection,
    shapes: Mapping[str, tuple[int, ...]],
    outside: Mapping[str, str] | None = None,
    axes: Mapping[str, int | None] | None = None,
) -> SelectionPlan:
    """Plan a selection, and check that it can be met.

    Args:
        selection: The request.
        shapes: Name -> shape of every floating-point tensor, in the order that breaks ties.
        outside: Name -> reason, for tensors that the selection does not touch.
        axes: Name -> input axis, None where it is unknown; needed for a pattern.

    Returns:
        The plan.

    Raises:
        ConfigError: ``min_keep`` alone keeps more than ``keep``, or the pattern does not divide a row.

    Example:
        >>> plan = plan_selection(Selection(0.5, always=frozenset({"head"})), {"head": (2,), "w": (4, 2)})
        >>> plan.keep, plan.entries, plan.sizes
        (5, 10, {'w': 8})
    """
    plan = SelectionPlan(selection, {name: tuple(shape) for name, shape in shapes.items()}, outside or {})
    if selection.pattern is not None:
        return SelectionPlan(selection, plan.shapes, plan.outside, _pattern_axes(plan, *selection.pattern, axes or {}))
    _ = plan.min_counts  # refuses a share that is too large
    return plan


def min_counts(sizes: Mapping[str, int], keep: int, scope: Scope, min_keep: float) -> dict[str, int]:
    """Return the number of its own largest entries that each tensor keeps before tensors are compared.

    Args:
        sizes: Name -> number of entries.
        keep: Number of entries to keep in all.
        scope: ``layer`` divides ``keep`` among the tensors by their sizes, ``global`` does not.
        min_keep: Share of each tensor to keep, rounded up.

    Raises:
        ConfigError: ``min_keep`` alone keeps more than ``keep``.
    """
    counts = {name: math.ceil(_product(min_keep, size)) for name, size in sizes.items()}
    if sum(counts.values()) > keep:
        raise ConfigError(
            f"keeping at least {min_keep:g} of each tensor takes {sum(counts.values())} entries, but {keep} of "
            f"{sum(sizes.values())} are to be kept; lower min_keep, or keep more in all (a lower sparsity)"
        )
    return _divided(sizes, keep) if scope == "layer" else counts


def _product(share: float, entries: int) -> float:
    """Return ``share * entries``, whole where only rounding keeps it from that: 0.29 * 100 is below 29 in binary."""
    value = share * entries
    return round(value) if math.isclose(value, round(value), rel_tol=1e-15) else value


def _divided(sizes: Mapping[str, int], keep: int) -> dict[str, int]:
    """Divide ``keep`` by size, rounded down; the largest remainders get one entry more."""
    total = max(sum(sizes.values()), 1)
    counts = {name: size * keep // total for name, size in sizes.items()}
    rest = sorted(sizes, key=lambda name: -(sizes[name] * keep % total))[: keep - sum(counts.values())]
    return counts | {name: counts[name] + 1 for name in rest}


def _pattern_axes(plan: SelectionPlan, n: int, m: int, axes: Mapping[str, int | None]) -> dict[str, int]:
    found = {}
    for name in plan.sizes:
        shape, axis = plan.shapes[name], axes.get(name)
        if axis is None:
            raise ConfigError(
                f"a pattern runs along the inputs of a weight, but which axis of {name}, {list(shape)}, has them is "
                f"unknown; ignore the tensor (--ignore '{name}')"
            )
        if shape[axis] % m:
            raise ConfigError(
                f"a pattern of {n}:{m} needs inputs that {m} divides, but {name}, {list(shape)}, has {shape[axis]}; "
                f"ignore it (--ignore '{name}') or take another pattern"
            )
        found[name] = axis
    return found


@dataclass(frozen=True)
class ScoreInputs:
    """Functions that read the tensors of a score by name.

    Attributes:
        weight: Function that reads a weight.
        fisher: Function that reads the stored Fisher of a weight.
        base: Function that reads the pre-trained value of a weight.
        gradient: Function that reads the mean gradient of a weight.
        scale: Function that returns the offset and the factor of a Fisher (:meth:`~squisher_mergekit.Fisher.factor`).
        location: Location of the Fisher, for messages.
    """

    weight: Callable[[str], Tensor]
    fisher: Callable[[str], Tensor] | None = None
    base: Callable[[str], Tensor] | None = None
    gradient: Callable[[str], Tensor] | None = None
    scale: Callable[[str], tuple[float, float]] = lambda name: (0.0, 1.0)
    location: str = "memory"

    def read(self, name: str, score: Score) -> dict[str, Tensor]:
        """Return the tensors that a score needs, the weight first."""
        readers = {kind: getattr(self, kind) for kind in ("weight", *NEEDED[score])}
        return {kind: reader(name) for kind, reader in readers.items()}


def select_masks(
    plan: SelectionPlan, inputs: ScoreInputs, advance: Callable[[], object] = lambda: None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the mask of each tensor in a selection, in the order of the plan.

    The selection is exact in the square roots of the scores in float32: scores that differ by less than 2.4e-7 of
    their value can count as equal. Of equal scores the first are kept.

    Args:
        plan: The plan.
        inputs: Readers of the tensors; each tensor is read ``plan.passes`` times.
        advance: Function called after each read.

    Yields:
        Name, and a bool tensor that is true where the entry is kept.

    Raises:
        ValuesError: A weight or gradient is not finite, or an entry of F is NaN, infinite or negative.

    Example:
        >>> theta, fisher = {"w": torch.tensor([1.0, -2.0, 3.0])}, {"w": torch.tensor([2.0, 4.0, 1.0])}
        >>> plan = plan_selection(Selection(2, "saliency"), {"w": (3,)})
        >>> dict(select_masks(plan, ScoreInputs(theta.get, fisher.get)))["w"]
        tensor([False,  True,  True])
    """
    selection, checked = plan.selection, set[str]()

    def read(name: str) -> dict[str, Tensor]:
        tensors = inputs.read(name, selection.score)
        if name not in checked:
            _check_finite(tensors, name, inputs.location)
            checked.add(name)
        return tensors

    means: dict[str, float] = {}
    for name in plan.sizes if selection.normalize == "layer" and selection.pattern is None else ():
        means[name] = scores.mean(_score(selection, inputs, name), *read(name).values())
        advance()

    def sort_keys(name: str) -> Tensor:
        tensors = read(name)
        keys = scores.sort_keys(_score(selection, inputs, name), *tensors.values(), unit=means.get(name, 1.0))
        if selection.drop_zeros:
            keys.add_(1).masked_fill_(tensors["weight"].detach().cpu() == 0, 0)
        advance()
        return keys

    chosen = _chosen(plan, sort_keys)
    for name, shape in plan.shapes.items():
        if name in plan.sizes:
            yield next(chosen)
        elif name not in plan.outside:
            yield name, torch.tensor(name in selection.always, device="cpu").expand(shape)


def _chosen(plan: SelectionPlan, sort_keys: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the masks of the tensors to choose from."""
    if plan.selection.pattern is None:
        yield from largest_of_many(plan.sizes, sort_keys, plan.keep - plan.whole, plan.min_counts)
        return
    for name in plan.sizes:
        yield name, pattern_mask(sort_keys(name), *plan.selection.pattern, axis=plan.axes[name])


def _score(selection: Selection, inputs: ScoreInputs, name: str) -> scores.Score:
    """Return the function from blocks of the tensors to scores."""
    offset, factor = inputs.scale(name)
    functions: dict[Score, scores.Score] = {
        "fisher": lambda theta, raw: rescaled(raw, offset, factor),
        "saliency": lambda theta, raw: scores.saliency(theta, rescaled(raw, offset, factor)),
        "reset": lambda theta, base, raw: scores.reset_loss(theta, base, rescaled(raw, offset, factor)),
        "movement": scores.movement,
        "magnitude": scores.magnitude,
        "taylor_squared": scores.taylor_squared,
    }
    return functions.get(selection.score) or scores.random_score(name, selection.seed)


def _check_finite(tensors: Mapping[str, Tensor], name: str, location: str) -> None:
    for kind, tensor in tensors.items():
        if kind == "fisher":
            check_values(tensor, name, location)
        elif tensor.numel() and not all(math.isfinite(end.item()) for end in torch.aminmax(tensor)):
            noun, owner = _NAMES[kind]
            raise ValuesError(f"{noun} must be finite, but {name}{owner} is not finite; give a sound checkpoint")
