"""Weighted quadratics of a model's weights, and their sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from squisher_mergekit.tensors.sharded import distributed_like, gathered, is_sharded


@dataclass(frozen=True)
class Quadratic:
    """Weighted quadratic ``sum_i fisher_i (theta_i - anchor_i)^2 + offset`` of one parameter.

    Attributes:
        fisher: Weights of the quadratic, of the shape of the parameter.
        anchor: Position of the minimum, of the same shape.
        offset: Value at the minimum.
    """

    fisher: Tensor
    anchor: Tensor
    offset: float = 0.0

    def distance(self, theta: Tensor) -> Tensor:
        """Return ``theta - anchor``."""
        return theta.to(self.anchor.dtype) - self.anchor

    def at(self, theta: Tensor) -> Tensor:
        """Return the value at given weights.

        Example:
            >>> Quadratic(torch.tensor([3.0]), torch.tensor([1.0]), offset=0.5).at(torch.tensor([3.0]))
            tensor(12.5000)
        """
        return gathered(self.distance(theta).square().mul(self.fisher).sum()) + self.offset

    def half_gradient(self, theta: Tensor) -> Tensor:
        """Return ``fisher (theta - anchor)``, half the gradient.

        Example:
            >>> Quadratic(torch.tensor([3.0]), torch.tensor([1.0])).half_gradient(torch.tensor([3.0]))
            tensor([6.])
        """
        return self.distance(theta).mul_(self.fisher)


def add_quadratics(a: Quadratic, b: Quadratic) -> Quadratic:
    """Return the sum of two quadratics as one quadratic.

    ``F (theta - p)^2 + G (theta - q)^2 = (F + G)(theta - m)^2 + FG / (F + G) (p - q)^2`` with
    ``m = p + G / (F + G) (q - p)``. All terms are non-negative: nothing cancels, as it would in powers of theta. The
    sum is computed in float64. Where F + G is 0, m is q.

    Example:
        >>> p, q = torch.tensor([0.0]), torch.tensor([4.0])
        >>> add_quadratics(Quadratic(torch.tensor([1.0]), p), Quadratic(torch.tensor([3.0]), q))
        Quadratic(fisher=tensor([4.]), anchor=tensor([3.]), offset=12.0)
    """
    total = a.fisher.double() + b.fisher
    share = torch.where(total > 0, b.fisher / total, 1.0)
    apart = b.anchor.double() - a.anchor
    offset = float(gathered((apart.square() * share * a.fisher).sum()))
    dtype = a.anchor.dtype
    return Quadratic(total.to(dtype), (a.anchor + share * apart).to(dtype), a.offset + b.offset + offset)


def like_parameter(term: Quadratic, parameter: Tensor) -> Quadratic:
    """Return a quadratic on the device and with the sharding of its parameter."""
    if term.anchor.device == parameter.device and is_sharded(term.anchor) == is_sharded(parameter):
        return term
    gather = is_sharded(term.anchor) and not is_sharded(parameter)
    fisher, anchor = (gathered(part) if gather else part for part in (term.fisher, term.anchor))
    dtype = anchor.dtype
    return Quadratic(
        distributed_like(fisher, parameter, dtype), distributed_like(anchor, parameter, dtype), term.offset
    )
