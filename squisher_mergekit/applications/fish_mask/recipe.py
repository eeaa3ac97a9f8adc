"""Recipe of a FISH mask: its options, its plan, and ``select`` for models in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from torch import Tensor, nn

from squisher_mergekit.applications.fish_mask.bases import base_of
from squisher_mergekit.applications.fish_mask.heads import ModelParts, in_memory, parts_by_name, weights_in_memory
from squisher_mergekit.applications.masks import Mask, whole_mask
from squisher_mergekit.applications.selection import (
    NEEDED,
    Scope,
    ScoreInputs,
    Selection,
    SelectionPlan,
    check_choices,
    check_keep,
    plan_selection,
    select_masks,
)
from squisher_mergekit.errors import ConfigError
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.fits import check_fits
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.summary import known_scaling
from squisher_mergekit.models.roles import matching
from squisher_mergekit.models.weights import Weights, check_alike
from squisher_mergekit.tensors.safetensors import MemoryStore

if TYPE_CHECKING:
    from typing_extensions import Unpack

ScoreName = Literal["fisher", "reset", "movement", "random"]


class FishMaskOptions(TypedDict, total=False):
    """Keyword arguments of the FISH mask functions, see :class:`FishMaskRecipe`."""

    score: ScoreName
    scope: Scope
    head: tuple[str, ...] | None
    exclude: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class FishMaskRecipe:
    """Options of a FISH mask.

    Args:
        keep: Share of the entries to keep, above 0 and at most 1: ``floor(keep n)`` of the n entries of all
            floating-point tensors that are not excluded. The head counts, and is kept first.
        score: ``fisher``: F, as in the paper. ``reset``: (theta - theta_0)^2 F / 2, the second-order growth of the loss
            if a weight is reset. ``movement``: |theta - theta_0|. ``random``: uniform draws, the baseline.
        scope: ``global`` keeps the largest scores of all tensors, ``layer`` the same share of each tensor.
        head: Names, or regular expressions that are searched for in names, of tensors that are kept whole. None is the
            model's own head, which has no pre-trained value; the output layer of a language model is not a head.
        exclude: Names, or regular expressions, of tensors of which nothing is kept; they do not count.
        seed: Seed of ``random``.

    Raises:
        ConfigError: A value is out of range.

    Source: section 3.4 of "Fishers for Free?" (Li et al., ICML 2025); Sung et al., 2021, count the head in the same
    way.

    Example:
        >>> FishMaskRecipe(0.005).count(12345)
        61
    """

    keep: float
    score: ScoreName = "fisher"
    scope: Scope = "global"
    head: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(score=(self.score, ScoreName))
        check_keep(self.keep)
        self.selection(frozenset(), frozenset())

    @property
    def takes_fisher(self) -> bool:
        """True if the score needs F."""
        return "fisher" in NEEDED[self.score]

    @property
    def takes_base(self) -> bool:
        """True if the score needs the pre-trained values."""
        return "base" in NEEDED[self.score]

    def count(self, entries: int) -> int:
        """Return the number of entries to keep."""
        return self.selection(frozenset(), frozenset()).count(entries)

    def selection(self, head: frozenset[str], excluded: frozenset[str]) -> Selection:
        """Return the selection for the names of the head and of the excluded tensors."""
        return Selection(float(self.keep), self.score, self.scope, always=head, never=excluded, seed=self.seed)

    def metadata(self, plan: SelectionPlan) -> dict[str, Any]:
        """Return the options and the counts of a plan, for JSON."""
        return {
            "made_by": "mask select",
            **asdict(self),
            "kept": plan.keep,
            "entries": plan.entries,
            "heads": sorted(plan.selection.always),
            "excluded": sorted(plan.selection.never),
        }


def plan_mask(recipe: FishMaskRecipe, weights: Weights, parts: ModelParts) -> SelectionPlan:
    """Plan a FISH mask by headers alone, and check that it can be met.

    Args:
        recipe: The recipe.
        weights: The trained weights.
        parts: Head and buffers of the model; buffers are outside of the plan.

    Raises:
        ConfigError: A pattern matches no name, or the head alone has more entries than the mask keeps.
    """
    infos = {name: weights.infos[name] for name in sorted(weights.infos)}
    shapes = {name: info.shape for name, info in infos.items() if info.dtype.is_floating_point}
    outside = {name: "buffer" for name in shapes if name in parts.buffers}
    names = [name for name in shapes if name not in outside]
    excluded = {hit for pattern in recipe.exclude for hit in matching(names, pattern, "exclude")}
    head = set(parts.heads)
    if recipe.head is not None:
        head = {hit for pattern in recipe.head for hit in matching(names, pattern, "head")}
    both = sorted(head & excluded)
    if both:
        raise ConfigError(f"a tensor can be kept as head or excluded, but {both[0]} is to be both; name the head anew")
    plan = SelectionPlan(recipe.selection(frozenset(head), frozenset(excluded)), shapes, outside)
    if plan.keep == 0 and plan.whole == 0:
        raise ConfigError(
            f"keep must be a share of one entry at least, but {recipe.keep:g} of {plan.entries} entries is less; "
            "keep more"
        )
    if plan.keep < plan.whole:
        raise ConfigError(
            f"keep must leave room for the head, which counts, but {recipe.keep:g} of {plan.entries} entries are "
            f"{plan.keep} and the head ({', '.join(sorted(head))}) has {plan.whole}; keep more, or name "
            "another head (--head, --no-head)"
        )
    return plan_selection(plan.selection, shapes, outside)


def open_inputs(
    recipe: FishMaskRecipe, plan: SelectionPlan, tuned: Weights, base: Weights | None, fisher: Fisher | None
) -> tuple[ScoreInputs, str | None]:
    """Return the readers of the tensors that the score needs, after a check of their headers.

    Args:
        recipe: The recipe.
        plan: Its plan.
        tuned: The trained weights.
        base: The pre-trained weights, by the names of the trained ones.
        fisher: A Fisher of the trained weights.

    Returns:
        The readers, and the difference from the weights at which the Fisher was made, in words; None if equal or
        unknown.

    Raises:
        ConfigError: The score needs a Fisher or a base that is missing.
        MismatchError: The Fisher or the base lacks a tensor to choose from, or its shape differs.
    """
    differs, inputs = None, dict[str, Any]()
    if recipe.takes_fisher:
        if fisher is None:
            raise ConfigError(f"score {recipe.score} needs a Fisher; give --fisher, or take movement or random")
        differs = check_fits(fisher, tuned, plan.sizes)
        inputs |= {"fisher": fisher.__getitem__, "scale": _scale(fisher), "location": fisher.location}
    if recipe.takes_base:
        if base is None:
            raise ConfigError(f"score {recipe.score} needs the pre-trained model; give --base, or take fisher")
        check_alike(tuned, base, plan.sizes)
        inputs["base"] = base.read
    return ScoreInputs(tuned.read, **inputs), differs


def _scale(fisher: Fisher) -> Callable[[str], tuple[float, float]]:
    """Return the scale to the mean square per step: tensors may differ in their steps."""
    scaling = known_scaling(fisher)
    return lambda name: (fisher.offset(name, scaling), fisher.factor(name, scaling))


def all_masks(
    plan: SelectionPlan, inputs: ScoreInputs, advance: Callable[[], object] = lambda: None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the mask of every floating-point tensor in the order of names; buffers are kept whole.

    Args:
        plan: The plan.
        inputs: Readers of the tensors.
        advance: Function called after each read.

    Raises:
        ValuesError: An entry of F is NaN, infinite or negative, or a weight is not finite.
    """
    masks = select_masks(plan, inputs, advance)
    for name, shape in plan.shapes.items():
        yield (name, whole_mask(shape)) if name in plan.outside else next(masks)


def select(
    model: nn.Module | Mapping[str, Tensor],
    fisher: Mapping[str, Tensor] | None = None,
    keep: float = 0.005,
    *,
    base: nn.Module | Mapping[str, Tensor] | None = None,
    **options: Unpack[FishMaskOptions],
) -> Mask:
    """Return the mask of the weights with the largest scores over all tensors.

    ``select_files`` on the saved model selects the same entries.

    Args:
        model: The trained model, or a mapping from names on disk to tensors.
        fisher: A Fisher of the model, or a mapping from names on disk to tensors; None for scores that need none.
        keep: Share of the entries to keep, head included.
        base: The model before training, for scores that need it.
        options: The other options of a :class:`FishMaskRecipe`.

    Returns:
        The mask, by names on disk; ``mask.by_parameter(model)`` returns it by names in memory.

    Raises:
        ConfigError: An option is out of range, or the head alone has more entries than the mask keeps.
        MismatchError: The Fisher or the base does not fit the model, or lacks a tensor to choose from.
        ValuesError: F has NaN, infinite or negative entries, or a weight is not finite.

    Source: section 3.4 of "Fishers for Free?" (Li et al., ICML 2025).

    Example:
        >>> import torch
        >>> weights = {"w": torch.tensor([1.0, 2.0, 3.0]), "classifier.weight": torch.zeros(1)}
        >>> mask = select(weights, {"w": torch.tensor([0.5, 0.1, 0.2])}, keep=0.5)
        >>> mask["w"].tolist(), mask["classifier.weight"].tolist()
        ([True, False, False], [True])
    """
    recipe = FishMaskRecipe(keep, **options)
    weights, parts = _opened(model)
    before = None if base is None else base_of(_opened(base)[0], weights)
    if fisher is not None and not isinstance(fisher, Fisher):
        fisher = Fisher(MemoryStore(fisher), FisherConfig(statistic="mean"))
    plan = plan_mask(recipe, weights, parts)
    inputs, _ = open_inputs(recipe, plan, weights, before, fisher)
    return Mask({name: mask.clone() for name, mask in all_masks(plan, inputs)}, recipe.metadata(plan))


def _opened(model: nn.Module | Mapping[str, Tensor]) -> tuple[Weights, ModelParts]:
    if isinstance(model, nn.Module):
        return in_memory(model)
    return weights_in_memory(model), parts_by_name(model)
