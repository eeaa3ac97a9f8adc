"""Squared per-example gradients of linear layers, of embedding tables, and of weights that are both.

No function waits for the device: all shapes follow from those of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.estimators.per_example import kernel_fallback
from squisher_mergekit.estimators.per_example.layer_kinds import (
    NARROW,
    by_example,
    factor_pair,
    gradient_at,
    input_of,
    is_conv1d,
    rule_of,
    wide,
)
from squisher_mergekit.estimators.per_example.square_kernel import try_product_squares
from squisher_mergekit.estimators.per_example.tape import Call, Use

# Entries of per-example gradients that are formed at once: as many as the caches of a CPU and of a GPU can store. Above
# _LARGE one matrix at a time is faster, because one pass squares and adds it; measured on a CPU alone.
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 23}
_LARGE = {"cpu": 1 << 16, "cuda": 1 << 22}


def chunk_of(total: Tensor) -> int:
    """Return the number of examples whose gradients of a parameter are formed at once."""
    return max(1, CHUNK.get(total.device.type, CHUNK["cuda"]) // max(total.numel(), 1))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors along the second axis, the tokens."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


# --- linear layers ----------------------------------------------------------------------------------------------------


def factors(call: Call, size: int) -> tuple[Tensor, Tensor]:
    """Return B and A of a linear layer as ``(N, T, out)`` and ``(N, T, in)``, exchanged for GPT-2's ``Conv1D``.

    Example n's gradient is ``B_n^T A_n``. Both have the dtype that :func:`products` takes.
    """
    b, a = factor_pair(_tokens(gradient_at(call, size), size, call), _tokens(input_of(call), size, call))
    return (a, b) if is_conv1d(call.module) else (b, a)


def _tokens(tensor: Tensor, size: int, call: Call) -> Tensor:
    """Return a tensor as ``(N, T, features)``."""
    return by_example(tensor, size, call).detach().reshape(size, -1, tensor.shape[-1])


def add_matrix(total: Tensor, uses: Sequence[Use], size: int) -> None:
    """Add the squares of a linear layer's weight; several calls count as one with all their tokens."""
    pairs = [factors(call, size) for _, call in uses]
    matrix_squares(total, joined([b for b, _ in pairs]), joined([a for _, a in pairs]))


def matrix_squares(total: Tensor, b: Tensor, a: Tensor) -> None:
    """Add ``sum_n (B_n^T A_n)^2``, entry by entry.

    Args:
        total: Shape ``(out, in)``.
        b: Shape ``(N, T, out)``.
        a: Shape ``(N, T, in)``.

    Example:
        >>> total = torch.zeros(1, 2)
        >>> matrix_squares(total, torch.ones(1, 3, 1), torch.tensor([[[1.0, 0], [1, 0], [1, 2]]]))
        >>> total
        tensor([[9., 4.]])
    """
    if b.shape[1] == 1:
        total.addmm_(wide(b[:, 0]).square().T, wide(a[:, 0]).square())
        return
    if try_product_squares(total, b, a):
        return
    if b.dtype not in NARROW and total.numel() >= _LARGE.get(total.device.type, _LARGE["cuda"]):
        one = torch.empty_like(total)
        for n in range(len(b)):
            torch.mm(b[n].T, a[n], out=one)
            total.addcmul_(one, one)
        return
    for start in range(0, len(b), chunk := chunk_of(total)):
        total += products(b[start : start + chunk], a[start : start + chunk]).square_().sum(0)


def products(b: Tensor, a: Tensor) -> Tensor:
    """Return ``B_n^T A_n`` for each example, shape ``(N, out, in)``, in float32 (float64 for float64).

    Args:
        b: Shape ``(N, T, out)``.
        a: Shape ``(N, T, in)``, of the same dtype.
    """
    if b.dtype in NARROW and kernel_fallback.on_gpu(b):
        try:
            return torch.bmm(b.transpose(1, 2), a, out_dtype=torch.float32)
        except (TypeError, NotImplementedError):  # an older torch, or one without a GPU
            pass
    return torch.bmm(wide(b).transpose(1, 2), wide(a))


def outer_square(uses: Sequence[Use], size: int) -> Tensor | None:
    """Return ``b_n^2``, shape ``(N, out)``, for a linear layer with one call and one token per example; else None."""
    if len(uses) != 1 or uses[0][1].gradient is None:
        return None
    ((name, call),) = uses
    if rule_of(name, call.module) != "matrix" or is_conv1d(call.module):
        return None
    b = gradient_at(call, size)
    return wide(b.reshape(size, -1)).square() if b.numel() == size * b.shape[-1] else None


def add_outer(total: Tensor, b_squared: Tensor, uses: Sequence[Use], size: int) -> None:
    """Add ``sum_n b_n^2 (a_n^2)^T`` to a linear layer's total."""
    ((_, call),) = uses
    total.addmm_(b_squared.T, wide(_tokens(call.args[0].to(b_squared.device), size, call)[:, 0]).square())


# --- tables -----------------------------------------------------------------------------------------------------------


def lookups(call: Call, size: int) -> tuple[Tensor, Tensor]:
    """Return the ids ``(N, S)`` of an embedding and the gradient ``(N, S, H)`` at its output.

    Raises:
        UnsupportedStateError: The embedding's rows or gradients depend on the whole batch.
    """
    module = call.module
    if getattr(module, "max_norm", None) is not None or getattr(module, "scale_grad_by_freq", False):
        raise UnsupportedStateError(
            "an embedding must treat each example alone, but max_norm and scale_grad_by_freq use the whole batch; set "
            "neither"
        )
    ids = by_example(input_of(call), size, call).reshape(size, -1)
    b = gradient_at(call, size)
    b = wide(b.reshape(size, -1, b.shape[-1]))
    padding = getattr(module, "padding_idx", None)
    return ids, b if padding is None else b.masked_fill((ids == padding).unsqueeze(-1), 0.0)


def add_rows(total: Tensor, uses: Sequence[Use], size: int) -> None:
    """Add the squares of an embedding table."""
    parts = [lookups(call, size) for _, call in uses]
    row_squares(total, joined([ids for ids, _ in parts]), joined([b for _, b in parts]))


def token_sums(ids: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the gradients at equal tokens of each example.

    Args:
        ids: Shape ``(N, S)``.
        b: Shape ``(N, S, H)``.

    Returns:
        The distinct tokens of each example, ``(N, S)``, and their sums, ``(N, S, H)``; unused entries are token 0 with
        sum 0.

    Example:
        >>> tokens, sums = token_sums(torch.tensor([[7, 3, 7]]), torch.tensor([[[1.0], [2.0], [4.0]]]))
        >>> tokens.tolist(), sums.flatten().tolist()
        ([[3, 7, 0]], [2.0, 5.0, 0.0])
    """
    ordered, order = ids.sort(1)
    slots = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    slots = torch.cat([torch.zeros_like(ids[:, :1]), slots], 1)
    at = slots.gather(1, order.argsort(1)).unsqueeze(-1).expand_as(b)
    return torch.zeros_like(ids).scatter_(1, slots, ordered), torch.zeros_like(b).scatter_add_(1, at, b)


def row_squares(total: Tensor, ids: Tensor, b: Tensor) -> None:
    """Add the squared gradients of a table from which each example looks up rows, some repeatedly.

    Args:
        total: Shape ``(V, H)``.
        ids: Shape ``(N, S)``.
        b: Shape ``(N, S, H)``.

    Example:
        >>> total = torch.zeros(3, 1)
        >>> row_squares(total, torch.tensor([[2, 2], [0, 2]]), torch.ones(2, 2, 1))
        >>> total.flatten()
        tensor([1., 0., 5.])
    """
    tokens, sums = token_sums(ids, b)
    total.index_add_(0, tokens.flatten(), sums.square_().flatten(0, 1).to(total.dtype))


def add_tied(total: Tensor, uses: Sequence[Use], size: int) -> None:
    """Add the squares of a table that is also an output layer's weight: ``(e + h)^2 = e^2 + h^2 + 2 e h``.

    The gradient ``e`` of the table is zero outside the rows of the example's own tokens, so that ``h = B^T A`` of the
    output layer is needed there alone for the last term.
    """
    matrices = [factors(call, size) for name, call in uses if rule_of(name, call.module) == "matrix"]
    tables = [lookups(call, size) for name, call in uses if rule_of(name, call.module) == "rows"]
    b, a = (joined([pair[k] for pair in matrices]) for k in (0, 1))
    matrix_squares(total, b, a)
    tokens, e = token_sums(*(joined([pair[k] for pair in tables]) for k in (0, 1)))
    at_tokens = b.gather(2, tokens.unsqueeze(1).expand(-1, b.shape[1], -1))
    h = products(at_tokens, a)
    total.index_add_(0, tokens.flatten(), (e * (e + 2 * h)).flatten(0, 1).to(total.dtype))
