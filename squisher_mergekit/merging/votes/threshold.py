"""One threshold of the kept entries for a whole model, found exactly while few scores are in memory.

A sample of the scores gives a range that contains the threshold; a pass over all scores counts those above the range
and keeps those inside it. Where the sample is the whole model, there is no second pass. Where the range misses the
threshold, two passes over histograms find it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from squisher_mergekit.tensors.topk import Cut, cut, keep_count, keys

SAMPLE = 1 << 20
_SMALL_PRIMES = (2, 3, 5, 7, 11, 13)

K = TypeVar("K")

# Scores of a tensor of a model in blocks: model, name of the tensor, and function from a stride to its blocks.
Scores = tuple[K, str, Callable[[int], Iterator[Tensor]]]


@dataclass(frozen=True)
class Choice:
    """Choice of the kept entries of one tensor.

    Attributes:
        cut: Threshold of the scores.
        kept: Number of entries that are kept.
        size: Number of entries to choose from.
    """

    cut: Cut
    kept: int
    size: int


@dataclass
class _Search:
    """Search for the threshold of one model."""

    stride: int
    sizes: dict[str, int] = field(default_factory=dict)
    sample: list[Tensor] = field(default_factory=list)
    low: float = 0.0
    high: float = math.inf
    above: dict[str, int] = field(default_factory=dict)
    inside: dict[str, Tensor] = field(default_factory=dict)

    def look(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Count the scores of a tensor above the range, and keep those inside it."""
        above, inside = 0, list[Tensor]()
        for block in blocks:
            if self.high < math.inf:
                above += int((block > self.high).sum())
                inside.append(block[(block >= self.low) & (block <= self.high)])
            else:
                inside.append(block[block >= self.low])
        self.above[name] = above
        found = _joined(inside)
        self.inside[name] = found[found > 0]

    def narrow(self, keep: int) -> None:
        """Set the range by the sample."""
        scores = _joined(self.sample).sort(descending=True).values
        count = len(scores)
        share = keep / max(sum(self.sizes.values()), 1)
        margin = 6 * math.sqrt(count * share * (1 - share)) + 0.002 * count + 2
        first, last = math.floor(share * count - margin), math.ceil(share * count + margin)
        self.high = float(scores[first]) if first > 0 else math.inf
        self.low = float(scores[last]) if last < count else 0.0

    def choices(self, keep: int) -> dict[str, Choice] | None:
        """Return the choice of each tensor; None if the threshold is outside the range."""
        wanted, everything = keep - sum(self.above.values()), _joined(self.inside.values())
        if wanted <= 0 or (wanted > len(everything) and self.low > 0):
            return None
        threshold = torch.zeros((), device="cpu")
        if wanted <= len(everything):
            threshold = everything.kthvalue(len(everything) - wanted + 1).values.cpu()
        above = {name: self.above[name] + int((found > threshold).sum()) for name, found in self.inside.items()}
        equal = {name: int((found == threshold).sum()) for name, found in self.inside.items()}
        return self.with_ties(int(keys(threshold)), keep, above, equal)

    def with_ties(self, key: int, keep: int, above: dict[str, int], equal: dict[str, int]) -> dict[str, Choice]:
        """Return the choice of each tensor; of the entries that equal the threshold the first are kept."""
        ties, found = keep - sum(above.values()), {}
        for name, size in self.sizes.items():
            taken = min(ties, equal[name])
            ties -= taken
            found[name] = Choice(Cut(key, taken), above[name] + taken, size)
        return found


def model_choices(
    read: Callable[[frozenset[K] | None], Iterable[Scores[K]]], densities: Mapping[K, float], entries: Mapping[K, int]
) -> dict[K, dict[str, Choice]]:
    """Find the threshold of each model above which ``density`` keeps its entries, over all tensors together.

    Args:
        read: Function that yields the tensors of some models, None for all, always in one order, with scores that are
            float32 and not negative. An entry of score 0 is never kept.
        densities: Model -> share of its entries that is kept.
        entries: Model -> number of its entries, which may be an estimate: it chooses the sample.

    Returns:
        Model -> tensor -> choice. Of entries with equal scores the first are kept.

    Example:
        >>> parts = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 2.0])}
        >>> def read(models):
        ...     for name, part in parts.items():
        ...         yield "m", name, lambda stride, part=part: iter([part[::stride]])
        >>> found = model_choices(read, {"m": 0.5}, {"m": 4})["m"]
        >>> [(name, choice.kept, choice.cut.take(keys(parts[name])).tolist()) for name, choice in found.items()]
        [('a', 1, [True, False]), ('b', 1, [True, False])]
    """
    searches: dict[K, _Search] = {model: _Search(_stride(entries[model])) for model in densities}
    for model, name, blocks in read(None):
        search = searches[model]
        search.sizes[name] = 0
        if search.stride == 1:
            search.look(name, _counted(search, name, blocks(1)))
        else:
            drawn = list(blocks(search.stride))
            search.sample += drawn
            search.sizes[name] = sum(map(len, drawn)) * search.stride
    sampled = frozenset(model for model, search in searches.items() if search.stride > 1)
    if sampled:
        for model in sampled:
            total = sum(searches[model].sizes.values())
            searches[model].narrow(keep_count(densities[model], total))
        for model, name, blocks in read(sampled):
            searches[model].sizes[name] = 0
            searches[model].look(name, _counted(searches[model], name, blocks(1)))
    found = {}
    for model, search in searches.items():
        keep = keep_count(densities[model], sum(search.sizes.values()))
        found[model] = search.choices(keep) or _by_histograms(read, model, search, keep)
    return found


def _by_histograms(
    read: Callable[[frozenset[K] | None], Iterable[Scores[K]]], model: K, search: _Search, keep: int
) -> dict[str, Choice]:
    """Find the threshold in two passes over histograms, and the ties of each tensor in a third."""

    def blocks() -> Iterator[Tensor]:
        for _, _, blocks_of in read(frozenset([model])):
            yield from map(keys, blocks_of(1))

    key = cut(blocks, keep).key
    above, equal = dict.fromkeys(search.sizes, 0), dict.fromkeys(search.sizes, 0)
    for _, name, blocks_of in read(frozenset([model])):
        for block in map(keys, blocks_of(1)):
            above[name] += int((block > key).sum())
            equal[name] += int((block == key).sum()) if key else 0
    return search.with_ties(key, keep, above, equal)


def _joined(scores: Iterable[Tensor]) -> Tensor:
    """Return scores as one tensor, on the device of the first; those of no tensor are on the CPU."""
    found = [each for each in scores if len(each)]
    return torch.cat([each.to(found[0].device) for each in found]) if found else torch.empty(0, device="cpu")


def _counted(search: _Search, name: str, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    for block in blocks:
        search.sizes[name] += len(block)
        yield block


def _stride(entries: int) -> int:
    """Return the stride of the sample; it shares no small factor with the length of a row."""
    stride = max(1, entries // SAMPLE)
    while stride > 1 and any(stride % prime == 0 for prime in _SMALL_PRIMES):
        stride += 1
    return stride
