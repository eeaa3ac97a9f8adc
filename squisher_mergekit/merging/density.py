"""Trimming by ``density``: of a model's task vector the entries with the largest Fisher are kept, per tensor."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from squisher_mergekit.tensors.topk import keep_count, largest


class Rows(NamedTuple):
    """Rows of a vocabulary that was re-ordered, by which of model and base had their token before.

    ``shared``: indices of the rows of both, among which is chosen. ``unbased``: indices of those that the base lacks,
    which stay the model's own. All others, of the base alone, become the base's. ``axis``: the vocabulary's axis.
    """

    shared: Tensor
    unbased: Tensor
    axis: int


@dataclass(frozen=True)
class Trim:
    """The choice for one tensor of one model: ``theta := theta_0 + m (theta - theta_0)``, m the mask of the kept.

    ``origin``: theta_0. ``scores``: F before any floor. Both are shaped like the weight.
    """

    origin: Tensor
    scores: Tensor
    density: float
    rows: Rows | None = None

    def kept(self) -> Tensor:
        """Return the mask m (bool, shaped like the weight); nothing here waits for an accelerator."""
        if self.rows is None:
            return largest(self.scores, keep_count(self.density, self.scores.numel()))
        shared, unbased, axis = self.rows
        among = self.scores.index_select(axis, shared)
        chosen = largest(among, keep_count(self.density, among.numel()))
        mask = torch.zeros_like(self.scores, dtype=torch.bool)
        return mask.index_copy_(axis, shared, chosen).index_fill_(axis, unbased, True)


def kept_entries(trim: Trim | None) -> tuple[Tensor, Tensor] | None:
    """Return, flat, the mask of the kept entries, and the values that replace the others; None without a trim."""
    return None if trim is None else (trim.kept().reshape(-1), trim.origin.reshape(-1))
