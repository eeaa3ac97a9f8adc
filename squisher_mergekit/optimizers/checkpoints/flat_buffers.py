"""Flat buffers that hold many parameters: their slices, and the verification of the slices by the weights."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.tensors.lazy import Slices

_PROBE = 64  # entries compared at each end of a slice


def cut(buffers: Sequence[Tensor], start: int, length: int) -> Iterator[tuple[Tensor, int, int]]:
    """Yield the slices of consecutive flat buffers that make up one part of their concatenation.

    Args:
        buffers: The flat buffers, in order.
        start: First entry of the part.
        length: Number of entries.

    Raises:
        ValueError: The buffers end before the part does, or are not flat.

    Example:
        >>> [(begin, size) for _, begin, size in cut([torch.zeros(3), torch.zeros(5)], 2, 4)]
        [(2, 1), (0, 3)]
    """
    if any(buffer.ndim != 1 or buffer.dtype != buffers[0].dtype or buffer.is_complex() for buffer in buffers):
        raise ValueError("flat buffers of one real type")
    for buffer in buffers:
        count = min(length, buffer.numel() - start)
        if count > 0:
            yield buffer, start, count
            length -= count
        start = max(start - buffer.numel(), 0)
    if length > 0:
        raise ValueError(f"buffers that end {length} entries before their parameters do")


def entries(state: Mapping[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    """Yield key, value and True for a flat buffer, from the state of one group."""
    for key, value in state.items():
        yield key, value, isinstance(value, Tensor) and value.ndim == 1 and value.numel() > 1


def check_lengths(masters: Sequence[Tensor], states: Sequence[Mapping[str, Any]]) -> None:
    """Refuse buffers whose length differs from that of the float32 weights, by which the cuts are verified.

    The last buffer may be longer than its weights, by the padding that makes the parts of the ranks equal.

    Args:
        masters: Flat float32 weights, in order.
        states: State of the parameters in each of them: key -> flat buffer, or anything else.

    Raises:
        ValueError: A buffer has the wrong length.
    """
    for rank, (flat, state) in enumerate(zip(masters, states, strict=True)):
        follows = any(later.numel() for later in masters[rank + 1 :])
        for key, value, is_flat in entries(state):
            if is_flat and (value.numel() != flat.numel() if follows else value.numel() < flat.numel()):
                raise ValueError(f"the length of {key}")


def verify_masters(masters: Mapping[str, Slices], weights: Mapping[str, Tensor], location: Path) -> int:
    """Verify cuts of flat buffers: the float32 weights cut in the same way must be the weights, at every slice's ends.

    Args:
        masters: Name -> float32 weights cut from the buffers.
        weights: Name -> weights; a parameter without weights is skipped.
        location: File or folder of the buffers, for messages.

    Returns:
        The number of parameters compared.

    Raises:
        MismatchError: The weights differ, so the buffers have another layout.
    """
    compared = 0
    for name, master in masters.items():
        weight = weights.get(name)
        if weight is None or not weight.numel():
            continue
        positions, values = master.sample(_PROBE)
        saved = weight.reshape(-1)[positions] if weight.shape == master.shape else None
        if saved is None or values.is_complex() or not torch.equal(values.to(saved.dtype), saved):
            raise MismatchError(
                f"the buffers in {location} must hold the weights in float32, but the copy of {name} is not its "
                "weights, so its second moment is not certain either; give the --model of the same step (for a "
                "converted checkpoint: the model it was converted from), or save again without round_robin_gradients"
            )
        compared += 1
    return compared
