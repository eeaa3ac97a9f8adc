"""Batch axis for T5's relative position bias, so that it has per-example gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from squisher_mergekit.estimators.per_example.tape import Call, Tape, Wrap


def is_relative_bias(module: nn.Module) -> bool:
    """Return True for an attention with T5's table of relative position biases."""
    return hasattr(module, "compute_bias") and isinstance(
        getattr(module, "relative_attention_bias", None), nn.Embedding
    )


@contextmanager
def relative_bias(module: nn.Module, tape: Tape) -> Iterator[None]:
    """Expand T5's relative position bias to the batch while the body runs.

    T5 looks the bias ``(1, heads, q, k)`` up in a table by ids ``(q, k)``, once for all examples. As rows
    ``(N, q k, heads)`` it equals the output of an embedding, with a gradient for each example.

    Args:
        module: The attention.
        tape: Tape that records the look-up.
    """
    attention: Any = module
    table, original = attention.relative_attention_bias, attention.compute_bias
    ids: list[Tensor] = []
    names = {name: p for name, p in table.named_parameters() if p.requires_grad}

    def compute_bias(*args: Any, **kwargs: Any) -> Tensor:
        handle = table.register_forward_pre_hook(lambda _, given: ids.append(given[0]))
        try:
            bias: Tensor = original(*args, **kwargs)
        finally:
            handle.remove()
        if not bias.requires_grad:
            return bias
        rows = bias.squeeze(0).flatten(1).T.expand(tape.size, -1, -1)
        tape.record(Call(table, (ids.pop().flatten().expand(tape.size, -1),), {}, rows.dtype), rows, names)
        return rows.transpose(1, 2).reshape(tape.size, *bias.shape[1:])

    attention.compute_bias = compute_bias
    try:
        yield
    finally:
        del attention.compute_bias


# Predicate and context manager for :func:`~squisher_mergekit.estimators.per_example.tape.taped`.
SPECIAL_MODULES: tuple[tuple[Callable[[nn.Module], bool], Wrap], ...] = ((is_relative_bias, relative_bias),)
