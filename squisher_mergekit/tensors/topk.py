"""Exact top-k masks, over one tensor or over many that are never in memory together.

Non-negative float32 numbers order as the integers with the same bits: their *keys*. Two passes over the keys find the
k-th largest exactly. The first counts the keys by their upper 16 bits; the second counts the keys that share the upper
bits of the k-th by their lower 15 bits.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# The key of entries that are always kept: above the key of infinity.
KEPT = 2**31 - 1
_LOW = 15
# Entries at a time: intermediate results stay in the CPU's cache, and take little memory.
_BLOCK = 1 << 18
_ROWS = 1 << 20


def keys(values: Tensor) -> Tensor:
    """Return the sort keys of values: integers in the same order.

    Args:
        values: float32, not negative, of any shape.

    Returns:
        int32, of the same shape; a view where possible.

    Example:
        >>> keys(torch.tensor([0.5, 0.0, 2.0])).argsort().tolist()
        [1, 0, 2]
    """
    # A zero with a sign would come out below all others.
    return values.abs().view(torch.int32)


@dataclass
class Cut:
    """Threshold of a top-k mask over many tensors.

    Attributes:
        key: Key of the smallest entry kept; all larger keys are kept.
        ties: Number of entries with exactly this key that are kept: the first ones.
    """

    key: int
    ties: int

    def take(self, keys: Tensor) -> Tensor:
        """Return the mask of the kept entries of the next tensor.

        Args:
            keys: Keys of the next tensor, in the order of the passes that found the threshold.

        Returns:
            bool, of the same shape.
        """
        kept = keys > self.key
        if self.ties:
            equal = (keys == self.key).reshape(-1).nonzero()[: self.ties, 0]
            kept = kept.contiguous()  # a comparison keeps the strides of a transposed tensor
            kept.view(-1)[equal] = True
            self.ties -= len(equal)
        return kept


def cut(tensors: Callable[[], Iterable[Tensor]], keep: int) -> Cut:
    """Find the threshold of the ``keep`` largest entries of many tensors.

    Args:
        tensors: Function that yields the keys of each tensor; it is called twice and must yield the same both times.
        keep: Number of entries to keep, at most the number of entries.

    Returns:
        The exact threshold; of entries with equal keys the first are kept.

    Example:
        >>> parts = [torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])]
        >>> found = cut(lambda: map(keys, parts), keep=2)
        >>> [found.take(keys(part)).tolist() for part in parts]
        [[True, False], [True, False]]
    """
    if keep <= 0:
        return Cut(KEPT, 0)
    upper = _counts(tensors(), lambda block: block >> _LOW, 1 << 31 - _LOW)
    high, above = _bin_of_kth(upper, keep)
    mask = (1 << _LOW) - 1
    lower = _counts(tensors(), lambda block: block[block >> _LOW == high] & mask, 1 << _LOW)
    low, more = _bin_of_kth(lower, keep - above)
    return Cut(high << _LOW | low, keep - above - more)


def largest(values: Tensor, keep: int) -> Tensor:
    """Return the mask of the ``keep`` largest entries of one tensor.

    The function does not synchronize with an accelerator.

    Args:
        values: Not negative, of any shape; float64 is rounded to float32.
        keep: Number of entries to keep, at most the number of entries.

    Returns:
        bool, of the same shape. Of equal entries the first are kept; on an accelerator any.

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


def keep_count(density: float, size: int) -> int:
    """Return the number of entries that a density keeps of a tensor: ``density * size`` rounded, but at least 1.

    A half is rounded to the even number.

    Args:
        density: Share to keep, in (0, 1].
        size: Number of entries of the tensor.

    Example:
        >>> [keep_count(0.2, size) for size in (0, 1, 9, 10)]
        [0, 1, 2, 2]
    """
    return min(size, max(1, round(density * size)))


def largest_of_many(
    sizes: Mapping[str, int], sort_keys: Callable[[str], Tensor], keep: int, counts: Mapping[str, int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the masks of the largest entries over many tensors.

    Args:
        sizes: Name -> number of entries, in the order that breaks ties.
        sort_keys: Function from a name to integers in the order of its scores; called three times per tensor.
        keep: Number of entries to keep in all.
        counts: Name -> number of its own largest entries that a tensor keeps in any case.

    Yields:
        Name, and a bool tensor of the shape of the keys; together exactly ``keep`` entries are true.

    Example:
        >>> values = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
        >>> masks = dict(largest_of_many({"a": 2, "b": 2}, lambda name: keys(values[name]), keep=2))
        >>> masks["a"].tolist(), masks["b"].tolist()
        ([False, False], [True, True])
    """

    def raised(name: str) -> Tensor:
        found = sort_keys(name)
        count = (counts or {}).get(name, 0)
        if count:
            found.masked_fill_(cut(lambda: [found], count).take(found), KEPT)
        return found

    threshold = cut(lambda: (raised(name) for name in sizes), keep)
    for name in sizes:
        yield name, threshold.take(raised(name))


def pattern_mask(keys: Tensor, n: int, m: int, axis: int = -1) -> Tensor:
    """Return the mask of the n largest of each m consecutive entries along an axis.

    Args:
        keys: Integers, of any shape; m divides the axis.
        n: Number of entries kept of each m.
        m: Number of consecutive entries in a group.
        axis: Axis of the groups.

    Returns:
        bool, of the same shape; of equal entries the first are kept.

    Example:
        >>> pattern_mask(torch.tensor([[3, 1, 2, 2, 9, 9, 9, 0]]), 2, 4).int()
        tensor([[1, 0, 1, 0, 1, 1, 0, 0]], dtype=torch.int32)
    """
    last = keys.movedim(axis, -1)
    groups = last.reshape(-1, m)
    kept = torch.empty(groups.shape, dtype=torch.bool, device=keys.device)
    for start in range(0, len(groups), _ROWS):
        block = groups[start : start + _ROWS]
        for i in range(m):
            entry = block[:, i : i + 1]
            rank = (block[:, :i] >= entry).sum(1) + (block[:, i + 1 :] > entry).sum(1)
            kept[start : start + _ROWS, i] = rank < n
    return kept.reshape(last.shape).movedim(-1, axis)


def _counts(tensors: Iterable[Tensor], part: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Return the histogram of some bits of the keys."""
    counts = torch.zeros(size, dtype=torch.int64, device="cpu")
    for tensor in tensors:
        flat = tensor.reshape(-1)
        for start in range(0, len(flat), _BLOCK):
            counts += torch.bincount(part(flat[start : start + _BLOCK]), minlength=size).to(counts.device)
    return counts


def _bin_of_kth(counts: Tensor, keep: int) -> tuple[int, int]:
    """Return the bin of the ``keep``-th largest entry in a histogram, and the number of entries in higher bins.

    Raises:
        ValueError: The histogram has fewer entries.
    """
    above = counts.flip(0).cumsum(0)
    if not 0 < keep <= int(above[-1]):
        raise ValueError(f"{keep} entries are to be kept of {int(above[-1])}")
    position = int(torch.searchsorted(above, keep))
    return len(counts) - 1 - position, int(above[position - 1]) if position else 0
