"""Parameters in parts, which a Hugging Face model fuses by rows: queries, keys and values of Phi-3, gate and up."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.optimizers.slots import Group, OptimizerSlot
from squisher_mergekit.tensors.lazy import concatenated

PlacedSlot = tuple[tuple[int, int] | None, OptimizerSlot]  # place among the parts and number of parts; None if whole


def fused(groups: Iterable[Sequence[PlacedSlot]], location: Path) -> tuple[Group, ...]:
    """Return the groups with the parts of each parameter joined by rows, at the position of the first part.

    Args:
        groups: The slots under Hugging Face names, each with its place among the parts of the parameter.
        location: The optimizer's state, for messages.

    Raises:
        MismatchError: A part is missing, has no second moment or other steps than the others, or does not fit.
    """
    groups = [list(group) for group in groups]
    parts: dict[str, dict[int, OptimizerSlot]] = {}
    for place, slot in (placed for group in groups for placed in group):
        if place is not None:
            parts.setdefault(str(slot.name), {})[place[0]] = slot
    joined: list[Group] = []
    for group in groups:
        slots = []
        for place, slot in group:
            if place is None:
                slots.append(slot)
            elif (found := parts.pop(str(slot.name), None)) is not None:
                slots.append(_join([found[number] for number in sorted(found)], place[1], location))
        joined.append(tuple(slots))
    return tuple(joined)


def _join(parts: Sequence[OptimizerSlot], count: int, location: Path) -> OptimizerSlot:
    first = parts[0]
    tensors = [part.tensor for part in parts if part.tensor is not None]
    if not tensors and len(parts) == count:
        return replace(first, shape=None)
    if len(tensors) < count or any((part.steps, part.moment) != (first.steps, first.moment) for part in parts):
        raise MismatchError(
            f"{first.name} must have second moments of its {count} parts, of equal steps, found {len(tensors)} in "
            f"{location}; estimate a Fisher from data"
        )
    try:
        tensor = concatenated(tensors, 0)
    except ValueError as error:
        raise MismatchError(
            f"the parts of {first.name} in {location} must follow each other by rows, found {error}; give the --model "
            "that was trained"
        ) from None
    return replace(first, tensor=tensor, shape=tuple(tensor.shape), momentum=None, factors=(None, None))
