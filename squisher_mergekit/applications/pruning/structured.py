"""Pruning of whole units (filters, neurons, attention heads): scores, selection and masks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from squisher_mergekit.applications import scores
from squisher_mergekit.applications.pruning.modules import apply_masks, unmasked
from squisher_mergekit.applications.pruning.recipe import ScoreName
from squisher_mergekit.applications.selection import Normalize, Scope, check_choices, check_share, min_counts
from squisher_mergekit.errors import ConfigError, MismatchError, ValuesError
from squisher_mergekit.fisher.by_parameter import by_parameter
from squisher_mergekit.fisher.config import Scaling
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.values import check_values
from squisher_mergekit.models.parameters import parameters_of, unwrap_model
from squisher_mergekit.tensors.topk import largest_of_many

# Share of the overall share that each layer keeps. Settled on two seeds of the network of
# scripts/experiments/pruning.py, filters at 25 and 50 %.
_MIN_KEEP = 2 / 3


@dataclass(frozen=True)
class UnitSlice:
    """Entries of the units in a parameter or buffer: unit u has ``start + u width`` to ``start + (u + 1) width``.

    Attributes:
        tensor: Name of the parameter or buffer.
        axis: Axis of the units.
        width: Number of entries of a unit along the axis.
        start: First entry of the first unit.
    """

    tensor: str
    axis: int
    width: int = 1
    start: int = 0

    def rows(self, tensor: Tensor, count: int) -> Tensor:
        """Return the entries of a tensor as [count, entries of a unit]."""
        return tensor.narrow(self.axis, self.start, count * self.width).movedim(self.axis, 0).reshape(count, -1)

    def axis_mask(self, kept: Tensor, size: int) -> Tensor:
        """Return the mask [size] of the indices along the axis that no pruned unit has."""
        found = torch.ones(size, dtype=torch.bool, device="cpu")
        found[self.start : self.start + len(kept) * self.width] = kept.repeat_interleave(self.width)
        return found


@dataclass(frozen=True)
class Units:
    """Units of one layer.

    Attributes:
        name: Name of the layer.
        count: Number of units.
        made: Slices of the weights that make the outputs of the units, with biases and BatchNorm's scale: their scores
            are summed, and pruning sets them to 0.
        read: Slices of the weights that read the outputs; they are superfluous for a pruned unit.
        buffers: Slices of other tensors of the units, such as running statistics.
    """

    name: str
    count: int
    made: tuple[UnitSlice, ...]
    read: tuple[UnitSlice, ...] = ()
    buffers: tuple[UnitSlice, ...] = ()


@dataclass(frozen=True)
class UnitChoice:
    """Units that are kept.

    Attributes:
        units: The units of each layer.
        kept: Name of a layer -> bool tensor, true where the unit is kept.

    Example:
        >>> layer = Units("conv", 3, (UnitSlice("conv.weight", 0),))
        >>> print(UnitChoice((layer,), {"conv": torch.tensor([True, False, True])}))
        conv  2 of 3
        over all  2 of 3
    """

    units: tuple[Units, ...]
    kept: Mapping[str, Tensor]

    @property
    def widths(self) -> dict[str, int]:
        """Name of a layer -> number of units that are kept."""
        return {name: int(kept.sum()) for name, kept in self.kept.items()}

    def __str__(self) -> str:
        lines = [f"{layer.name}  {self.widths[layer.name]} of {layer.count}" for layer in self.units]
        total = sum(layer.count for layer in self.units)
        return "\n".join([*lines, f"over all  {sum(self.widths.values())} of {total}"])


def choose_units(
    model: nn.Module,
    units: Sequence[Units],
    fisher: Mapping[str, Tensor] | None = None,
    sparsity: float = 0.0,
    *,
    score: ScoreName = "fisher",
    normalize: Normalize = "none",
    scope: Scope = "global",
    min_keep: float | None = None,
    gradient: Mapping[str, Tensor] | None = None,
    scaling: Scaling = "debiased",
    seed: int = 0,
    least: float | None = None,
) -> UnitChoice:
    """Choose the units to prune, without a change of the model.

    The score of a unit is the sum of theta^2 F / 2 over its weights: the growth of the loss without the unit, to second
    order and without interactions between weights.

    Args:
        model: The model.
        units: Units, see :mod:`squisher_mergekit.applications.pruning.units`.
        fisher: A Fisher, or a mapping from parameter names to tensors; None for scores that need none.
        sparsity: Share of the units to prune, in [0, 1); rounded to the unit.
        score: ``fisher``. ``taylor_squared``: ``(sum_i theta_i g_i)^2`` with the mean gradient g, the score in the code
            behind the paper's table; the weights of a unit can cancel in it. ``magnitude``: ``sum_i |theta_i|``.
            ``random``: the baseline.
        normalize: ``none`` compares the scores as they are; ``layer`` divides them by their mean over the layer.
        scope: ``global`` prunes the lowest scores of all layers; ``layer`` the same share of each, rounded to the unit.
        min_keep: Share of each layer that is kept, and at least one unit; by default two thirds of ``1 - sparsity``.
            Scores of layers differ by orders of magnitude, so that a global selection would almost empty some.
        gradient: For ``taylor_squared``: parameter name -> gradient averaged over examples.
        scaling: Scale of a Fisher.
        seed: Seed of ``random``.
        least: Old name of ``min_keep``.

    Raises:
        ConfigError: A value is out of range, ``min_keep`` keeps too much, or the Fisher or gradient is missing.
        MismatchError: The Fisher does not fit the model, or lacks a parameter of a unit.
        ValuesError: F has NaN, infinite or negative entries, or a score is not finite.

    Example:
        >>> from squisher_mergekit.applications.pruning.units import chain_units
        >>> model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> fisher = {"0.weight": torch.tensor([[9.0], [1.0], [3.0]])}
        >>> choose_units(model, chain_units(model), fisher, 1 / 3).kept["0"]
        tensor([ True, False,  True])
    """
    if least is not None:
        warnings.warn("least is deprecated; use min_keep", DeprecationWarning, stacklevel=2)
        min_keep = least
    check_share("sparsity", sparsity)
    min_keep = _MIN_KEEP * (1 - sparsity) if min_keep is None else min_keep
    check_share("min_keep", min_keep)
    check_choices(score=(score, ScoreName), normalize=(normalize, Normalize), scope=(scope, Scope))
    found = unit_scores(model, units, fisher, score=score, gradient=gradient, scaling=scaling, seed=seed)
    means = {name: values.mean().item() if normalize == "layer" else 1.0 for name, values in found.items()}
    sizes = {layer.name: layer.count for layer in units}

    def sort_keys(name: str) -> Tensor:
        return scores.sort_keys(lambda block: block, found[name], unit=means[name])

    # A share this small is one unit when rounded up.
    share = max(min_keep, 1 / max(sizes.values()))
    groups = [sizes] if scope == "global" else [{name: size} for name, size in sizes.items()]
    kept: dict[str, Tensor] = {}
    for group in groups:
        total = sum(group.values())
        keep = total - round(total * sparsity)
        kept |= largest_of_many(group, sort_keys, keep, min_counts(group, keep, "global", share))
    return UnitChoice(tuple(units), kept)


def unit_scores(
    model: nn.Module,
    units: Sequence[Units],
    fisher: Mapping[str, Tensor] | None = None,
    *,
    score: ScoreName = "fisher",
    gradient: Mapping[str, Tensor] | None = None,
    scaling: Scaling = "debiased",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return name of a layer -> score of each unit, float64 on the CPU.

    Args:
        model: As for :func:`choose_units`.
        units: As for :func:`choose_units`.
        fisher: As for :func:`choose_units`.
        score: As for :func:`choose_units`.
        gradient: As for :func:`choose_units`.
        scaling: As for :func:`choose_units`.
        seed: As for :func:`choose_units`.

    Raises:
        RefusedError: As for :func:`choose_units`.
    """
    if not units:
        raise ConfigError(
            "there must be units to choose from, found none; see squisher_mergekit.applications.pruning.units"
        )
    if score == "random":
        return {
            layer.name: scores.random_score(layer.name, seed)(torch.empty(layer.count, device="cpu")) for layer in units
        }
    inner = unwrap_model(model)
    with unmasked(inner) as earlier:
        weights = {name: parameter.detach() for name, parameter in parameters_of(inner).items()}
        values = _values(inner, fisher if score == "fisher" else gradient, score, scaling, units)
    weights |= {name: weights[name] * mask for name, mask in earlier.items()}
    found = {layer.name: _score(layer, weights, values, score) for layer in units}
    for name, unit_values in found.items():
        if not bool(unit_values.isfinite().all()):
            raise ValuesError(f"scores must be finite, but those of {name} are not; take sound weights and gradients")
    return found


def _values(
    model: nn.Module, given: Mapping[str, Tensor] | None, score: ScoreName, scaling: Scaling, units: Sequence[Units]
) -> Mapping[str, Tensor]:
    """Return F or the mean gradient of the parameters of units."""
    if score == "magnitude":
        return {}
    what = "a Fisher" if score == "fisher" else "gradient=, a mean gradient"
    if given is None:
        raise ConfigError(f"score {score} needs {what}; give one, or take score magnitude or random")
    values = by_parameter(model, given, scaling)
    place = given.location if isinstance(given, Fisher) else "memory"
    weights = {part.tensor for layer in units for part in layer.made if part.tensor.endswith("weight")}
    for name in sorted(weights):
        if name not in values:
            raise MismatchError(f"{what} must cover every layer that units are chosen from, but {place} lacks {name}")
        if score == "fisher":
            check_values(values[name], name, place)
    return values


def _score(layer: Units, weights: Mapping[str, Tensor], values: Mapping[str, Tensor], score: ScoreName) -> Tensor:
    """Return the score of each unit of a layer."""
    total = torch.zeros(layer.count, dtype=torch.float64, device="cpu")
    for part in layer.made:
        theta = part.rows(weights[part.tensor], layer.count).cpu().double()
        if score == "magnitude":
            total += theta.abs().sum(1)
        elif part.tensor in values:  # a frozen bias or norm of a trained weight has no F
            value = part.rows(values[part.tensor], layer.count).cpu().double()
            total += (theta * value).sum(1) if score == "taylor_squared" else scores.saliency(theta, value).sum(1)
    return total.square_() if score == "taylor_squared" else total


def unit_masks(model: nn.Module, choice: UnitChoice) -> dict[str, Tensor]:
    """Return parameter name -> bool tensor, false at the weights of pruned units, for the parameters of units.

    Args:
        model: The model.
        choice: The units to keep.

    Raises:
        MismatchError: The choice was made for another model.
    """
    with unmasked(unwrap_model(model)):
        shapes = {name: parameter.shape for name, parameter in parameters_of(model).items()}
    masks: dict[str, Tensor] = {}
    for layer in choice.units:
        for part in layer.made:
            if part.tensor not in shapes or shapes[part.tensor][part.axis] < part.start + layer.count * part.width:
                raise MismatchError(
                    f"a choice must be of this model, but {part.tensor} does not have {layer.count} units; choose again"
                )
            mask = masks.setdefault(part.tensor, torch.ones(shapes[part.tensor], dtype=torch.bool, device="cpu"))
            along = part.axis_mask(choice.kept[layer.name], mask.shape[part.axis])
            mask &= along.reshape([-1 if axis == part.axis else 1 for axis in range(mask.ndim)])
    return masks


def mask_units(model: nn.Module, choice: UnitChoice) -> None:
    """Set pruned units to 0 by masks of ``torch.nn.utils.prune``; earlier masks stay in effect.

    Args:
        model: The model, changed in place.
        choice: The units to keep.

    Raises:
        MismatchError: The choice was made for another model.
    """
    inner = unwrap_model(model)
    masks = unit_masks(inner, choice)
    with unmasked(inner) as earlier:
        masks = {name: mask & (earlier[name].cpu() != 0) if name in earlier else mask for name, mask in masks.items()}
    apply_masks(inner, masks)
