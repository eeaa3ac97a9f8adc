"""Modules whose parameters' gradients do not come example by example unless something is done about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from squisher_mergekit.estimators.capture import Call, Tape, note


class _BiasCall(Call):
    """A call whose gradient ``(N, heads, q, k)`` is turned into that of looked-up rows ``(N, q k, heads)``."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "gradient" and value is not None:
            value = value.permute(0, 2, 3, 1).flatten(1, 2)
        super().__setattr__(name, value)


def is_relative_bias(module: nn.Module) -> bool:
    """Return whether this is an attention with T5's table of relative position biases."""
    return hasattr(module, "compute_bias") and isinstance(
        getattr(module, "relative_attention_bias", None), nn.Embedding
    )


@contextmanager
def relative_bias(module: nn.Module, tape: Tape) -> Iterator[None]:
    """Give T5's relative position bias, made once for all examples, a batch axis.

    The bias ``(1, heads, q, k)`` is looked up in a table by ids ``(q, k)``. Expanded to the batch, the gradient at it
    is that of each example, and the table's follows as that of any embedding.
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
        out = bias.expand(tape.size, -1, -1, -1)
        if out.requires_grad:
            note(tape, _BiasCall(table, (ids.pop().flatten().expand(tape.size, -1),), {}, out), names)
        return out

    attention.compute_bias = compute_bias
    try:
        yield
    finally:
        del attention.compute_bias


Wrap = Callable[[nn.Module, Tape], Any]
# What is done about which modules, beside noting their calls; the tables in them are not noted by themselves.
SPECIAL: tuple[tuple[Callable[[nn.Module], bool], Wrap], ...] = ((is_relative_bias, relative_bias),)
