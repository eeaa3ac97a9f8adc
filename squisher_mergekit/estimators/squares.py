"""Sums of squared gradients by parameter, and how a batch is added to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.estimators.capture import Tape, gradients
from squisher_mergekit.estimators.matrices import add_outer, outer_square
from squisher_mergekit.estimators.rules import add_squares
from squisher_mergekit.estimators.tasks import Outputs
from squisher_mergekit.optimizers.sharding import is_sharded

Totals = dict[nn.Parameter, Tensor]


def no_totals(parameters: Iterable[nn.Parameter]) -> Totals:
    """Return sums of nothing, where and as the parameters lie: float32, or float64 of those that are."""
    contiguous = torch.contiguous_format
    return {p: torch.zeros_like(p, dtype=_accumulated(p), memory_format=contiguous) for p in parameters}


def _accumulated(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def add_batch(totals: Totals, tape: Tape, outputs: Outputs, columns: Iterable[Tensor]) -> None:
    """Add the squares of a batch's per-example gradients, for each column.

    Where a gradient is an outer product ``b_n a_n^T``, so is its square: the ``b_n^2`` of all columns are added up, and
    multiplied with ``a_n^2`` once.

    Args:
        totals: To add to. Those of sharded parameters are sums over all processes, which must take part.
        tape: Of the forward pass that gave the outputs.
        outputs: Of the model.
        columns: Gradients at the outputs.
    """
    squares: dict[nn.Parameter, Tensor] = {}
    for column, last in _with_last(columns):
        tape.backward(outputs.values, column, keep=not last)
        for parameter, total in totals.items():
            uses = tape.calls.get(parameter, [])
            several = not last or parameter in squares
            b = outer_square(uses, tape.size) if several and not is_sharded(parameter) else None
            if b is not None:
                squares[parameter] = squares[parameter].add_(b) if parameter in squares else b
            else:
                with _local(total) as local:
                    add_squares(local, uses, tape.size)
    for parameter, b in squares.items():
        add_outer(totals[parameter], b, tape.calls[parameter], tape.size)


@contextmanager
def _local(total: Any) -> Iterator[Tensor]:
    """Give out what this process adds its squares to.

    Of a sharded total that is a tensor of the whole shape. It is summed up over the processes afterwards, and each adds
    its part: only one layer is whole at a time.
    """
    if not is_sharded(total):
        yield total
        return
    from torch.distributed.tensor import DTensor, Partial

    mine = torch.zeros(total.shape, dtype=total.dtype, device=total.device)
    yield mine
    everywhere = DTensor.from_local(mine, total.device_mesh, [Partial()] * total.device_mesh.ndim, run_check=False)
    total += everywhere.redistribute(placements=total.placements)


def add_joint(totals: Totals, outputs: Outputs, columns: Iterable[Tensor]) -> None:
    """Add the square of a batch's summed gradient, for each column."""
    parameters = list(totals)
    for column, last in _with_last(columns):
        for parameter, gradient in zip(
            parameters, gradients(outputs.values, parameters, column, keep=not last), strict=True
        ):
            if gradient is not None:
                totals[parameter] += gradient.to(totals[parameter].dtype).square_()


def _with_last(columns: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Yield each column, and whether it is the last: one is made while the one before is used, not all at once."""
    iterator = iter(columns)
    column = next(iterator, None)
    while column is not None:
        following = next(iterator, None)
        yield column, following is None
        column = following
