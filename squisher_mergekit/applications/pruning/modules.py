"""Prune a live model: masks through ``torch.nn.utils.prune``, so that torch's own tools work on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrize import ParametrizationList

from squisher_mergekit.applications.masks import Mask
from squisher_mergekit.applications.pruning.recipe import Inputs, Recipe, make_plan, masks
from squisher_mergekit.applications.pruning.report import Report, make_report
from squisher_mergekit.errors import ConfigError, MismatchError, UnsupportedStateError
from squisher_mergekit.fisher.by_parameter import by_parameter
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.checkpoint_names import CheckpointNames
from squisher_mergekit.models.convert import MomentStore, store_moments
from squisher_mergekit.models.input_axes import input_axes
from squisher_mergekit.models.parameters import describe, memory_names, parameters_of, unwrap_model
from squisher_mergekit.models.roles import named_on_disk, roles_of
from squisher_mergekit.tensors.sharded import is_sharded

_PLACE = "memory"  # for messages
_ORIG, _MASK = "_orig", "_mask"  # what torch.nn.utils.prune appends to the name of a pruned parameter


def prune(
    model: nn.Module,
    fisher: Mapping[str, Tensor] | None = None,
    sparsity: float | None = None,
    *,
    gradient: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Report:
    """Mask the least important weights of a live model.

    Each pruned parameter is masked by ``torch.nn.utils.prune.custom_from_mask``: an optimizer keeps its parameters, and
    ``torch.nn.utils.prune.remove`` makes the masks permanent (call it before saving). Called again with a higher
    sparsity, what is pruned stays pruned and counts; :func:`~squisher_mergekit.applications.pruning.schedule` gives the
    sparsities of several rounds. The choice is the one that ``prune_files`` makes of the saved model, entry by entry.

    Args:
        model: Of transformers, or any other; wrapped or not, on any device.
        fisher: A Fisher of it, or a mapping from its parameters' names to tensors; None where the score needs none.
        sparsity: See :class:`~squisher_mergekit.applications.pruning.recipe.Recipe`.
        gradient: Of ``score="taylor_squared"``: parameter name -> gradient averaged over examples.
        options: The other fields of a :class:`~squisher_mergekit.applications.pruning.recipe.Recipe`.

    Returns:
        What was pruned; its mask has the names of ``model.safetensors``.

    Raises:
        ConfigError: An option is out of range, nothing is left to choose from, or weights pruned earlier would come
            back.
        MismatchError: The Fisher is not of this model, or lacks a parameter that is chosen from.
        ValuesError: F has NaN, infinite or negative entries, or a weight is not finite.
        UnsupportedStateError: A parameter cannot be masked. In all cases the model is as before.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> prune(model, {"0.weight": torch.tensor([[9.0, 1.0], [1.0, 0.1]])}, 0.5).sparsity
        0.5
        >>> model[0].weight.tolist(), torch_prune.is_pruned(model)
        ([[1.0, 0.0], [3.0, 0.0]], True)
    """
    inner = unwrap_model(model)
    with unmasked(inner) as earlier:
        report = choose_weights(model, fisher, sparsity, gradient=gradient, earlier=earlier, **options)
        chosen = _chosen_parameters(inner, report)
        _check_maskable(inner, chosen)
    apply_masks(inner, chosen)
    return report


def choose_weights(
    model: nn.Module,
    fisher: Mapping[str, Tensor] | None = None,
    sparsity: float | None = None,
    *,
    gradient: Mapping[str, Tensor] | None = None,
    earlier: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Report:
    """Choose the weights to prune and leave the model as it is; for those who keep a mask in another way.

    Args:
        model: As for :func:`prune`.
        fisher: As for :func:`prune`.
        sparsity: As for :func:`prune`.
        gradient: As for :func:`prune`.
        earlier: Parameter name -> mask of an earlier round.
        options: As for :func:`prune`.

    Returns:
        The report, whose mask has the names of ``model.safetensors``.

    Raises:
        RefusedError: As for :func:`prune`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> choose_weights(model, sparsity=0.5, score="random").mask["0.weight"].sum()
        tensor(2)
    """
    recipe, earlier = Recipe(sparsity, **options), earlier or {}
    inner = unwrap_model(model)
    checkpoint_names = _checkpoint_names(inner)
    weights = {name: parameter.detach() for name, parameter in parameters_of(inner).items()}
    weights |= {name: weights[name] * mask for name, mask in earlier.items()}
    stored = store_moments(_PLACE, weights, checkpoint_names, ())
    shapes = {
        name: checkpoint_names.shapes[name]
        for name, sources in checkpoint_names.sources.items()
        if all(weights[source].dtype.is_floating_point for source in sources)
    }
    axes = input_axes(inner, checkpoint_names, shapes) if recipe.pattern else None
    plan = make_plan(recipe, shapes, named_on_disk(roles_of(inner), checkpoint_names, shapes), axes)
    inputs = _inputs(inner, recipe, stored, checkpoint_names, fisher, gradient, list(plan.sizes))
    found = dict(masks(plan, inputs))
    _check_earlier(found, checkpoint_names, earlier, weights)
    kept = {name: int(mask.sum()) for name, mask in found.items()}
    whole = {name: torch.ones((), dtype=torch.bool).expand(plan.shapes[name]) for name in plan.ignored}
    return make_report(plan, kept, Mask(found | whole, {"made_by": "prune", **recipe.about()}))


def _check_earlier(
    found: Mapping[str, Tensor],
    checkpoint_names: CheckpointNames,
    earlier: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> None:
    """Refuse masks that would bring back what an earlier round has pruned."""
    every = torch.ones((), dtype=torch.bool)
    whole = {name: earlier.get(name, every.expand(tensor.shape)) for name, tensor in weights.items()}
    old = store_moments(_PLACE, whole, checkpoint_names, ())
    for name, mask in found.items() if earlier else ():
        revived = int((mask & (old.read(name).cpu() == 0)).sum())
        if revived:
            raise ConfigError(
                f"weights pruned earlier stay pruned and count, but {revived} of {name} would come back; ask for a "
                "sparsity of at least what there is, or take torch.nn.utils.prune.remove first to start over"
            )


def apply_masks(model: nn.Module, chosen: Mapping[str, Tensor]) -> None:
    """Mask parameters by ``torch.nn.utils.prune``, in place of the masks that they had.

    Args:
        model: The model, unwrapped. A parameter that several modules share is masked in each.
        chosen: Parameter name -> bool tensor, true where it is kept.
    """
    with unmasked(model):
        holders = _holders(model)
    torch_masks: Any = torch_prune
    for name, mask in chosen.items():
        for module, attribute in holders[name]:
            if attribute + _MASK in module._buffers:
                torch_masks.remove(module, attribute)
            parameter: Any = getattr(module, attribute)
            torch_masks.custom_from_mask(module, attribute, mask.to(parameter.device))


def _checkpoint_names(model: nn.Module) -> CheckpointNames:
    checkpoint_names = describe(model).checkpoint_names
    sharded = next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)
    if checkpoint_names is None or sharded is not None:
        raise UnsupportedStateError(
            f"a model must hold its whole weights to be pruned, but {type(model).__name__} is an adapter or sharded"
            f"{f' ({sharded})' if sharded else ''}; merge or save it first and take squisher prune on the files"
        )
    return checkpoint_names


def _inputs(
    model: nn.Module,
    recipe: Recipe,
    stored: MomentStore,
    checkpoint_names: CheckpointNames,
    fisher: Mapping[str, Tensor] | None,
    gradient: Mapping[str, Tensor] | None,
    names: list[str],
) -> Inputs:
    """Return where weights, and what the score takes beside them, are read.

    Raises:
        ConfigError: What the score takes is not given.
        MismatchError: It lacks a parameter that is chosen from, or does not fit the model.
    """
    if recipe.score not in ("fisher", "taylor_squared"):
        return Inputs(stored.read)
    given, what = (fisher, "a Fisher") if recipe.score == "fisher" else (gradient, "gradient=, a mean gradient")
    if given is None:
        raise ConfigError(f"score {recipe.score} needs {what}; give one, or take score magnitude or random")
    values = by_parameter(model, given, "raw")
    location = given.location if isinstance(given, Fisher) else _PLACE
    for name in names:
        lacking = next((source for source in checkpoint_names.sources[name] if source not in values), None)
        if lacking is not None:
            raise MismatchError(
                f"{what} must cover every parameter that is chosen from, but {location} lacks {lacking}; give one that "
                "has it, or ignore the parameter"
            )
    beside = store_moments(location, values, checkpoint_names, ())
    if not isinstance(given, Fisher):
        return Inputs(stored.read, beside.read, location=location)

    def scale(name: str) -> tuple[float, float]:
        same = (name, *(alias for alias, kept in checkpoint_names.aliases.items() if kept == name))
        known = next((one for one in same if one in given), name)
        return given.offset(known, recipe.scaling), given.factor(known, recipe.scaling)

    return Inputs(stored.read, beside.read, scale, location)


def _chosen_parameters(model: nn.Module, report: Report) -> dict[str, Tensor]:
    """Return the masks of the parameters that were chosen from, by their names in memory."""
    checkpoint_names = _checkpoint_names(model)
    sources = {source for layer in report.layers for source in checkpoint_names.sources[layer.name]}
    return {name: mask for name, mask in report.mask.by_parameter(model).items() if name in sources}


def _holders(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return parameter name -> the modules that have it, several if it is shared, and what they call it."""
    names, holders = memory_names(model), defaultdict(list)
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                holders[names[id(parameter)]].append((module, attribute))
    return holders


def _check_maskable(model: nn.Module, chosen: Mapping[str, Tensor]) -> None:
    """Refuse modules whose weights are read without calling them, where torch's masks are not renewed."""
    holders = _holders(model)
    for name in chosen:
        for module, _ in holders[name]:
            if isinstance(module, NonDynamicallyQuantizableLinear | ParametrizationList):
                raise UnsupportedStateError(
                    f"torch.nn.utils.prune masks a weight when its module is called, but {name} is read without that; "
                    "ignore it, or take choose_weights and keep its mask by MaskedTraining"
                )


@contextmanager
def unmasked(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Give pruned parameters their own names for a while; yields their masks by these."""
    before: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
    found: dict[int, Tensor] = {}
    try:
        for module in model.modules():
            ends = [name for name in module._buffers if name.endswith(_MASK)]
            masked = {
                name.removesuffix(_MASK) for name in ends if name.removesuffix(_MASK) + _ORIG in module._parameters
            }
            if masked:
                before.append((module, dict(module._parameters), {name: module.__dict__.pop(name) for name in masked}))
                plain = {name + _ORIG: name for name in masked}
                own = {plain.get(name, name): parameter for name, parameter in module._parameters.items()}
                module._parameters.clear()
                module._parameters.update(own)
                found.update({id(own[name]): getattr(module, name + _MASK) for name in masked})
        names = memory_names(model)
        yield {names[key]: mask for key, mask in found.items()}
    finally:
        for module, parameters, made in before:
            module._parameters.clear()
            module._parameters.update(parameters)
            module.__dict__.update(made)
