"""Squared per-example gradients of linear layers and of tables that rows are looked up in, also of tied ones.

Nothing here waits for the device: all shapes follow from those of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.estimators.per_example.layer_kinds import by_example, gradient_at, is_conv1d, rule_of, wide
from squisher_mergekit.estimators.per_example.tape import Call, Use

# Entries of per-example gradients that are formed at once: what the caches of a CPU and of a GPU hold. From a size on
# one matrix at a time is faster than several, as it is squared and added in one pass; measured on a CPU alone.
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 23}
_LARGE = {"cpu": 1 << 16, "cuda": 1 << 22}


def chunk_of(total: Tensor) -> int:
    """Return how many examples' gradients of a parameter are formed at once."""
    return max(1, CHUNK.get(total.device.type, CHUNK["cuda"]) // max(total.numel(), 1))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Join along the second axis, that of tokens."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


# --- linear layers ----------------------------------------------------------------------------------------------------


def factors(call: Call, size: int) -> tuple[Tensor, Tensor]:
    """Return B and A of a linear layer as ``(N, T, out)`` and ``(N, T, in)``; of GPT-2's the other way round.

    Example n's gradient is ``B_n^T A_n``.
    """
    a, b = _tokens(call.args[0], size, call), _tokens(gradient_at(call, size), size, call)
    return (a, b) if is_conv1d(call.module) else (b, a)


def _tokens(tensor: Tensor, size: int, call: Call) -> Tensor:
    return wide(by_example(tensor, size, call).detach().reshape(size, -1, tensor.shape[-1]))


def add_matrix(total: Tensor, uses: Sequence[Use], size: int) -> None:
    """Add the squares of a linear layer's weight; the tokens of several calls are joined."""
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
        total.addmm_(b[:, 0].square().T, a[:, 0].square())
        return
    if total.numel() >= _LARGE.get(total.device.type, _LARGE["cuda"]):
        one = torch.empty_like(total)
        for n in range(len(b)):
            torch.mm(b[n].T, a[n], out=one)
            total.addcmul_(one, one)
        return
    for start in range(0, len(b), chunk := chunk_of(total)):
        part = torch.bmm(b[start : start + chunk].transpose(1, 2), a[start : start + chunk])
        total += part.square_().sum(0)


def outer_square(uses: Sequence[Use], size: int) -> Tensor | None:
    """Return ``b_n^2``, shape ``(N, out)``, of a linear layer that is called once and sees no sequence; else None."""
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
    total.addmm_(b_squared.T, _tokens(call.args[0], size, call)[:, 0].square())


# --- tables -----------------------------------------------------------------------------------------------------------


def lookups(call: Call, size: int) -> tuple[Tensor, Tensor]:
    """Return the ids ``(N, S)`` of an embedding and the gradient ``(N, S, H)`` at what was looked up.

    Raises:
        UnsupportedStateError: The embedding changes its weights or gradients by what the whole batch looks up.
    """
    module = call.module
    if getattr(module, "max_norm", None) is not None or getattr(module, "scale_grad_by_freq", False):
        raise UnsupportedStateError(
            "an embedding with max_norm or scale_grad_by_freq has no gradient of one example alone; set neither"
        )
    ids = by_example(call.args[0], size, call).reshape(size, -1)
    b = gradient_at(call, size)
    b = wide(b.reshape(size, -1, b.shape[-1]))
    padding = getattr(module, "padding_idx", None)
    return ids, b if padding is None else b.masked_fill((ids == padding).unsqueeze(-1), 0.0)


def add_rows(total: Tensor, uses: Sequence[Use], size: int) -> None:
    """Add the squares of a table."""
    parts = [lookups(call, size) for _, call in uses]
    row_squares(total, joined([ids for ids, _ in parts]), joined([b for _, b in parts]))


def token_sums(ids: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sum up the gradients at equal tokens of an example.

    Args:
        ids: Shape ``(N, S)``.
        b: Shape ``(N, S, H)``.

    Returns:
        Tokens ``(N, S)``, each of an example once, and their sums ``(N, S, H)``; the places left over are token 0 with
        a sum of 0.

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
    """Add the squared gradients of a table of which each example looks up rows, some of them repeatedly.

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
    """Add those of a table that is an output layer's weight too: ``(e + h)^2 = e^2 + h^2 + 2 e h``.

    ``h = B^T A`` is needed beside ``e`` only in the rows of the example's own tokens.
    """
    matrices = [factors(call, size) for name, call in uses if rule_of(name, call.module) == "matrix"]
    tables = [lookups(call, size) for name, call in uses if rule_of(name, call.module) == "rows"]
    b, a = (joined([pair[k] for pair in matrices]) for k in (0, 1))
    matrix_squares(total, b, a)
    tokens, e = token_sums(*(joined([pair[k] for pair in tables]) for k in (0, 1)))
    at_tokens = b.gather(2, tokens.unsqueeze(1).expand(-1, b.shape[1], -1))
    h = torch.bmm(at_tokens.transpose(1, 2), a)
    total.index_add_(0, tokens.flatten(), (e * (e + 2 * h)).flatten(0, 1).to(total.dtype))
