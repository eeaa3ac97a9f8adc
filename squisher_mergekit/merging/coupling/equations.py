"""Merges with curvature beyond the diagonal, as pure functions of blocks of matrices.

The Fisher of a matrix is approximated by a factor over its rows, or by the Kronecker product of a factor over its rows
and one over its columns. A factor follows from the task vector d and the second moment v alone: Adam moves a weight by
about ``-lr m / sqrt(v)``, so ``d * sqrt(v)`` is about -lr times the sum of the gradients, and its Gram matrix shows
which rows moved together. The diagonal of the factor comes from v. Factors are block-diagonal, so blocks are
independent and no matrix of out x out entries exists.

A batch of blocks of rows has the shape ``[count, b, in]``, a batch of tiles ``[rows, columns, b, c]``. Everything is in
one dtype, float32 or float64, on one device.

Sources: Shampoo (Gupta et al., 2018), K-FAC (Martens and Grosse, 2015) and MaTS (Tam et al., 2024) for the form of the
factors; factors from d and v are this project's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

_TINY = 1e-37


def row_factor(step: Tensor, fisher: Tensor | None) -> Tensor:
    """Return the factor over the rows of each block, with mean eigenvalue 1: ``L b / tr L``, ``L = S C S``.

    C is the correlation matrix of the rows of ``d * sqrt(v)``; ``S^2`` has the sums of v over the rows, so that the
    diagonal of L is that of the Fisher. Without a Fisher, ``L = d d^T``. A row of zeros is coupled with no other.

    Args:
        step: Task vector d, blocks ``[count, b, in]``.
        fisher: v, shaped alike; None if there is none.

    Returns:
        Factors ``[count, b, b]``; 0 for a block without a signal.

    Example:
        >>> row_factor(torch.tensor([[[1.0, 0.0], [2.0, 0.0]]]), torch.ones(1, 2, 2))
        tensor([[[1., 1.],
                 [1., 1.]]])
    """
    largest = _largest(step)
    if fisher is None:
        moved = step / largest
        power = moved.square().sum(-1)
    else:
        power = fisher.sum(-1)
        moved = (fisher / _positive(power)[..., None]).sqrt_().mul_(step).div_(largest)
    correlation = moved @ moved.mT
    norms = correlation.diagonal(dim1=-2, dim2=-1).clamp_min(_TINY).sqrt()
    correlation.div_(norms[..., :, None]).div_(norms[..., None, :]).clamp_(-1, 1)
    correlation.diagonal(dim1=-2, dim2=-1).fill_(1)
    mean = power.mean(-1, keepdim=True, dtype=torch.float64).to(power.dtype)
    scale = (power / _positive(mean)).sqrt()
    return correlation.mul_(scale[..., :, None]).mul_(scale[..., None, :])


def column_factor(step: Tensor, fisher: Tensor | None) -> Tensor:
    """Return the factor over the columns of each block: :func:`row_factor` of the transposes."""
    return row_factor(step.mT, None if fisher is None else fisher.mT)


def _largest(blocks: Tensor) -> Tensor:
    """Return the largest absolute entry of each block, or 1 where all are 0."""
    largest = torch.maximum(blocks.amax((-2, -1), keepdim=True), -blocks.amin((-2, -1), keepdim=True))
    return _positive(largest)


def _positive(values: Tensor) -> Tensor:
    """Return values with 1 in place of 0, to divide by."""
    return torch.where(values > 0, values, 1)


def shares_by_trace(traces: Tensor, rates: Tensor) -> Tensor:
    """Return each model's share in each block, ``t_i = w_i sum v_i``, divided by the sum over the models.

    Args:
        traces: Sum of v over the block, ``[models, blocks]``.
        rates: w_i times the factor on the model's v, up to a common factor, ``[models]``.

    Returns:
        Shares, shaped like ``traces``; 0 for all models where no block has a signal.

    Example:
        >>> shares_by_trace(torch.tensor([[4.0, 0.0], [12.0, 0.0]]), torch.ones(2))
        tensor([[0.2500, 0.0000],
                [0.7500, 0.0000]])
    """
    parts = traces / traces.amax(0).clamp_min(torch.finfo(traces.dtype).tiny) * rates[:, None]
    total = parts.sum(0)
    return parts / _positive(total)


def couple_rows(
    thetas: Sequence[Tensor], factors: Sequence[Tensor], shares: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """Merge blocks of coupled rows: ``W_0 + (sum_i A_i)^-1 sum_i A_i d_i`` with ``A_i = t_i (L_i + delta I)``.

    As the shares t_i sum to 1, the coefficients ``C_i = (sum_i A_i)^-1 A_i`` sum to the identity. So the merge needs no
    base and is exact for equal models: ``W_M + sum_(i < M) C_i (W_i - W_M)``, with
    ``C_i = t_i (I - sum_j K_j) + K_i`` and ``K_i = (sum_i A_i)^-1 t_i (L_i - L_M)``.

    Args:
        thetas: W_i, blocks ``[count, b, in]``.
        factors: L_i with mean eigenvalue 1, ``[count, b, b]``.
        shares: t_i in each block, ``[models, count]``, with sum 1 over the models.
        damping: delta, not negative.

    Returns:
        The merged blocks, and the mean coefficient ``tr((sum A)^-1 A_i) / b`` of each model and block,
        ``[models, count]``.

    Example:
        >>> theta = torch.ones(1, 2, 3)
        >>> merged, _ = couple_rows([theta, 3 * theta], [torch.eye(2)[None]] * 2, torch.full((2, 1), 0.5), 0.1)
        >>> merged
        tensor([[[2., 2., 2.],
                 [2., 2., 2.]]])
    """
    *others, last = thetas
    per_block = list(shares.to(last.dtype)[..., None, None])
    total = mean_factor(factors, per_block)
    total.diagonal(dim1=-2, dim2=-1).add_(damping)
    pulls = [(factor - factors[-1]).mul_(t) for factor, t in zip(factors[:-1], per_block[:-1], strict=True)]
    pulls = list(torch.split(_solve(total, torch.cat(pulls, -1)), total.shape[-1], -1)) if others else []
    free = -sum(pulls, start=torch.zeros_like(total))
    free.diagonal(dim1=-2, dim2=-1).add_(1)
    merged, traces = last, []
    for theta, t, pull in zip(others, per_block[:-1], pulls, strict=True):
        coefficient = torch.addcmul(pull, free, t)
        merged = torch.baddbmm(merged, coefficient, theta - last)
        traces.append(coefficient.diagonal(dim1=-2, dim2=-1).mean(-1))
    return merged, torch.stack([*traces, 1 - sum(traces, start=torch.zeros_like(total[:, 0, 0]))])


def mean_factor(factors: Sequence[Tensor], shares: Sequence[Tensor]) -> Tensor:
    """Return ``sum_i t_i L_i``, a new tensor; each share is shaped to multiply a factor."""
    mean = factors[0] * shares[0]
    for factor, share in zip(factors[1:], shares[1:], strict=True):
        mean.addcmul_(factor, share)
    return mean


def row_fishers(factors: Sequence[Tensor], shares: Tensor, damping: float) -> list[Callable[[Tensor], Tensor]]:
    """Return ``X -> t_i (L_i X + delta X)`` for each model, with the arguments of :func:`couple_rows`."""
    rates = shares.to(factors[0].dtype)[..., None, None]
    pairs = zip(rates, factors, strict=True)
    return [partial(_fisher_product, t=t, left=factor, right=None, damping=damping) for t, factor in pairs]


def _fisher_product(blocks: Tensor, t: Tensor, left: Tensor, right: Tensor | None, damping: float) -> Tensor:
    image = left @ blocks
    if right is not None:
        image = image @ right
    return image.add_(blocks, alpha=damping).mul_(t)


def _solve(matrices: Tensor, right: Tensor) -> Tensor:
    """Solve symmetric systems; where a matrix is singular, return the solution of least norm."""
    lower, failed = torch.linalg.cholesky_ex(matrices)
    if bool(failed.any()):
        inverse: Tensor = torch.linalg.pinv(matrices, hermitian=True)
        return inverse @ right
    return torch.cholesky_solve(right, lower)


@dataclass(frozen=True)
class Side:
    """Factors over one side of tiles, rows or columns, and the eigenbasis of their mean.

    Attributes:
        factors: L_i, ``[models, count, b, b]``.
        values: Eigenvalues of ``L = sum_i t_i L_i``, ``[count, b]``.
        vectors: Eigenvectors of L, ``[count, b, b]``.
        differences: ``L_i - L_M`` in the eigenbasis, for all models but the last, ``[models - 1, count, b, b]``.
    """

    factors: Tensor
    values: Tensor
    vectors: Tensor
    differences: Tensor

    @classmethod
    def of(cls, factors: Tensor, shares: Tensor) -> Side:
        """Return the side of factors L_i with the shares t_i, ``[models]``, of sum 1."""
        values, vectors = torch.linalg.eigh(mean_factor(list(factors), list(shares.to(factors.dtype))))
        differences = vectors.mT @ (factors[:-1] - factors[-1]) @ vectors
        return cls(factors, values.clamp_min_(0), vectors, differences)


def couple_tiles(
    start: Tensor,
    thetas: Sequence[Tensor],
    rows: Side,
    columns: Side,
    shares: Tensor,
    damping: float,
    steps: int,
) -> Tensor:
    """Merge tiles coupled over rows and columns: the minimum of ``sum_i <X - W_i, F_i (X - W_i)>``.

    ``F_i X = t_i (L_i X R_i + delta X)``. Conjugate gradients from ``start``, for each tile apart, preconditioned by
    ``P = L (x) R + delta``, with the means ``L = sum_i t_i L_i`` and ``R = sum_i t_i R_i``. The steps are in the
    eigenbases of L and R, where P is diagonal. As ``sum_i t_i (L_i - L) = 0``, the last model drops out of
    ``sum_i F_i = P + sum_(i < M) t_i (L_i - L) (x) (R_i - R_M)``.

    Args:
        start: First X, tiles ``[rows, columns, b, c]``.
        thetas: W_i, shaped alike.
        rows: L_i, a factor for each row of tiles.
        columns: R_i, a factor for each column of tiles.
        shares: t_i, ``[models]``, with sum 1.
        damping: delta, positive.
        steps: Number of steps.

    Returns:
        X after the steps.

    Example:
        >>> theta, half = torch.ones(1, 1, 2, 2), torch.tensor([0.5, 0.5])
        >>> side = Side.of(torch.eye(2).expand(2, 1, 2, 2), half)
        >>> couple_tiles(theta, [theta, 3 * theta], side, side, half, damping=0.1, steps=1)
        tensor([[[[2., 2.],
                  [2., 2.]]]])
    """
    rates = shares.to(start.dtype)
    weighted = rates[:-1, None, None, None] * rows.differences
    over_rows = (weighted - rates[:-1, None, None, None] * weighted.sum(0))[:, :, None]
    over_columns = columns.differences[:, None]
    left, right = rows.vectors[:, None], columns.vectors[None]
    diagonal = rows.values[:, None, :, None] * columns.values[None, :, None, :] + damping
    fishers = tile_fishers(rows, columns, shares, damping)
    residual = sum(
        (fisher(theta - start) for fisher, theta in zip(fishers, thetas, strict=True)), start=torch.zeros_like(start)
    )
    residual = left.mT @ residual @ right
    values, step = torch.zeros_like(residual), residual / diagonal
    direction, gain = step.clone(), _dot(residual, step)
    converged = gain * torch.finfo(start.dtype).eps ** 2
    for _ in range(steps):
        image = diagonal * direction
        for one, other in zip(over_rows, over_columns, strict=True):
            image += (one @ direction) @ other
        # Beyond the precision of the residual, steps would only follow rounding errors, and grow.
        curvature = torch.where(gain > converged, _dot(direction, image), 0)
        rate = _ratio(gain, curvature, start.dtype)
        values.addcmul_(direction, rate)
        residual.addcmul_(image, rate, value=-1)
        torch.div(residual, diagonal, out=step)
        last, gain = gain, _dot(residual, step)
        direction.mul_(_ratio(gain, last, start.dtype)).add_(step)
    return start + left @ values @ right.mT


def tile_fishers(rows: Side, columns: Side, shares: Tensor, damping: float) -> list[Callable[[Tensor], Tensor]]:
    """Return ``X -> t_i (L_i X R_i + delta X)`` for each model, with the arguments of :func:`couple_tiles`."""
    sides = zip(shares.to(rows.factors.dtype), rows.factors, columns.factors, strict=True)
    return [
        partial(_fisher_product, t=t, left=left[:, None], right=right[None], damping=damping)
        for t, left, right in sides
    ]


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner product of each pair of tiles."""
    return (one * other).sum(-1, keepdim=True).sum(-2, keepdim=True, dtype=torch.float64)


def _ratio(part: Tensor, whole: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a quotient, 0 where the denominator is not positive."""
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1), 0).to(dtype)
