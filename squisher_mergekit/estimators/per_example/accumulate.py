"""Sums of squared gradients by parameter, and how a batch is added to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.estimators.per_example.layer_kinds import rule_of
from squisher_mergekit.estimators.per_example.linear_embedding import add_outer, outer_square
from squisher_mergekit.estimators.per_example.rules import add_squares
from squisher_mergekit.estimators.per_example.tape import Tape, Uses, gradients
from squisher_mergekit.estimators.tasks import Outputs
from squisher_mergekit.tensors.sharded import is_sharded

Totals = dict[nn.Parameter, Tensor]
Failed = dict[nn.Parameter, Exception]


def no_totals(parameters: Iterable[nn.Parameter]) -> Totals:
    """Return sums of nothing, where and as the parameters lie: float32, or float64 of those that are."""
    contiguous = torch.contiguous_format
    return {p: torch.zeros_like(p, dtype=_accumulated(p), memory_format=contiguous) for p in parameters}


def _accumulated(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def add_batch(
    totals: Totals,
    tape: Tape,
    outputs: Outputs,
    columns: Iterable[Tensor],
    unreached: Sequence[nn.Parameter] = (),
    failed: Failed | None = None,
    arrived: set[nn.Parameter] | None = None,
) -> list[nn.Parameter]:
    """Add the squares of a batch's per-example gradients, for each column.

    Where a gradient is an outer product ``b_n a_n^T``, so is its square: the ``b_n^2`` of all columns are added up, and
    multiplied with ``a_n^2`` once.

    Args:
        totals: To add to. Those of sharded parameters are sums over all processes, which must take part.
        tape: Of the forward pass that gave the outputs.
        outputs: Of the model.
        columns: Gradients at the outputs.
        unreached: Parameters without a call, which the outputs should not depend on.
        failed: Where to note the parameters whose rule fails, and how; without it the error is raised.
        arrived: Where to note the parameters that gradients came for, those without a total among them.

    Returns:
        Those of ``unreached`` that the outputs do depend on.
    """
    outer: dict[nn.Parameter, Tensor] = {}

    def take(parameter: nn.Parameter, uses: Uses) -> None:
        if arrived is not None and any(call.gradient is not None for _, call in uses):
            arrived.add(parameter)
        if parameter not in totals:
            return
        with _noted(parameter, failed), _local(totals[parameter]) as local:
            b = None if is_sharded(totals[parameter]) else outer_square(uses, tape.size)
            if b is None:
                add_squares(local, uses, tape.size)
            else:
                outer[parameter] = outer[parameter].add_(b) if parameter in outer else b

    # What runs a module again waits until the pass is over, and so does what all processes do together, in one order.
    late = [p for p in totals if is_sharded(p) or _runs_again(tape.calls.get(p, []))]
    found: list[nn.Parameter] = []
    for column, last in _with_last(columns):
        found += tape.backward(outputs.values, column, not last, take, set(late), () if found else unreached)
        for parameter in late:
            take(parameter, tape.calls.get(parameter, []))
        tape.forget()
    for parameter, b in outer.items():
        with _noted(parameter, failed):
            add_outer(totals[parameter], b, tape.calls[parameter], tape.size)
    return found


def _runs_again(uses: Uses) -> bool:
    return any(rule_of(name, call.module) == "generic" for name, call in uses)


@contextmanager
def _noted(parameter: nn.Parameter, failed: Failed | None) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # shapes are not what a rule takes them for
        if failed is None:
            raise
        failed[parameter] = error


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
