"""Translation of an optimizer's slots from the names of their trainer to those of a Hugging Face model."""

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import MismatchError, NamingError, RefusedError, UnsupportedStateError
from squisher_mergekit.models.checkpoint_names import checkpoint_names
from squisher_mergekit.models.names import ParameterInfo
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.optimizers.assign_names import assign
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.checkpoints.run_folder import Folders
from squisher_mergekit.optimizers.checkpoints.trainers.olmo_safetensors import is_encoded
from squisher_mergekit.optimizers.slots import OptimizerSlot, OptimizerState, parameters_of
from squisher_mergekit.optimizers.translation.families import FAMILIES, NANOGPT, OLMO, REORDERED_NORMS
from squisher_mergekit.optimizers.translation.fused import PlacedSlot, fused
from squisher_mergekit.optimizers.translation.fused_rows import by_rows
from squisher_mergekit.optimizers.translation.moves import Dimensions, Move, Part, moved
from squisher_mergekit.optimizers.translation.schemes import Family, Scheme, Target
from squisher_mergekit.tensors.lazy import MaybeLazy, Slices

LOG = logging.getLogger("squisher_mergekit")
_NO_WEIGHTS = "no_weights"  # basename of no file
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
_BLOCK_NUMBER = re.compile(r"\.\d+\.")
_KINDS = {"weight": "weight", "bias": "bias", "scale": "weight"}


def translate(state: OptimizerState, folders: Folders) -> OptimizerState:
    """Return slots with the names of a Hugging Face model; slots with other names stay as they are.

    Args:
        state: The slots, named or numbered.
        folders: Folders of the model's config.

    Raises:
        NamingError: The slots are numbered in their trainer's order, which needs the config.
        UnsupportedStateError: The table has no such model.
        MismatchError: The table lacks a name, or a tensor does not fit the config.
    """
    family = _family(state)
    if family is None:
        return state
    config = folders.config.config
    kind = config.get("model_type") if config is not None else None
    if not isinstance(kind, str) or config is None:
        return _untranslated(_own_names(state, family, None), family)
    scheme = family.schemes.get(kind)
    if scheme is None:
        raise UnsupportedStateError(
            f"the names in {state.location} are those of {family.name}, which can be translated to those of "
            f"{', '.join(sorted(family.schemes))}, but the config in {folders.config.folder} is of {kind}; estimate a "
            "Fisher from data"
        )
    _check_norms(state.raw, kind, folders)
    sizes = replace(dimensions_of(config), ranks=state.raw.tensor_ranks)
    family = by_rows(state.raw, family, kind, sizes, folders.weights)
    scheme = family.schemes[kind]
    named = _own_names(state, family, (scheme, config, folders))
    translated = _translated(named, family, scheme, config, folders, sizes)
    _refuse_other_kind(translated, family, scheme, folders)
    return translated


def without_own_weights(folders: Folders) -> Folders:
    """Return folders without weights whose names are a trainer's own, where the config is of a Hugging Face model.

    A Fisher under Hugging Face names belongs to the weights of ``given``, or to none that are here.

    Args:
        folders: Folders of the config and the weights.
    """
    weights, config = folders.weights, folders.config.config
    names = list(weights.infos)
    family = OLMO if is_encoded(names) else family_of(names)
    if family is None or config is None or config.get("model_type") not in family.schemes:
        return folders
    none = Weights(weights.folder, _NO_WEIGHTS)
    given = folders.given if folders.given is not None and folders.given is not weights else none
    beside = none if folders.beside is weights else folders.beside
    return replace(folders, weights=given, beside=beside)


def family_of(names: Sequence[str]) -> Family | None:
    """Return the family whose marks some names have; None if there is none.

    Example:
        >>> family_of(["tok_embeddings.weight", "layers.0.sa_norm.scale"]).name, family_of(["model.norm.weight"])
        ('torchtune', None)
    """
    return next((f for f in FAMILIES if f.mark is not None and any(map(f.mark.fullmatch, names))), None)


def _family(state: OptimizerState) -> Family | None:
    """Return the family of a state's trainer, by its layout, its names, or those of the model in the same file."""
    own = state.raw.own
    if own is not None and own.family is not None:
        return next(family for family in FAMILIES if family.name == own.family)
    if state.named:
        return family_of([str(slot.name) for slot in state.slots])
    return family_of(list(state.raw.model)) if state.raw.model is not None else None


def _untranslated(state: OptimizerState, family: Family) -> OptimizerState:
    """Return the slots under their own names, with a warning."""
    LOG.warning(
        "%s: names are not those of a Hugging Face model, but those of %s; give --model DIR, a folder with the model's "
        "config.json, to have them translated",
        state.location,
        family.name,
    )
    return state


def _own_names(
    state: OptimizerState, family: Family, model: tuple[Scheme, Mapping[str, Any], Folders] | None
) -> OptimizerState:
    """Name the slots of a numbered state in its trainer's order.

    Raises:
        NamingError: The order needs the model's config, or the slots do not fit it.
    """
    if state.named:
        return state
    if len(state.optimizers) > 1:
        raise NamingError(f"{state.location} must hold the state of one optimizer of {family.name}; give --names FILE")
    if state.raw.model is not None:
        shapes = parameters_of(state.raw.model)
        # Buffers of the trainer's model, such as masks of attention, are in no table.
        parameters = [ParameterInfo(n, s) for n, s in shapes.items() if model is None or _is_known(n, family, model[0])]
    elif model is not None:
        parameters = list(_parameters(family, *model))
    else:
        raise NamingError(
            f"the parameters in {state.location} are numbered in the order of {family.name}, which follows from the "
            "model's config.json; give --model DIR, a folder with it"
        )
    chosen = assign([[slot.shape for slot in group] for group in state.groups], parameters, None, str(state.location))
    groups = tuple(
        tuple(replace(slot, name=name) for slot, name in zip(group, names, strict=True))
        for group, names in zip(state.groups, chosen, strict=True)
    )
    if not all(slot.name for group in groups for slot in group):
        groups = tuple(tuple(slot for slot in group if slot.name) for group in groups)
    return OptimizerState(state.raw, (groups,))


def _parameters(family: Family, scheme: Scheme, config: Mapping[str, Any], folders: Folders) -> Iterator[ParameterInfo]:
    """Yield the parameters of a model in the order of a family whose modules correspond one to one."""
    names = checkpoint_names(folders.config.folder, folders.weights.infos)
    modules = list(scheme.outside.items())
    before, after = modules[:1], modules[1:]
    order = [(own, "", targets[0]) for own, targets in before]
    for number in range(_number(config, _LAYERS)):
        prefix, block = f"layers.{number + family.first}.", scheme.block.format(number)
        order += [(prefix + own, block, targets[0]) for own, targets in scheme.inside.items()]
    order += [(own, "", targets[0]) for own, targets in after]
    shapes = {parameter.name: parameter.shape for parameter in names.parameters}
    sizes = dimensions_of(config)
    for own, block, target in order:
        for kind in ("weight", "bias"):
            shape = shapes.get(f"{block}{target.module}.{kind}")
            if shape is not None and target.part is not None:
                shape = tuple(target.part(sizes, shape[0])(torch.empty(shape, device="meta")).shape)
            if shape is not None:
                yield ParameterInfo(f"{own}.{kind}", shape)


def _translated(
    state: OptimizerState,
    family: Family,
    scheme: Scheme,
    config: Mapping[str, Any],
    folders: Folders,
    sizes: Dimensions,
) -> OptimizerState:
    last = list[Any]()
    layers = _number(config, _LAYERS)
    scheme = _in_use(scheme, folders)
    optimizers = []
    for groups in state.optimizers:
        parts = (
            [part for slot in group for part in _parts(slot, family, scheme, sizes, layers, last, state)]
            for group in groups
        )
        optimizers.append(fused(parts, state.location))
    masters = {}
    for name, master in state.raw.masters.items():
        for new, moves, _ in _targets(name, family, scheme, sizes, layers, tuple(master.shape)):
            tensor = moved(master, moves, last)
            if isinstance(tensor, Slices):
                masters[scheme.since.get(new, new)] = tensor
    return OptimizerState(replace(state.raw, masters=masters), tuple(optimizers))


def _refuse_other_kind(state: OptimizerState, family: Family, scheme: Scheme, folders: Folders) -> None:
    """Refuse a model with a parameter in each block that the trained one had in none.

    Frozen embeddings are not in a state, and nanoGPT's models without biases are Hugging Face models with biases of 0.

    Raises:
        MismatchError: The config is of another kind of model, for which rows may have another order.
    """
    try:
        parameters = checkpoint_names(folders.config.folder, folders.weights.infos).parameters
    except RefusedError:
        return
    saved = [name for name in state.raw.model or () if _is_known(name, family, scheme)]
    names = [name for own in saved for name, _, _ in _targets(own, family, scheme, Dimensions(1, 1, 1, 1), 1, None)]
    present = {_BLOCK_NUMBER.sub(".", str(name)) for name in (*names, *(slot.name for slot in state.slots))}
    for parameter in parameters:
        kind = _BLOCK_NUMBER.sub(".", parameter.name)
        optional = kind == parameter.name or (family is NANOGPT and kind.endswith("bias"))
        if not optional and kind not in present:
            raise MismatchError(
                f"{state.location} must be of the model in {folders.config.folder}, which has {parameter.name}, but "
                "has that parameter in no layer, so that it is of another kind of model; give the --model that was "
                "trained"
            )


def _in_use(scheme: Scheme, folders: Folders) -> Scheme:
    """Return a scheme with only those later names that the weights, or the installed transformers, have."""
    if not scheme.since:
        return scheme
    known: Collection[str] = folders.weights.infos
    if not known:
        try:
            known = checkpoint_names(folders.config.folder).first
        except RefusedError:
            known = ()
    return replace(scheme, since={old: new for old, new in scheme.since.items() if new in known and old not in known})


def _parts(
    slot: OptimizerSlot,
    family: Family,
    scheme: Scheme,
    sizes: Dimensions,
    layers: int,
    last: list[Any],
    state: OptimizerState,
) -> Iterator[PlacedSlot]:
    """Yield the slots of the Hugging Face parameters that one parameter of the trainer corresponds to."""
    shape = slot.shape
    try:
        for first_name, moves, place in _targets(str(slot.name), family, scheme, sizes, layers, shape):
            name = scheme.since.get(first_name, first_name)
            if slot.tensor is None or shape is None:
                yield place, replace(slot, name=name, shape=None, momentum=None, factors=(None, None))
                continue
            tensor = moved(slot.tensor, moves, last)
            momentum = _moved_momentum(slot.momentum, moves, last)
            factors = slot.factors if not moves else (None, None)
            shape_of_part = tuple(tensor.shape)
            yield (
                place,
                replace(slot, name=name, tensor=tensor, shape=shape_of_part, momentum=momentum, factors=factors),
            )
    except RefusedError:
        raise
    except (ValueError, RuntimeError, IndexError) as error:
        raise MismatchError(
            f"{slot.name} in {state.location} must have the shape that the model's config.json gives it, found "
            f"{list(shape or ())} ({error!s:.120}); give the --model that was trained"
        ) from None


def _moved_momentum(momentum: MaybeLazy | None, moves: Sequence[Move], last: list[Any]) -> MaybeLazy | None:
    """Return the mean gradient after the moves; None where it is stored in pieces, which would be read once more."""
    if momentum is None or not (isinstance(momentum, Tensor) or momentum.parts):
        return momentum if not moves else None
    return moved(momentum, moves, last)


def _is_known(name: str, family: Family, scheme: Scheme) -> bool:
    try:
        return bool(_targets(name, family, scheme, Dimensions(1, 1, 1, 1), 1, None))
    except MismatchError:
        return False


def _targets(
    name: str, family: Family, scheme: Scheme, sizes: Dimensions, layers: int, shape: tuple[int, ...] | None
) -> list[tuple[str, list[Move], tuple[int, int] | None]]:
    """Return the Hugging Face names of a parameter of the trainer, each with the moves of its entries, and its place.

    The place is that among the parts of a fused parameter, with their number; None for a whole parameter.

    Raises:
        MismatchError: The table lacks the name, or a stacked tensor has another number of layers.
    """
    own = name
    for pattern, replacement in family.rewrites:
        own = re.sub(pattern, replacement, own)
    module, _, kind = own.rpartition(".")
    kind = _KINDS.get(kind, "")
    found = scheme.outside.get(module)
    if found is not None and kind:
        rows = shape[0] if shape else 0
        return [(f"{target.module}.{kind}", [make(sizes, rows) for make in target.moves], None) for target in found]
    matched = family.block.fullmatch(own)
    targets = scheme.inside.get(matched[2].rpartition(".")[0]) if matched is not None else None
    if matched is None or targets is None or not kind:
        raise MismatchError(
            f"the names of {family.name} must be known to be translated, but {name} is not; give --names FILE, or "
            "estimate a Fisher from data"
        )
    stacked = matched[1] is None
    if stacked and shape is not None and shape[0] != layers:
        raise MismatchError(
            f"{name} must stack the {layers} layers of the model's config.json, found {shape[0]}; give the --model "
            "that was trained"
        )
    numbers = range(layers) if stacked else [int(matched[1]) - family.first]
    inner = shape[1:] if stacked and shape else shape
    rows = inner[0] if inner else 0
    return [
        (
            f"{scheme.block.format(number)}{target.module}.{kind}",
            [*([Part(number)] if stacked else []), *(make(sizes, rows) for make in target.moves)],
            _place(matched[2].rpartition(".")[0], target, scheme),
        )
        for number in numbers
        for target in targets
    ]


def _place(own: str, target: Target, scheme: Scheme) -> tuple[int, int] | None:
    if target.part is None:
        return None
    parts = [name for name, targets in scheme.inside.items() if targets[0].module == target.module]
    return parts.index(own), len(parts)


def dimensions_of(config: Mapping[str, Any]) -> Dimensions:
    """Return the sizes of a model that the moves depend on.

    Args:
        config: Content of ``config.json``.

    Raises:
        MismatchError: A size is missing.

    Example:
        >>> dimensions_of({"num_attention_heads": 4, "hidden_size": 32, "vocab_size": 7})
        Dimensions(heads=4, groups=4, width=8, vocabulary=7, ranks=1)
    """
    heads, hidden = _number(config, ("num_attention_heads", "n_head")), _number(config, ("hidden_size", "n_embd"))
    groups = config.get("num_key_value_heads")
    width = config.get("head_dim")
    return Dimensions(
        heads,
        groups if isinstance(groups, int) and groups > 0 else heads,
        width if isinstance(width, int) and width > 0 else hidden // heads,
        _number(config, ("vocab_size",)),
    )


def _number(config: Mapping[str, Any], keys: Sequence[str]) -> int:
    found = next((config[key] for key in keys if isinstance(config.get(key), int) and config[key] > 0), None)
    if found is None:
        raise MismatchError(
            f"the model's config.json must have {keys[0]}, found none; give the --model that was trained"
        )
    return int(found)


def _check_norms(raw: RawState, kind: str, folders: Folders) -> None:
    """Refuse a config whose norms are at other places than those of the trained model; both have equal shapes.

    Raises:
        MismatchError: The trainer's own config says that the norms are elsewhere.
    """
    reordered = None if raw.own is None else raw.own.reordered_norm
    if reordered is not None and reordered != (kind in REORDERED_NORMS):
        raise MismatchError(
            f"the model in {raw.location} has its norms {'after' if reordered else 'before'} attention and MLP, by its "
            f"own config, but the config in {folders.config.folder} is of {kind}, which has them elsewhere; give the "
            "--model that was trained"
        )
