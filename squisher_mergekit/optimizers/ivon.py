"""IVON's Hessian: one flat tensor per group, cut once the shapes of the parameters are known."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from squisher_mergekit.errors import NamingError
from squisher_mergekit.models.decay_groups import candidates, variants
from squisher_mergekit.models.names import NAMES_CURE, ParameterInfo
from squisher_mergekit.optimizers.slots import OptimizerSlot, OptimizerState
from squisher_mergekit.tensors.lazy import Slices


def is_flat(state: OptimizerState) -> bool:
    """Return True if the second moments of a group are one flat tensor."""
    return any(slot.flat is not None for slot in state.slots)


def split(state: OptimizerState, parameters: Sequence[ParameterInfo]) -> OptimizerState:
    """Cut the flat tensors by the parameters of the model.

    Args:
        state: Slots whose shape is not known.
        parameters: The trained parameters, in the model's order.

    Returns:
        The slots, each with its own tensor.

    Raises:
        NamingError: The parameters differ in number, do not fill the tensors, or fit in two ways.
    """
    sizes = [len(group) for group in state.groups]
    found = {
        tuple(parameter for group in groups for parameter in group)
        for variant in variants(parameters)
        for groups in candidates(variant, sizes).values()
        if [len(group) for group in groups] == sizes and _fill(state, groups)
    }
    if len(found) != 1:
        raise NamingError(
            f"the {' + '.join(map(str, sizes))} parameters in {state.location} must fill its flat tensors in one way, "
            f"but the model's {len(parameters)} do so in {len(found)}; give the --model that was trained, the --base "
            f"if some were frozen, or {NAMES_CURE}"
        )
    return cut(state, [parameter.shape for parameter in next(iter(found))])


def cut(state: OptimizerState, shapes: Sequence[tuple[int, ...]]) -> OptimizerState:
    """Cut the flat tensors into slots of the given shapes.

    Raises:
        NamingError: The shapes do not fill the tensors.
    """
    rest = iter(shapes)
    optimizers = []
    for groups in state.optimizers:
        cut_groups = []
        for group in groups:
            offset = 0
            slots = []
            for slot in group:
                shape = next(rest)
                slots.append(_cut(slot, offset, shape))
                offset += math.prod(shape)
            if group and group[0].flat is not None and offset != group[0].flat.numel():
                raise NamingError(
                    f"the parameters named must have the {group[0].flat.numel()} entries of the flat tensor in "
                    f"{state.location}, but have {offset}; give the names of those that were trained, in their order"
                )
            cut_groups.append(tuple(slots))
        optimizers.append(tuple(cut_groups))
    return OptimizerState(state.raw, tuple(optimizers))


def _cut(slot: OptimizerSlot, offset: int, shape: tuple[int, ...]) -> OptimizerSlot:
    if slot.flat is None:
        return slot
    numel = math.prod(shape)
    tensor = Slices(((slot.flat, offset, numel),), torch.Size(shape))
    return replace(slot, tensor=tensor, shape=shape, flat=None)


def _fill(state: OptimizerState, groups: Sequence[Sequence[ParameterInfo]]) -> bool:
    return all(
        not group or group[0].flat is None or group[0].flat.numel() == sum(parameter.numel for parameter in members)
        for group, members in zip(state.groups, groups, strict=True)
    )
