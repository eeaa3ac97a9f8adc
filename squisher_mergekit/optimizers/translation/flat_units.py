"""Flat parameters of FSDP1, as ``optimizer.state_dict()`` of each rank holds them: cut by the model's modules.

Without original parameters, each wrapped module has one flat parameter: first that of the root, with everything outside
of the decoder layers, then one for each layer. With original parameters, each parameter is flat on its own; so is each
trained parameter of an adapter of peft, whose wrapping policy puts every trained layer into a module of its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from squisher_mergekit.errors import MismatchError, NamingError
from squisher_mergekit.models.adapters import adapter_names
from squisher_mergekit.models.checkpoint_names import meta_model
from squisher_mergekit.models.names import ParameterInfo
from squisher_mergekit.optimizers.checkpoints.flat_buffers import cut
from squisher_mergekit.optimizers.checkpoints.run_folder import Folders
from squisher_mergekit.optimizers.slots import OptimizerSlot, OptimizerState
from squisher_mergekit.tensors.lazy import MaybeLazy, Slices


def unflatten(state: OptimizerState, folders: Folders) -> OptimizerState:
    """Return slots with the names and shapes of the model's parameters; a state that is not flat stays as it is.

    Args:
        state: The slots, flat on all ranks together.
        folders: Folders of the model's config, and of the adapter's.

    Raises:
        NamingError: There is no config, or the number of flat parameters is that of neither layers nor parameters.
        NotFoundError: An adapter's names need its base model.
        MismatchError: A flat parameter has another length than the parameters in it.
    """
    if not state.raw.ranks:
        return state
    slots = list(state.slots)
    if folders.adapter is None:
        units = _of_model(state, folders)
    else:
        base = None if folders.base is None else folders.base.folder
        units = _of_adapter(state, folders.adapter, base)
    cut_slots = (part for slot, unit in zip(slots, units, strict=True) for part in _parts(slot, unit, state))
    return OptimizerState(replace(state.raw, ranks=0), ((tuple(cut_slots),),))


Unit = list[tuple[int, ParameterInfo]]  # positions in the model, and parameters


def _of_model(state: OptimizerState, folders: Folders) -> list[Unit]:
    """Return the parameters in each flat parameter of a full model."""
    if not (folders.config.folder / "config.json").is_file():
        raise NamingError(
            f"{state.location} holds flat parameters of FSDP, whose order follows from the model's config.json; give "
            "--model DIR, a folder with it"
        )
    units, slots = units_of(meta_model(folders.config.folder)), list(state.slots)
    parameters = [parameter for unit in units for parameter in unit]
    if len(slots) == len(parameters) > len(units):
        return [[one] for one in sorted(parameters, key=lambda one: one[0])]
    if len(slots) != len(units):
        raise NamingError(
            f"{state.location} must have a flat parameter for each of the {len(units)} wrapped modules, or one for "
            f"each of the {len(parameters)} parameters, found {len(slots)}; give the --model that was trained"
        )
    return units


def _of_adapter(state: OptimizerState, adapter: Path, base: Path | None) -> list[Unit]:
    """Return the trained parameters of an adapter, each of which is a flat parameter."""
    parameters, count = adapter_names(adapter, base).parameters, len(list(state.slots))
    if count != len(parameters):
        raise NamingError(
            f"{state.location} must have a flat parameter for each of the {len(parameters)} trained parameters of the "
            f"adapter in {adapter}, found {count}; save with a full state dict"
        )
    return [[(number, parameter)] for number, parameter in enumerate(parameters)]


def units_of(model: nn.Module) -> list[Unit]:
    """Return the parameters of each module that FSDP wraps: the root, then the layers in the model's order.

    Args:
        model: A model of transformers, whose ``_no_split_modules`` names the classes of the layers.
    """
    classes = set(getattr(model, "_no_split_modules", None) or ())
    layers = [name for name, module in model.named_modules() if type(module).__name__ in classes]
    outer = [name for name in layers if not any(name.startswith(f"{other}.") for other in layers)]
    units: dict[str, Unit] = {"": [], **{name: [] for name in outer}}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        owner = next((layer for layer in outer if name.startswith(f"{layer}.")), "")
        units[owner].append((number, ParameterInfo(name, tuple(parameter.shape))))
    return [unit for unit in units.values() if unit]


def _parts(slot: OptimizerSlot, unit: Unit, state: OptimizerState) -> Sequence[OptimizerSlot]:
    """Return the slots of the parameters in one flat parameter."""
    if slot.tensor is None:
        return [replace(slot, name=info.name) for _, info in unit]
    total = sum(info.numel for _, info in unit)
    padding = slot.tensor.shape.numel() - total
    if not 0 <= padding < max(state.raw.ranks, 1):
        raise MismatchError(
            f"the flat parameter {slot.index} in {state.location} must hold {unit[0][1].name} to {unit[-1][1].name}, "
            f"{total} entries, found {slot.tensor.shape.numel()}; give the --model that was trained (other modules may "
            "have been wrapped: save with a full state dict)"
        )
    parts, offset = [], 0
    for _, info in unit:
        tensor = _slice(slot.tensor, offset, info)
        momentum = None if slot.momentum is None else _slice(slot.momentum, offset, info)
        parts.append(replace(slot, name=info.name, tensor=tensor, shape=info.shape, momentum=momentum))
        offset += info.numel
    return parts


def _slice(flat: MaybeLazy, offset: int, info: ParameterInfo) -> Slices:
    """Return a parameter of a flat one, whose shards follow one another."""
    if not isinstance(flat, Slices):
        raise TypeError("a flat parameter is made of slices")
    shards = [buffer for buffer, _, _ in flat.slices]
    return Slices(tuple(cut(shards, offset, info.numel)), torch.Size(info.shape))
