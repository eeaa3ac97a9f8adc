r"""Equations that lift the second moments of a LoRA to a Fisher of the merged weights. Pure functions of tensors.

A LoRA trains ``W = W0 + s B A``, with A of shape ``[r, in]`` and B of shape ``[out, r]``. With ``G = dL/dW``, the chain
rule gives ``dL/dA = s B^T G`` and ``dL/dB = s G A^T``, so that for each rank k

    E[(dL/dB_ok)^2] = s^2 E[(sum_i G_oi A_ki)^2]      E[(dL/dA_ki)^2] = s^2 E[(sum_o B_ok G_oi)^2]

**Rows.** A begins as a random draw and stays near it, nearly independent of G. The cross terms of the left square then
cancel on average, and each rank is a Hutchinson estimate of the row sums of ``E[G^2]``:

    v_B[o, k] / (s^2 |A_k|^2)  ~  mean over i of E[G_oi^2] = rho_o        |A_k|: norm of row k of A

The estimates of all ranks are averaged.

**Columns.** B is trained and depends on G, so that the right square has no scale without bias. If gradients factor,
as K-FAC assumes (``E[G_oi G_pi] = H_op c_i``), then ``E[(sum_o B_ok G_oi)^2] = c_i B_k^T H B_k``: for any B, its shape
over the inputs is that of the columns of ``E[G^2]``. With the norm of column k of B as the scale,

    kappa_i = mean over k of v_A[k, i] / (s^2 |B_k|^2)

**Scale.** ``m = sqrt(mean(rho) mean(kappa))`` is the mean of F: rho alone is too large, because A aligns with the
gradient during training, and the geometric mean has the smaller error between models. Then

    row = rho m / mean(rho)      col = kappa m / mean(kappa)      F_oi = row_o col_i / m

which is the ``rank1`` form of a Fisher (:mod:`squisher_mergekit.fisher.compact`), with row means and column means. More
than rank 1 cannot be identified from r measurements.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lifted_means(a: Tensor, b: Tensor, v_a: Tensor | None, v_b: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return the row means and the column means of the Fisher of ``W0 + scale B A``.

    A rank with ``A_k = 0`` is left out of the mean over rho, and one with ``B_k = 0`` out of that over kappa: no
    gradient passes through it. If A has no signal (frozen as in LoRA-FA, or one step from B = 0), all columns have one
    mean; if B has none, all rows have one. Without any signal, F is 0.

    Args:
        a: A, shape ``[r, in]``.
        b: B, shape ``[out, r]``.
        v_a: Second moment of A without bias, shape ``[r, in]``; None if A is frozen.
        v_b: Second moment of B without bias, shape ``[out, r]``; None if B is frozen.
        scale: s, ``alpha / r`` or ``alpha / sqrt(r)``; not 0.

    Returns:
        The row means, shape ``[out]``, and the column means, shape ``[in]``, in float64 and units of one squared
        gradient of W. The means of both are equal.

    Example:
        >>> a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]])
        >>> row, col = lifted_means(a, b, torch.tensor([[4.0, 12.0]]), torch.tensor([[50.0], [150.0]]), 1.0)
        >>> row, col
        (tensor([2.8284, 8.4853], dtype=torch.float64), tensor([2.8284, 8.4853], dtype=torch.float64))
        >>> lifted_means(a, b, None, torch.tensor([[50.0], [150.0]]), 1.0)
        (tensor([2., 6.], dtype=torch.float64), tensor([4., 4.], dtype=torch.float64))
    """
    rho = _mean_over_ranks(v_b, a, scale)
    kappa = _mean_over_ranks(None if v_a is None else v_a.T, b.T, scale)
    rows, columns = rho.mean(), kappa.mean()
    if not rows > 0 and not columns > 0:
        return rho.new_zeros(b.shape[0]), rho.new_zeros(a.shape[1])
    if not columns > 0:
        return rho.clone(), rows.expand(a.shape[1]).clone()
    if not rows > 0:
        return columns.expand(b.shape[0]).clone(), kappa.clone()
    level = rows.sqrt() * columns.sqrt()
    return rho * (level / rows), kappa * (level / columns)


def _mean_over_ranks(moment: Tensor | None, other: Tensor, scale: float) -> Tensor:
    """Return the mean over ranks of a factor's second moment, each divided by ``(scale |row of the other factor|)^2``.

    Args:
        moment: Second moment, shape ``[n, r]``; None for a frozen factor.
        other: The other factor, shape ``[r, m]``.
        scale: s.
    """
    if moment is None:
        return torch.zeros(1, dtype=torch.float64, device=other.device)
    squares = other.to(torch.float64).square().sum(1)
    live = squares > 0
    if not live.any():
        return torch.zeros(len(moment), dtype=torch.float64, device=other.device)
    return (moment.to(torch.float64)[:, live] / (scale**2 * squares[live])).mean(1)
