"""Pruning of whole units: filters, neurons, attention heads. Their scores, and which are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from squisher_mergekit.applications import scores as single
from squisher_mergekit.applications.pruning.modules import apply_masks, unmasked
from squisher_mergekit.applications.pruning.recipe import Normalize, ScoreName
from squisher_mergekit.applications.selection import Scope, check_share, choose
from squisher_mergekit.errors import ConfigError, MismatchError, ValuesError
from squisher_mergekit.fisher.by_parameter import by_parameter
from squisher_mergekit.fisher.config import Scaling
from squisher_mergekit.fisher.mapping import Fisher, check_values
from squisher_mergekit.models.parameters import parameters_of, unwrap_model

# The least of each layer beside what is kept over all. Settled on two seeds of the network of
# scripts/experiments/pruning.py, filters at 25 and 50 %.
_LEAST = 2 / 3


@dataclass(frozen=True)
class Slice:
    """Where units lie in a parameter or buffer: unit u takes ``start + u width`` to ``start + (u + 1) width``."""

    tensor: str
    axis: int
    width: int = 1
    start: int = 0

    def rows(self, tensor: Tensor, count: int) -> Tensor:
        """Return a tensor's entries as [count, entries of a unit]."""
        own = tensor.narrow(self.axis, self.start, count * self.width).movedim(self.axis, 0)
        return own.reshape(count, -1)

    def places(self, kept: Tensor, size: int) -> Tensor:
        """Return which of ``size`` places along the axis belong to units that are kept, or to none."""
        found = torch.ones(size, dtype=torch.bool)
        found[self.start : self.start + len(kept) * self.width] = kept.repeat_interleave(self.width)
        return found


@dataclass(frozen=True)
class Units:
    """The units of one layer.

    ``made``: the weights that make their outputs, with biases and BatchNorm's scale; their scores are summed, and they
    become 0. ``read``: the weights that read them, which become superfluous. ``buffers``: what else there is of each,
    such as running statistics.
    """

    name: str
    count: int
    made: tuple[Slice, ...]
    read: tuple[Slice, ...] = ()
    buffers: tuple[Slice, ...] = ()


@dataclass(frozen=True)
class Choice:
    """Which units are kept: name of a layer -> bool tensor.

    Example:
        >>> layer = Units("conv", 3, (Slice("conv.weight", 0),))
        >>> print(Choice((layer,), {"conv": torch.tensor([True, False, True])}))
        conv  2 of 3
        over all  2 of 3
    """

    units: tuple[Units, ...]
    kept: Mapping[str, Tensor]

    @property
    def widths(self) -> dict[str, int]:
        """Name of a layer -> how many units are kept."""
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
    least: float | None = None,
    gradient: Mapping[str, Tensor] | None = None,
    scaling: Scaling = "debiased",
    seed: int = 0,
) -> Choice:
    """Choose the units to prune; the model is left as it is.

    A unit's score is the sum over its weights of ``theta^2 F / 2``, by how much the loss grows without it, to second
    order and without what goes on between weights.

    Args:
        model: The model.
        units: See :mod:`squisher_mergekit.applications.pruning.units`.
        fisher: A Fisher, or a mapping from parameter names to tensors; None where the score needs none.
        sparsity: The share of the units that goes, in [0, 1); rounded to the unit.
        score: ``fisher``. ``taylor_squared``: ``(sum_i theta_i g_i)^2`` with g the mean gradient, what the code behind
            the paper's table calls its Fisher score: a squared mean, in which weights of a unit cancel, too.
            ``magnitude``: ``sum_i |theta_i|``. ``random``: the baseline.
        normalize: ``none``: scores are compared as they are. ``layer``: each is divided by their mean over the layer.
        scope: ``global``: the lowest of all layers go. ``layer``: of each the same share, rounded to the unit.
        least: Of each layer at least this share is kept, and one unit. Scores of layers differ by orders of magnitude:
            above a small floor a global choice takes nearly all of some. By default two thirds of
            the share that is kept over all.
        gradient: Of ``taylor_squared``: parameter name -> gradient averaged over examples.
        scaling: Of a Fisher.
        seed: Of ``random``.

    Raises:
        ConfigError: A value is out of range, ``least`` would keep more, or what the score needs is not given.
        MismatchError: The Fisher is not of this model, or lacks a parameter of a unit.
        ValuesError: F has NaN, infinite or negative entries, or a score is not finite.

    Example:
        >>> from squisher_mergekit.applications.pruning.units import chain_units
        >>> model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> fisher = {"0.weight": torch.tensor([[9.0], [1.0], [3.0]])}
        >>> choose_units(model, chain_units(model), fisher, 1 / 3).kept["0"]
        tensor([ True, False,  True])
    """
    check_share("sparsity", sparsity)
    least = _LEAST * (1 - sparsity) if least is None else least
    check_share("least", least)
    for name, value, kinds in (
        ("score", score, ScoreName),
        ("normalize", normalize, Normalize),
        ("scope", scope, Scope),
    ):
        if value not in get_args(kinds):
            raise ConfigError(f"{name} must be one of {', '.join(get_args(kinds))}, found {value!r}")
    found = unit_scores(model, units, fisher, score=score, gradient=gradient, scaling=scaling, seed=seed)
    means = {name: values.mean().item() if normalize == "layer" else 1.0 for name, values in found.items()}
    sizes = {layer.name: layer.count for layer in units}

    def ranked(name: str) -> Tensor:
        return single.ranked(lambda block: block, found[name], unit=means[name])

    # A share this small is one unit when rounded up.
    floor = max(least, 1 / max(sizes.values()))
    groups = [sizes] if scope == "global" else [{name: size} for name, size in sizes.items()]
    kept: dict[str, Tensor] = {}
    for group in groups:
        total = sum(group.values())
        kept |= choose(group, ranked, total - round(total * sparsity), least=floor)
    return Choice(tuple(units), kept)


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
    """Return name of a layer -> the score of each unit, float64 on the CPU.

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
        return {layer.name: single.chance(layer.name, seed)(torch.empty(layer.count)) for layer in units}
    inner = unwrap_model(model)
    with unmasked(inner) as earlier:
        weights = {name: parameter.detach() for name, parameter in parameters_of(inner).items()}
        beside = _beside(inner, fisher if score == "fisher" else gradient, score, scaling, units)
    weights |= {name: weights[name] * mask for name, mask in earlier.items()}
    found = {layer.name: _score(layer, weights, beside, score) for layer in units}
    for name, values in found.items():
        if not bool(values.isfinite().all()):
            raise ValuesError(f"scores must be finite, but those of {name} are not; take sound weights and gradients")
    return found


def _beside(
    model: nn.Module, given: Mapping[str, Tensor] | None, score: ScoreName, scaling: Scaling, units: Sequence[Units]
) -> Mapping[str, Tensor]:
    """Return F or the mean gradient of the parameters that units are made of."""
    if score == "magnitude":
        return {}
    what = "a Fisher" if score == "fisher" else "gradient=, a mean gradient"
    if given is None:
        raise ConfigError(f"score {score} needs {what}; give one, or take score magnitude or random")
    values = by_parameter(model, given, scaling)
    place = given.location if isinstance(given, Fisher) else "memory"
    weights = {one.tensor for layer in units for one in layer.made if one.tensor.endswith("weight")}
    for name in sorted(weights):
        if name not in values:
            raise MismatchError(f"{what} must cover every layer that units are chosen from, but {place} lacks {name}")
        if score == "fisher":
            check_values(values[name], name, place)
    return values


def _score(layer: Units, weights: Mapping[str, Tensor], beside: Mapping[str, Tensor], score: ScoreName) -> Tensor:
    total = torch.zeros(layer.count, dtype=torch.float64)
    for one in layer.made:
        theta = one.rows(weights[one.tensor], layer.count).cpu().double()
        if score == "magnitude":
            total += theta.abs().sum(1)
            continue
        if one.tensor not in beside:  # a frozen bias or norm beside a weight that was trained
            continue
        other = one.rows(beside[one.tensor], layer.count).cpu().double()
        total += (theta * other).sum(1) if score == "taylor_squared" else single.saliency(theta, other).sum(1)
    return total.square_() if score == "taylor_squared" else total


def unit_masks(model: nn.Module, choice: Choice) -> dict[str, Tensor]:
    """Return parameter name -> bool tensor, false at the weights of pruned units; of the parameters that have some.

    Args:
        model: The model.
        choice: Which units are kept.

    Raises:
        MismatchError: The choice is not of this model.
    """
    with unmasked(unwrap_model(model)):
        shapes = {name: parameter.shape for name, parameter in parameters_of(model).items()}
    masks: dict[str, Tensor] = {}
    for layer in choice.units:
        for one in layer.made:
            if one.tensor not in shapes or shapes[one.tensor][one.axis] < one.start + layer.count * one.width:
                raise MismatchError(
                    f"a choice must be of this model, but {one.tensor} does not hold {layer.count} units"
                )
            mask = masks.setdefault(one.tensor, torch.ones(shapes[one.tensor], dtype=torch.bool))
            places = one.places(choice.kept[layer.name], mask.shape[one.axis])
            mask &= places.reshape([-1 if axis == one.axis else 1 for axis in range(mask.ndim)])
    return masks


def mask_units(model: nn.Module, choice: Choice) -> None:
    """Make pruned units 0 by masks of ``torch.nn.utils.prune``, whose tools work on them.

    What a unit was pruned by before stays pruned.

    Args:
        model: The model, changed in place.
        choice: Which units are kept.

    Raises:
        MismatchError: The choice is not of this model.
    """
    inner = unwrap_model(model)
    masks = unit_masks(inner, choice)
    with unmasked(inner) as earlier:
        masks = {name: mask & (earlier[name].cpu() != 0) if name in earlier else mask for name, mask in masks.items()}
    apply_masks(inner, masks)
