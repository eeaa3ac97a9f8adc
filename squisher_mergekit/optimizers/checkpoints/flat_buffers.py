"""Flat buffers that a trainer has cut up: how parameters lie in them, and the proof that they do."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.tensors.lazy import Slices

_PROBE = 64  # entries compared at each end of a slice


def cut(buffers: Sequence[Tensor], start: int, length: int) -> Iterator[tuple[Tensor, int, int]]:
    """Yield the slices of flat buffers, taken as one after the other, that make up a part of the whole.

    Args:
        buffers: Flat tensors.
        start: Where the part begins.
        length: Its entries.

    Raises:
        ValueError: The buffers end before, or are not flat.

    Example:
        >>> [(begin, size) for _, begin, size in cut([torch.zeros(3), torch.zeros(5)], 2, 4)]
        [(2, 1), (0, 3)]
    """
    if any(buffer.ndim != 1 or buffer.dtype != buffers[0].dtype for buffer in buffers):
        raise ValueError("flat buffers of one type")
    for buffer in buffers:
        here = min(length, buffer.numel() - start)
        if here > 0:
            yield buffer, start, here
            length -= here
        start = max(start - buffer.numel(), 0)
    if length > 0:
        raise ValueError(f"buffers that end {length} entries before their parameters do")


def entries(state: Mapping[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    """Yield key, value and whether it is a flat buffer, of one group's state."""
    for key, value in state.items():
        yield key, value, isinstance(value, Tensor) and value.ndim == 1 and value.numel() > 1


def check_lengths(masters: Sequence[Tensor], states: Sequence[Mapping[str, Any]]) -> None:
    """Refuse buffers that are not as long as those of the float32 weights, which the cuts are proved by.

    Only where no more weights follow may they be longer, by what was added to make equal parts.

    Args:
        masters: Flat float32 weights, one after the other.
        states: Beside each the state of its parameters: key -> flat buffer, or anything else.

    Raises:
        ValueError: One is.
    """
    for rank, (flat, state) in enumerate(zip(masters, states, strict=True)):
        follows = any(later.numel() for later in masters[rank + 1 :])
        for key, value, is_flat in entries(state):
            if is_flat and (value.numel() != flat.numel() if follows else value.numel() < flat.numel()):
                raise ValueError(f"the length of {key}")


def prove(masters: Mapping[str, Slices], weights: Mapping[str, Tensor], place: Path) -> int:
    """Hold what was cut out of the float32 weights against the weights themselves, at the ends of every slice.

    Args:
        masters: Name -> what was cut out.
        weights: Name -> weights; what is missing there is passed over.
        place: For messages.

    Returns:
        How many were compared.

    Raises:
        MismatchError: They differ: the buffers are laid out in another way.
    """
    compared = 0
    for name, master in masters.items():
        weight = weights.get(name)
        if weight is None or not weight.numel():
            continue
        places, values = master.sample(_PROBE)
        there = weight.reshape(-1)[places] if weight.shape == master.shape else None
        if there is None or not torch.equal(values.to(there.dtype), there):
            raise MismatchError(
                f"what {place} keeps as the float32 weights of {name} is not its weights, so its second moment cannot "
                "be told either; give the --model of the same step, of a converted checkpoint that which it was made "
                "from, or save again without round_robin_gradients"
            )
        compared += 1
    return compared
