r"""Equations of the recorder of a LoRA's merged weights. Pure functions of tensors.

A wrapped layer computes ``y = W x`` with ``W = W0 + s B A``. For a batch with the inputs X, shape ``[T, in]``, and the
gradients D at the outputs, shape ``[T, out]``, the gradient of W is ``G = D^T X``. W is not trained, so that G is never
formed. With signs ``z`` in ``{-1, 1}^in`` and ``u`` in ``{-1, 1}^out``, drawn anew at each optimizer step,

    G z = D^T (X z)        G^T u = X^T (D u)

take ``2 T (in + out)`` multiplications. Distinct signs are independent with mean 0, and ``z_i^2 = 1``, so that the
cross terms vanish in expectation over the signs:

    E[(G z)_o^2]   = sum_ij G_oi G_oj E[z_i z_j] = sum_i G_oi^2
    E[(G^T u)_i^2] = sum_o G_oi^2

This is Hutchinson's estimator of the diagonals of ``G G^T`` and ``G^T G``; nothing is assumed about A, B or G. Both
products are linear in G: with one pair of signs a step, they add over the batches of an accumulation, over the calls of
a shared layer and over processes, as the gradient does.

**Averages.** Moving averages over steps, as Adam's, without bias after ``1 / (1 - beta^t)``, estimate the row sums and
column sums of the average of ``G^2``:

    p_t = beta p_(t-1) + (1 - beta) (G_t z_t)^2      rho   = p_t / (1 - beta^t) / in     row means
    q_t = beta q_(t-1) + (1 - beta) (G_t^T u_t)^2    kappa = q_t / (1 - beta^t) / out    column means

**Scale.** ``mean(rho)`` and ``mean(kappa)`` both estimate the mean of F without bias; so does ``m``, their mean.

    row = rho m / mean(rho)      col = kappa m / mean(kappa)      F_oi = row_o col_i / m

which is the ``rank1`` form of a Fisher (:mod:`squisher_mergekit.fisher.compact`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def signs(count: int, seed: int, step: int) -> Tensor:
    """Return random bits for the signs of a step, eight in a byte; equal on every process and after a resume.

    Args:
        count: Number of signs.
        seed: Seed of the run.
        step: Number of the step.

    Returns:
        Bytes, shape ``[ceil(count / 8)]``.

    Example:
        >>> signs(9, 0, 1).shape, torch.equal(signs(9, 0, 1), signs(9, 0, 2))
        (torch.Size([2]), False)
    """
    # A generator takes 32 bits of its seed; odd factors keep the steps of a run distinct.
    generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + step * 0x85EBCA77) % 2**32)
    return torch.randint(0, 256, (-(-count // 8),), dtype=torch.uint8, generator=generator)


def unpack_signs(packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return the signs of :func:`signs` as numbers.

    Args:
        packed: The bytes.
        count: Number of signs.
        dtype: Dtype of the result.

    Example:
        >>> unpack_signs(torch.tensor([5], dtype=torch.uint8), 4, torch.float32)
        tensor([ 1., -1.,  1., -1.])
    """
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten()[:count].to(dtype) * 2 - 1


def add_products(inputs: Tensor, gradients: Tensor, z: Tensor, u: Tensor, gz: Tensor, gu: Tensor) -> None:
    """Add ``D^T (X z)`` and ``X^T (D u)`` of one call of a layer to ``G z`` and ``G^T u``, in place.

    Args:
        inputs: X, shape ``[T, in]``.
        gradients: D, shape ``[T, out]``.
        z: Signs, shape ``[in]``.
        u: Signs, shape ``[out]``.
        gz: Sum of ``G z``, shape ``[out]``.
        gu: Sum of ``G^T u``, shape ``[in]``.

    Example:
        >>> gz, gu = torch.zeros(1), torch.zeros(2)
        >>> x, d = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
        >>> add_products(x, d, torch.tensor([1.0, -1.0]), torch.tensor([-1.0]), gz, gu)
        >>> gz, gu
        (tensor([-3.]), tensor([-3., -6.]))
    """
    gz.addmv_(gradients.mT, inputs @ z)
    gu.addmv_(inputs.mT, gradients @ u)


def final_scale(raw: Tensor, final: Tensor) -> Tensor:
    """Return c of ``final = c raw`` by least squares: ``raw . final / raw . raw``; NaN where ``raw`` is 0.

    ``raw`` has products of the gradients of A or B as the backward pass makes them, ``final`` those that the optimizer
    gets. Loss scaling, clipping and the mean over processes are one factor of all gradients, that of G included.

    Args:
        raw: Products before, shape ``[n]``.
        final: Products after, shape ``[n]``.

    Example:
        >>> final_scale(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 2.0]))
        tensor(0.5000)
    """
    # Divided by its largest entry: squares of scaled gradients would leave the range of float32.
    unit = raw / raw.abs().max()
    return (unit @ final) / (unit @ raw)


def recorded_means(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row means and the column means of the recorded Fisher of W.

    Args:
        rows: Average of ``(G z)^2`` without bias, shape ``[out]``.
        columns: Average of ``(G^T u)^2`` without bias, shape ``[in]``.

    Returns:
        The row means, shape ``[out]``, and the column means, shape ``[in]``, in float64 and units of one squared
        gradient of W. The means of both are equal.

    Example:
        >>> recorded_means(torch.tensor([2.0, 6.0]), torch.tensor([4.0, 0.0]))
        (tensor([0.7500, 2.2500], dtype=torch.float64), tensor([3., 0.], dtype=torch.float64))
    """
    rho, kappa = rows.to(torch.float64) / len(columns), columns.to(torch.float64) / len(rows)
    level = (rho.mean() + kappa.mean()) / 2
    return _with_mean(rho, level), _with_mean(kappa, level)


def _with_mean(means: Tensor, level: Tensor) -> Tensor:
    """Return means scaled to a level; all equal where none is positive."""
    present = means.mean()
    return means * (level / present) if present > 0 else level.expand(len(means)).clone()
