"""Recipe of a pruning: its options, its plan, and the sparsities of several rounds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict

from squisher_mergekit.applications.selection import (
    Normalize,
    Scope,
    Score,
    Selection,
    SelectionPlan,
    check_choices,
    check_share,
    plan_selection,
)
from squisher_mergekit.errors import ConfigError
from squisher_mergekit.fisher.config import Scaling
from squisher_mergekit.models.roles import ROLES, Role, ignored

ScoreName = Literal["fisher", "magnitude", "random", "taylor_squared"]
Rounds = Literal["harmonic", "geometric", "linear"]
_SCORES: Mapping[ScoreName, Score] = {
    "fisher": "saliency",
    "magnitude": "magnitude",
    "random": "random",
    "taylor_squared": "taylor_squared",
}
# Share of the overall share that each tensor keeps. Settled on two seeds of scripts/experiments/pruning.py.
_MIN_KEEP = 1 / 3


class PruningOptions(TypedDict, total=False):
    """Keyword arguments of the pruning functions, see :class:`PruningRecipe`; ``least`` is the old ``min_keep``."""

    score: ScoreName
    normalize: Normalize
    scope: Scope
    min_keep: float | None
    pattern: tuple[int, int] | None
    ignore: tuple[str, ...]
    default_ignore: bool
    scaling: Scaling
    seed: int
    least: float | None


@dataclass(frozen=True)
class PruningRecipe:
    """Options of a pruning.

    Args:
        sparsity: Share, in [0, 1), of the candidate entries that becomes 0; rounded to the entry.
        score: ``fisher``: theta^2 F / 2. ``magnitude``: |theta|. ``random``: uniform draws, the baseline.
            ``taylor_squared``: (theta g)^2 with the mean gradient g, a squared mean where the Fisher has the mean of
            squares; in memory only.
        normalize: ``none`` compares the scores as they are. ``layer`` divides them by their mean over the tensor, so
            that a small layer, whose weights matter more, loses as much as a large one.
        scope: ``global`` removes the lowest scores of all tensors, ``layer`` the same share of each tensor.
        min_keep: Share of each tensor that is kept whatever its scores are; by default a third of ``1 - sparsity``. At
            0 a global selection empties layers: theta^2 F differs by orders of magnitude between them, and F is 0 in
            layers that training did not reach.
        pattern: ``(n, m)`` keeps the n largest scores of each m consecutive weights along the input axis, as sparse
            matrix units need them, in place of ``sparsity``, ``scope``, ``min_keep`` and ``normalize``.
        ignore: Names, or regular expressions that are searched for in names, of tensors to leave unchanged.
        default_ignore: Leave embeddings, norms, biases and the output layer unchanged as well.
        scaling: Scale of the Fisher; it matters if tensors differ in their steps and ``normalize`` is ``none``.
        seed: Seed of ``random``.

    Raises:
        ConfigError: A value is out of range, or two options exclude each other.

    Example:
        >>> PruningRecipe(0.75).keep(1000)
        250
    """

    sparsity: float | None = None
    score: ScoreName = "fisher"
    normalize: Normalize = "none"
    scope: Scope = "global"
    min_keep: float | None = None
    pattern: tuple[int, int] | None = None
    ignore: tuple[str, ...] = ()
    default_ignore: bool = True
    scaling: Scaling = "debiased"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(score=(self.score, ScoreName), scaling=(self.scaling, Scaling))
        if (self.sparsity is None) == (self.pattern is None):
            raise ConfigError(
                f"either a sparsity or a pattern must be given, found {self.sparsity} and {self.pattern}: a pattern of "
                "n in m makes 1 - n/m of the weights 0"
            )
        if self.sparsity is not None:
            check_share("sparsity", self.sparsity)
            if self.min_keep is None:
                object.__setattr__(self, "min_keep", _MIN_KEEP * (1 - self.sparsity))
        self.selection(0)

    def keep(self, entries: int) -> int:
        """Return the number of entries that a sparsity keeps."""
        return entries - round(entries * (self.sparsity or 0.0))

    def selection(self, entries: int) -> Selection:
        """Return the selection for a number of candidate entries."""
        return Selection(
            keep=self.keep(entries),
            score=_SCORES[self.score],
            scope=self.scope,
            min_keep=self.min_keep or 0.0,
            pattern=self.pattern,
            normalize=self.normalize,
            drop_zeros=True,
            seed=self.seed,
        )

    def metadata(self) -> dict[str, Any]:
        """Return the options in effect, for JSON."""
        unused = ("sparsity", "scope", "min_keep", "normalize") if self.pattern else ("pattern",)
        return {key: value for key, value in asdict(self).items() if key not in unused}


def plan_pruning(
    recipe: PruningRecipe,
    shapes: Mapping[str, tuple[int, ...]],
    roles: Mapping[str, Role],
    axes: Mapping[str, int | None] | None = None,
) -> SelectionPlan:
    """Plan a pruning by shapes alone, and check that it can be met.

    Args:
        recipe: The recipe.
        shapes: Name -> shape of every floating-point tensor.
        roles: Name -> role of the tensors that are not ordinary matrices.
        axes: Name -> input axis, None where it is unknown; needed for a pattern.

    Returns:
        The plan; tensors to leave unchanged are outside of it. Layer 2 precedes layer 10.

    Raises:
        ConfigError: No tensor is left, a pattern in ``ignore`` matches no name, ``min_keep`` alone keeps more than the
            sparsity allows, or ``pattern`` does not divide a row.

    Example:
        >>> plan_pruning(PruningRecipe(0.5), {"a.weight": (2, 3), "a.bias": (2,)}, {"a.bias": "bias"}).sizes
        {'a.weight': 6}
    """
    ordered = {name: shapes[name] for name in sorted(shapes, key=_natural)}
    outside = ignored(roles, ordered, recipe.ignore, ROLES if recipe.default_ignore else ())
    entries = SelectionPlan(recipe.selection(0), ordered, outside).entries
    if not entries:
        raise ConfigError(
            f"something must be left to choose from, but all {len(ordered)} tensors are ignored; "
            + ("ignore fewer names" if recipe.ignore else "take --no-default-ignore (default_ignore=False)")
        )
    return plan_selection(recipe.selection(entries), ordered, outside, axes)


def _natural(name: str) -> list[int | str]:
    """Return a sort key in which layer 2 precedes layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def schedule(sparsity: float, rounds: int, kind: Rounds = "harmonic") -> tuple[float, ...]:
    """Return the sparsity after each of several rounds of pruning and retraining.

    With the last sparsity p and i = 1 to n, ``harmonic`` is ``i p / (i p + n (1 - p))``: round i removes
    ``p / (i p + n (1 - p))`` of the rest. ``geometric`` is ``1 - (1 - p)^(i/n)``: each round removes the same share of
    the rest. ``linear`` is ``i p / n``: each round removes the same number.

    Args:
        sparsity: Last sparsity p, in [0, 1).
        rounds: Number of rounds n, at least 1.
        kind: Name of the formula.

    Returns:
        Sparsities of the whole model; the last is exactly p.

    Raises:
        ConfigError: A value is out of range.

    Source: ``harmonic`` is the schedule of the pruning experiments in "Fishers for Free?" (section 3.3, Table 5).

    Example:
        >>> [round(each, 4) for each in schedule(0.75, 3)]
        [0.5, 0.6667, 0.75]
    """
    check_share("sparsity", sparsity)
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1, found {rounds}")
    check_choices(kind=(kind, Rounds))
    shares = {
        "harmonic": lambda i: i * sparsity / (i * sparsity + rounds * (1 - sparsity)),
        "geometric": lambda i: 1 - (1 - sparsity) ** (i / rounds),
        "linear": lambda i: i * sparsity / rounds,
    }
    return (*(shares[kind](i) for i in range(1, rounds)), sparsity)
