"""Which weights of a whole model are kept: the largest scores over all tensors or within each, exactly counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from torch import Tensor

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.tensors.topk import KEPT, cut

Scope = Literal["global", "layer"]
Ranked = Callable[[str], Tensor]


def check_share(name: str, value: float) -> None:
    """Refuse a share that is none.

    Args:
        name: What it is called.
        value: The share.

    Raises:
        ConfigError: It is not in [0, 1).
    """
    if not 0 <= value < 1:
        raise ConfigError(f"{name} must be in [0, 1), found {value}; give it as a share, not in %")


def choose(
    sizes: Mapping[str, int], ranked: Ranked, keep: int, *, scope: Scope = "global", least: float = 0.0
) -> Iterator[tuple[str, Tensor]]:
    """Yield for each tensor which of its entries are kept.

    Scores are asked for three times a tensor and never held of two.

    Args:
        sizes: Name -> number of entries, in the order in which ties are broken.
        ranked: From a name to integers that order as the scores do, the same each time.
        keep: How many entries are kept in all.
        scope: ``global``: the largest of all tensors. ``layer``: of each tensor the same share.
        least: Of each tensor at least this share is kept, rounded up, whatever the others' scores are.

    Yields:
        Name, and a bool tensor of the shape of the scores; together exactly ``keep`` are true.

    Raises:
        ConfigError: ``least`` alone would keep more.

    Example:
        >>> from squisher_mergekit.tensors.topk import keys
        >>> import torch
        >>> scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
        >>> kept = dict(choose({"a": 2, "b": 2}, lambda name: keys(scores[name]), keep=2))
        >>> kept["a"].tolist(), kept["b"].tolist()
        ([False, False], [True, True])
    """
    floors = {name: math.ceil(size * least) for name, size in sizes.items()}
    if sum(floors.values()) > keep:
        raise ConfigError(
            f"keeping at least {least:g} of each tensor takes {sum(floors.values())} entries, but {keep} of "
            f"{sum(sizes.values())} are to be kept; ask for less of each, or prune less"
        )
    shares = _even(sizes, keep) if scope == "layer" else floors

    def keys(name: str) -> Tensor:
        own = ranked(name)
        if shares[name]:
            own.masked_fill_(cut(lambda: [own], shares[name]).take(own), KEPT)
        return own

    found = cut(lambda: (keys(name) for name in sizes), keep)
    for name in sizes:
        yield name, found.take(keys(name))


def _even(sizes: Mapping[str, int], keep: int) -> dict[str, int]:
    """Share ``keep`` out by size, to the entry: what rounding down leaves goes to the largest remainders."""
    total = max(sum(sizes.values()), 1)
    exact = {name: size * keep / total for name, size in sizes.items()}
    counts = {name: math.floor(share) for name, share in exact.items()}
    rest = sorted(sizes, key=lambda name: counts[name] - exact[name])[: keep - sum(counts.values())]
    return counts | {name: counts[name] + 1 for name in rest}
