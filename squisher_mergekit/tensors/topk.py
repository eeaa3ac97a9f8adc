"""Which entries are the largest, of one tensor or of many that are never in memory together.

A float32 number that is not negative orders as the integer that its bits spell: its *key*. So the k-th largest of any
number of entries is found exactly in two passes over them, which count how many keys have the same upper 16 bits, then,
among those of the k-th, the same lower 15.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# The key of what is kept whatever its value: above that of infinity.
KEPT = 2**31 - 1
_LOW = 15
# Entries at a time: what is computed of them stays in the cache, and little is held beside the tensor.
_BLOCK = 1 << 18


def keys(values: Tensor) -> Tensor:
    """Return integers that order as the values do.

    Args:
        values: float32, not negative, of any shape.

    Returns:
        int32, shaped alike; a view where possible.

    Example:
        >>> keys(torch.tensor([0.5, 0.0, 2.0])).argsort().tolist()
        [1, 0, 2]
    """
    # A zero with a sign would come out below all others.
    return values.abs().view(torch.int32)


@dataclass
class Cut:
    """Where the kept entries of many tensors end: all keys above ``key``, and the first ``ties`` equal to it."""

    key: int
    ties: int

    def take(self, keys: Tensor) -> Tensor:
        """Return which entries of the next tensor are kept.

        Args:
            keys: Of the tensors one after the other, in the order of the passes.

        Returns:
            bool, shaped alike.
        """
        kept = keys > self.key
        if self.ties:
            equal = (keys == self.key).reshape(-1).nonzero()[: self.ties, 0]
            kept.view(-1)[equal] = True
            self.ties -= len(equal)
        return kept


def cut(tensors: Callable[[], Iterable[Tensor]], keep: int) -> Cut:
    """Find where the ``keep`` largest entries of many tensors end.

    Args:
        tensors: Called twice; yields the keys of one tensor after the other, both times the same.
        keep: How many entries to keep, at most as many as there are.

    Returns:
        The exact cut; among equal keys the first are kept.

    Example:
        >>> parts = [torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])]
        >>> found = cut(lambda: map(keys, parts), keep=2)
        >>> [found.take(keys(part)).tolist() for part in parts]
        [[True, False], [True, False]]
    """
    if keep <= 0:
        return Cut(KEPT, 0)
    upper = _counts(tensors(), lambda block: block >> _LOW, 1 << 31 - _LOW)
    high, above = _place(upper, keep)
    mask = (1 << _LOW) - 1
    lower = _counts(tensors(), lambda block: block[block >> _LOW == high] & mask, 1 << _LOW)
    low, more = _place(lower, keep - above)
    return Cut(high << _LOW | low, keep - above - more)


def largest(values: Tensor, keep: int) -> Tensor:
    """Return which entries of one tensor are its ``keep`` largest.

    Nothing here waits for an accelerator.

    Args:
        values: Not negative, of any shape; float64 is rounded to float32.
        keep: How many, at most as many as there are entries.

    Returns:
        bool, shaped alike. Among equal entries the first are kept; on an accelerator any.

    Example:
        >>> largest(torch.tensor([0.5, 2.0, 0.5, 3.0]), 3)
        tensor([ True,  True, False,  True])
    """
    flat = values.reshape(-1)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    if values.device.type == "cpu":
        blocks = [slice(start, start + _BLOCK) for start in range(0, len(flat), _BLOCK)]
        found = cut(lambda: (keys(flat[block].to(torch.float32)) for block in blocks), keep)
        for block in blocks:
            kept[block] = found.take(keys(flat[block].to(torch.float32)))
        return kept.reshape(values.shape)
    kept[flat.to(torch.float32).topk(keep, sorted=False).indices] = True
    return kept.reshape(values.shape)


def _counts(tensors: Iterable[Tensor], part: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Return how often each value of a part of the keys occurs."""
    counts = torch.zeros(size, dtype=torch.int64)
    for tensor in tensors:
        flat = tensor.reshape(-1)
        for start in range(0, len(flat), _BLOCK):
            counts += torch.bincount(part(flat[start : start + _BLOCK]), minlength=size)
    return counts


def _place(counts: Tensor, keep: int) -> tuple[int, int]:
    """Return the value at which, counted from above, the ``keep``-th entry lies, and how many lie above that value.

    Raises:
        ValueError: There are fewer entries.
    """
    above = counts.flip(0).cumsum(0)
    if not 0 < keep <= int(above[-1]):
        raise ValueError(f"{keep} entries are to be kept of {int(above[-1])}")
    place = int(torch.searchsorted(above, keep))
    return len(counts) - 1 - place, int(above[place - 1]) if place else 0
