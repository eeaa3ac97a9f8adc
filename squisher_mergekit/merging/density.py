"""Trimming by ``density``: of a model's task vector the entries with the largest scores are kept."""

import zlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from squisher_mergekit.tensors.topk import Cut, keep_count, keys, largest

_BLOCK = 1 << 18


class Rows(NamedTuple):
    """Rows of a vocabulary that was re-ordered, by which of model and base had their token before.

    ``shared``: indices of the rows of both, among which is chosen. ``unbased``: indices of those that the base lacks,
    which stay the model's own. All others, of the base alone, become the base's. ``axis``: the vocabulary's axis.
    """

    shared: Tensor
    unbased: Tensor
    axis: int


@dataclass(frozen=True)
class Ranking:
    """Order in which the entries of one tensor are kept.

    Attributes:
        by: ``fisher`` for F, ``change`` for ``F d^2`` with ``d = theta - theta_0``, ``magnitude`` for ``|d|``, or
            ``random``.
        theta: The model's weight; None where only F counts.
        scale: Factor on F.
        seed: Seed of the random numbers.
        positive: True if an entry of score 0 is never kept.
    """

    by: str = "fisher"
    theta: Tensor | None = None
    scale: float = 1.0
    seed: int = 0
    positive: bool = False

    def scores(self, fisher: Tensor, origin: Tensor, part: slice) -> Tensor:
        """Return the scores of a part of the flat tensors, float32."""
        if self.by == "random":
            return self._random(fisher, part)
        score = fisher[part].to(torch.float32)
        score = score if self.scale == 1 else score * self.scale
        if self.by == "fisher" or self.theta is None:
            return score
        step = self.theta.reshape(-1)[part].to(torch.float32) - origin[part].to(torch.float32)
        return step.abs_() if self.by == "magnitude" else (score * step).mul_(step)

    def _random(self, fisher: Tensor, part: slice) -> Tensor:
        """Return random numbers, above 0, that depend on the seed and the place alone; parts start at a block."""
        first, size = part.start // _BLOCK, len(fisher[part])
        drawn = [
            torch.rand(_BLOCK, generator=torch.Generator().manual_seed(_mixed(self.seed, first + i)), device="cpu")
            for i in range(-(-size // _BLOCK))
        ]
        return 1 - torch.cat([*drawn, torch.empty(0, device="cpu")])[:size].to(fisher.device)


def _mixed(seed: int, block: int) -> int:
    """Return the seed of one block; torch's generator on the CPU looks at 32 bits of a seed alone."""
    return zlib.crc32(f"{seed} {block}".encode())


def seed_of(name: str, place: int) -> int:
    """Return the seed of the random choice for one tensor of one model.

    Example:
        >>> seed_of("w", 0) == seed_of("w", 0), seed_of("w", 0) == seed_of("w", 1)
        (True, False)
    """
    return zlib.crc32(f"{place} {name}".encode())


@dataclass(frozen=True)
class Trim:
    """The choice for one tensor of one model: ``theta := theta_0 + m (theta - theta_0)``, m the mask of the kept.

    ``origin``: theta_0. ``scores``: F before any floor. Both are shaped like the weight. ``ranking``: order of the
    entries. ``cut``: threshold of the whole model for this tensor; None if the tensor keeps its own share.
    """

    origin: Tensor
    scores: Tensor
    density: float
    rows: Rows | None = None
    ranking: Ranking = Ranking()
    cut: Cut | None = None

    def kept(self) -> Tensor:
        """Return the mask m (bool, shaped like the weight); nothing here waits for an accelerator."""
        if self.rows is None and self.cut is not None:
            return self._above(self.cut)
        if self.rows is None:
            return self._chosen(self.ranked())
        shared, unbased, axis = self.rows
        chosen = self._chosen(self.ranked().index_select(axis, shared))
        mask = torch.zeros_like(self.scores, dtype=torch.bool)
        return mask.index_copy_(axis, shared, chosen).index_fill_(axis, unbased, True)

    def ranked(self) -> Tensor:
        """Return the scores, shaped like the weight."""
        ranking, fisher = self.ranking, self.scores.reshape(-1)
        if ranking.by == "fisher" and ranking.scale == 1:
            return self.scores
        origin = self.origin.reshape(-1)
        ranked = torch.empty(fisher.shape, dtype=torch.float32, device=fisher.device)
        for part in self._parts():
            ranked[part] = ranking.scores(fisher, origin, part)
        return ranked.reshape(self.scores.shape)

    def blocks(self, stride: int = 1) -> Iterator[Tensor]:
        """Yield the scores among which is chosen, flat, a block at a time, or every ``stride``-th of them."""
        fisher, origin = self.scores.reshape(-1), self.origin.reshape(-1)
        if self.rows is not None:
            yield self.ranked().index_select(self.rows.axis, self.rows.shared).reshape(-1)[::stride].float()
        elif stride > 1 and self.ranking.by != "random":
            yield self.ranking.scores(fisher, origin, slice(0, len(fisher), stride))
        else:
            for part in self._parts():
                yield self.ranking.scores(fisher, origin, part)[::stride]

    def _parts(self) -> list[slice]:
        size = self.scores.numel()
        return [slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK)]

    def _above(self, cut: Cut) -> Tensor:
        """Return the mask of the entries above the threshold of the whole model."""
        mask, left = torch.empty(self.scores.numel(), dtype=torch.bool, device=self.scores.device), Cut(*astuple(cut))
        for part, block in zip(self._parts(), self.blocks(), strict=True):
            mask[part] = left.take(keys(block))
        return mask.reshape(self.scores.shape)

    def _chosen(self, scores: Tensor) -> Tensor:
        """Return the mask of the kept among some scores."""
        if self.cut is not None:
            chosen = Cut(*astuple(self.cut)).take(keys(scores.to(torch.float32).contiguous()))
        else:
            chosen = largest(scores, keep_count(self.density, scores.numel()))
        return chosen & (scores > 0) if self.ranking.positive else chosen


def kept_entries(trim: Trim | None) -> tuple[Tensor, Tensor] | None:
    """Return, flat, the mask of the kept entries, and the values that replace the others; None without a trim."""
    return None if trim is None else (trim.kept().reshape(-1), trim.origin.reshape(-1))
