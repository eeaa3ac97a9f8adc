"""IVON's Hessian: one flat tensor for each group, cut when the shapes of the parameters are known."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from squisher_mergekit.errors import NamingError
from squisher_mergekit.models.checkpoint_names import NAMES_CURE, Parameter
from squisher_mergekit.optimizers.assign_names import candidates
from squisher_mergekit.optimizers.slots import OptimizerState, Slot
from squisher_mergekit.tensors.lazy import Slices


def is_flat(state: OptimizerState) -> bool:
    """Return whether the second moments are one flat tensor a group."""
    return any(slot.flat is not None for slot in state.slots)


def split(state: OptimizerState, parameters: Sequence[Parameter]) -> OptimizerState:
    """Cut the flat tensors.

    Args:
        state: With slots whose shape is not known.
        parameters: The model's trained ones, in its order.

    Returns:
        The state with a tensor in each slot.

    Raises:
        NamingError: The parameters are not as many, or do not fill the tensors, or fit in two ways.
    """
    sizes = [len(group) for group in state.groups]
    found = {
        tuple(parameter for group in groups for parameter in group)
        for groups in candidates(parameters, sizes).values()
        if [len(group) for group in groups] == sizes and _fill(state, groups)
    }
    if len(found) != 1:
        raise NamingError(
            f"the {' + '.join(map(str, sizes))} parameters in {state.file} must fill its flat tensors in one way, but "
            f"the model's {len(parameters)} do so in {len(found)}; give the --model that was trained, the --base if "
            f"some were frozen, or {NAMES_CURE}"
        )
    return cut(state, [parameter.shape for parameter in next(iter(found))])


def cut(state: OptimizerState, shapes: Sequence[tuple[int, ...]]) -> OptimizerState:
    """Cut the flat tensors into the shapes given, slot by slot.

    Raises:
        NamingError: They do not fill the tensors.
    """
    rest = iter(shapes)
    optimizers = []
    for groups in state.optimizers:
        done = []
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
                    f"{state.file}, but have {offset}; give the names of those that were trained, in their order"
                )
            done.append(tuple(slots))
        optimizers.append(tuple(done))
    return OptimizerState(state.saved, tuple(optimizers))


def _cut(slot: Slot, offset: int, shape: tuple[int, ...]) -> Slot:
    if slot.flat is None:
        return slot
    numel = math.prod(shape)
    tensor = Slices(((slot.flat, offset, numel),), torch.Size(shape))
    return replace(slot, tensor=tensor, shape=shape, flat=None)


def _fill(state: OptimizerState, groups: Sequence[Sequence[Parameter]]) -> bool:
    return all(
        not group or group[0].flat is None or group[0].flat.numel() == sum(parameter.numel for parameter in some)
        for group, some in zip(state.groups, groups, strict=True)
    )
