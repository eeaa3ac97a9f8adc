"""Pruning of a model in memory, by the masks of ``torch.nn.utils.prune``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrize import ParametrizationList

from squisher_mergekit._deprecated import renamed_options
from squisher_mergekit.applications.masks import Mask, whole_mask
from squisher_mergekit.applications.pruning.recipe import PruningOptions, PruningRecipe, plan_pruning
from squisher_mergekit.applications.pruning.report import PruningReport, make_report
from squisher_mergekit.applications.selection import ScoreInputs, select_masks
from squisher_mergekit.errors import ConfigError, MismatchError, UnsupportedStateError
from squisher_mergekit.fisher.by_parameter import by_parameter
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.convert import MomentStore, store_moments
from squisher_mergekit.models.input_axes import input_axes
from squisher_mergekit.models.names import CheckpointNames
from squisher_mergekit.models.parameters import describe, memory_names, parameters_of, unwrap_model
from squisher_mergekit.models.roles import named_on_disk, roles_of
from squisher_mergekit.tensors.sharded import is_sharded

if TYPE_CHECKING:
    from typing_extensions import Unpack

_PLACE = "memory"  # location in messages
_ORIG, _MASK = "_orig", "_mask"  # suffixes of torch.nn.utils.prune for a pruned parameter and its mask


def prune(
    model: nn.Module,
    fisher: Mapping[str, Tensor] | None = None,
    sparsity: float | None = None,
    *,
    gradient: Mapping[str, Tensor] | None = None,
    **options: Unpack[PruningOptions],
) -> PruningReport:
    """Mask the least important weights of a model in memory.

    ``torch.nn.utils.prune.custom_from_mask`` masks each pruned parameter: an optimizer keeps its parameters, and
    ``torch.nn.utils.prune.remove`` makes the masks permanent (call it before saving). A later call with a higher
    sparsity keeps earlier masks, and counts them; :func:`~squisher_mergekit.applications.pruning.schedule` returns the
    sparsities of several rounds. ``prune_files`` on the saved model prunes the same entries.

    Args:
        model: Any model, wrapped or not, on any device.
        fisher: A Fisher of the model, or a mapping from its parameters' names to tensors; None for scores that need
            none.
        sparsity: Share of the candidate entries that becomes 0.
        gradient: For ``score="taylor_squared"``: parameter name -> gradient averaged over examples.
        options: The other options of a :class:`~squisher_mergekit.applications.pruning.PruningRecipe`.

    Returns:
        The report; its mask has the names of ``model.safetensors``.

    Raises:
        ConfigError: An option is out of range, no candidate tensor is left, or weights that were pruned earlier would
            come back.
        MismatchError: The Fisher does not fit this model, or lacks a candidate parameter.
        ValuesError: F has NaN, infinite or negative entries, or a weight is not finite.
        UnsupportedStateError: A parameter cannot be masked. After any error the model is unchanged.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> prune(model, {"0.weight": torch.tensor([[9.0, 1.0], [1.0, 0.1]])}, 0.5).sparsity
        0.5
        >>> model[0].weight.tolist(), torch_prune.is_pruned(model)
        ([[1.0, 0.0], [3.0, 0.0]], True)
    """
    inner = unwrap_model(model)
    with unmasked(inner) as earlier:
        renamed = renamed_options(options, least="min_keep")
        report = choose_weights(model, fisher, sparsity, gradient=gradient, earlier=earlier, **renamed)
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
    **options: Unpack[PruningOptions],
) -> PruningReport:
    """Choose the weights to prune, without a change of the model.

    Args:
        model: As for :func:`prune`.
        fisher: As for :func:`prune`.
        sparsity: As for :func:`prune`.
        gradient: As for :func:`prune`.
        earlier: Parameter name -> mask of an earlier round.
        options: As for :func:`prune`.

    Returns:
        The report; its mask has the names of ``model.safetensors``.

    Raises:
        RefusedError: As for :func:`prune`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> choose_weights(model, sparsity=0.5, score="random").mask["0.weight"].sum()
        tensor(2)
    """
    recipe = PruningRecipe(sparsity, **renamed_options(options, least="min_keep"))
    earlier = earlier or {}
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
    plan = plan_pruning(recipe, shapes, named_on_disk(roles_of(inner), checkpoint_names, shapes), axes)
    inputs = _inputs(inner, recipe, stored, checkpoint_names, fisher, gradient, list(plan.sizes))
    found = dict(select_masks(plan, inputs))
    _check_earlier(found, checkpoint_names, earlier, weights)
    kept = {name: int(mask.sum()) for name, mask in found.items()}
    whole = {name: whole_mask(plan.shapes[name]) for name in plan.outside}
    return make_report(recipe, plan, kept, Mask(found | whole, {"made_by": "prune", **recipe.metadata()}))


def _check_earlier(
    found: Mapping[str, Tensor],
    checkpoint_names: CheckpointNames,
    earlier: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> None:
    """Raise if a mask keeps a weight that an earlier round pruned."""
    whole = {name: earlier.get(name, whole_mask(tensor.shape)) for name, tensor in weights.items()}
    old = store_moments(_PLACE, whole, checkpoint_names, ())
    for name, mask in found.items() if earlier else ():
        revived = int((mask & (old.read(name).cpu() == 0)).sum())
        if revived:
            raise ConfigError(
                f"weights pruned earlier stay pruned and count, but {revived} of {name} would come back; ask for at "
                "least the present sparsity, or call torch.nn.utils.prune.remove first to start over"
            )


def apply_masks(model: nn.Module, chosen: Mapping[str, Tensor]) -> None:
    """Mask parameters by ``torch.nn.utils.prune``, in place of their earlier masks.

    Args:
        model: The model, unwrapped. A shared parameter is masked in each of its modules.
        chosen: Parameter name -> bool tensor, true where the weight is kept.
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
            f"a model must have its whole weights to be pruned, but {type(model).__name__} is an adapter or sharded"
            f"{f' ({sharded})' if sharded else ''}; merge or save it first and take squisher prune on the files"
        )
    return checkpoint_names


def _inputs(
    model: nn.Module,
    recipe: PruningRecipe,
    stored: MomentStore,
    checkpoint_names: CheckpointNames,
    fisher: Mapping[str, Tensor] | None,
    gradient: Mapping[str, Tensor] | None,
    names: list[str],
) -> ScoreInputs:
    """Return the readers of the tensors that the score needs.

    Raises:
        ConfigError: The Fisher or the gradient is missing.
        MismatchError: It lacks a candidate parameter, or does not fit the model.
    """
    if recipe.score not in ("fisher", "taylor_squared"):
        return ScoreInputs(stored.read)
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
    read = store_moments(location, values, checkpoint_names, ()).read
    if not isinstance(given, Fisher):
        return ScoreInputs(stored.read, fisher=read, gradient=read, location=location)

    def scale(name: str) -> tuple[float, float]:
        tied = (name, *(alias for alias, kept in checkpoint_names.aliases.items() if kept == name))
        known = next((alias for alias in tied if alias in given), name)
        return given.offset(known, recipe.scaling), given.factor(known, recipe.scaling)

    return ScoreInputs(stored.read, read, scale=scale, location=location)


def _chosen_parameters(model: nn.Module, report: PruningReport) -> dict[str, Tensor]:
    """Return the masks of the candidate parameters, by name in memory."""
    checkpoint_names = _checkpoint_names(model)
    sources = {source for layer in report.layers for source in checkpoint_names.sources[layer.name]}
    return {name: mask for name, mask in report.mask.by_parameter(model).items() if name in sources}


def _holders(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return parameter name -> its modules (several if it is shared) and its attribute in each."""
    names, holders = memory_names(model), defaultdict(list)
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                holders[names[id(parameter)]].append((module, attribute))
    return holders


def _check_maskable(model: nn.Module, chosen: Mapping[str, Tensor]) -> None:
    """Raise for modules whose weights are read without a call, so that torch's masks would not be applied."""
    holders = _holders(model)
    for name in chosen:
        for module, _ in holders[name]:
            if isinstance(module, NonDynamicallyQuantizableLinear | ParametrizationList):
                raise UnsupportedStateError(
                    f"torch.nn.utils.prune masks a weight when its module is called, but {name} is read without that; "
                    "ignore it, or call choose_weights and train its mask by MaskedTraining"
                )


@contextmanager
def unmasked(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Give pruned parameters their original names inside the context; yield name -> mask."""
    changed: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
    found: dict[int, Tensor] = {}
    try:
        for module in model.modules():
            buffers = [name for name in module._buffers if name.endswith(_MASK)]
            masked = {
                name.removesuffix(_MASK) for name in buffers if name.removesuffix(_MASK) + _ORIG in module._parameters
            }
            if masked:
                changed.append((module, dict(module._parameters), {name: module.__dict__.pop(name) for name in masked}))
                plain = {name + _ORIG: name for name in masked}
                renamed = {plain.get(name, name): parameter for name, parameter in module._parameters.items()}
                module._parameters.clear()
                module._parameters.update(renamed)
                found.update({id(renamed[name]): getattr(module, name + _MASK) for name in masked})
        names = memory_names(model)
        yield {names[key]: mask for key, mask in found.items()}
    finally:
        for module, parameters, attributes in changed:
            module._parameters.clear()
            module._parameters.update(parameters)
            module.__dict__.update(attributes)
