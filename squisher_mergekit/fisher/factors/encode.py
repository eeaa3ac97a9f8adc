"""Encoding of the factors of a Fisher for its files: full blocks, or vectors and a level, with the measured error."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from squisher_mergekit.fisher.config import FactorsInfo
from squisher_mergekit.fisher.factors.blocks import RANK, error_of, from_low_rank, low_rank
from squisher_mergekit.fisher.factors.mapping import LEVEL, SIDES, VECTORS, Factors, SideFactors

# Compact forms of a diagonal with which the factors are of low rank; with others they are full blocks.
_LOW_RANK = ("log4", "rank1")


class FactorWriter:
    """Tensors of the factors of a Fisher as its files store them.

    Factors that are of low rank already stay as they are. A factor that would not get smaller stays full.

    Args:
        factors: The factors.
        dtype: Dtype of full factors without a compact form.
        compress: Compact form of the diagonal: ``log8`` stores factors in bfloat16, ``log4`` and ``rank1`` their low
            rank in bfloat16.
    """

    def __init__(self, factors: Factors, dtype: torch.dtype, compress: str | None) -> None:
        self._factors = factors
        self._dtype = torch.bfloat16 if compress else dtype
        self._low_rank = compress in _LOW_RANK
        self._form = "full"
        self._errors: list[tuple[float, float]] = []

    @property
    def names(self) -> list[str]:
        """Names of all tensors that may be stored."""
        stored = [f"{name}.{side}" for side in SIDES for name in self._factors.side(side)]
        return [name + suffix for name in stored for suffix in (VECTORS, LEVEL)]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and tensors to store, one factor at a time.

        Raises:
            ValuesError: A factor is not finite, not symmetric, or has a negative entry on its diagonal.
        """
        for side in SIDES:
            factors = self._factors.side(side)
            for name in factors:
                yield from self._parts(factors, name)

    def _parts(self, factors: SideFactors, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of one factor, and note its error."""
        stored, factor, size = f"{name}.{factors.side}", factors[name], factors.size(name)
        if factors.is_low_rank(name):
            self._form = "low_rank"
            yield from ((part, factors.part(part)) for part in factors.parts(name))
            return
        if self._low_rank and factor.shape[-1] > RANK + 1:
            vectors, level = low_rank(factor.to(torch.float32), size)
            vectors = vectors.to(torch.bfloat16)
            self._form = "low_rank"
            self._errors.append(error_of(from_low_rank(vectors, level, size), factor))
            yield stored + VECTORS, vectors
            yield stored + LEVEL, level
            return
        written = factor.to(self._dtype)
        self._errors.append(error_of(written, factor))
        yield stored, written

    @property
    def info(self) -> FactorsInfo | None:
        """Metadata of the factors, once all tensors are written; None if there are none."""
        info = self._factors.info
        if info is None or not self._factors:
            return None
        difference, norm = (math.fsum(part) for part in zip(*self._errors, strict=True)) if self._errors else (0.0, 0.0)
        error = math.sqrt(difference / norm) if norm else 0.0
        # An error of an earlier compression stays: the two add up at most.
        total = min((info.error or 0.0) + error, 1e30)
        return info.model_copy(update={"form": self._form, "error": total or None})
