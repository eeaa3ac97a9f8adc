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

Accumulators = dict[nn.Parameter, Tensor]
Failures = dict[nn.Parameter, Exception]


def zero_accumulators(parameters: Iterable[nn.Parameter]) -> Accumulators:
    """Return sums of nothing, where and as the parameters lie: float32, or float64 of those that are."""
    contiguous = torch.contiguous_format
    return {p: torch.zeros_like(p, dtype=_accumulator_dtype(p), memory_format=contiguous) for p in parameters}


def _accumulator_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def accumulate_batch(
    accumulators: Accumulators,
    tape: Tape,
    outputs: Outputs,
    output_gradients: Iterable[Tensor],
    uncalled: Sequence[nn.Parameter] = (),
    failures: Failures | None = None,
    reached: set[nn.Parameter] | None = None,
) -> list[nn.Parameter]:
    """Add the squares of a batch's per-example gradients, for each output gradient.

    Where a gradient is an outer product ``b_n a_n^T``, so is its square: the ``b_n^2`` of all output gradients
    are added up, and multiplied with ``a_n^2`` once.

    Args:
        accumulators: To add to. Those of sharded parameters are sums over all processes, which must take part.
        tape: Of the forward pass that gave the outputs.
        outputs: Of the model.
        output_gradients: Gradients at the outputs.
        uncalled: Parameters without a call, which the outputs should not depend on.
        failures: Where to note the parameters whose rule fails, and how; without it the error is raised.
        reached: Where to note the parameters that gradients came for, those without a total among them.

    Returns:
        Those of ``uncalled`` that the outputs do depend on.
    """
    outer_squares: dict[nn.Parameter, Tensor] = {}

    def take(parameter: nn.Parameter, uses: Uses) -> None:
        if reached is not None and any(call.gradient is not None for _, call in uses):
            reached.add(parameter)
        if parameter not in accumulators:
            return
        with _recording_failure(parameter, failures), _local_accumulator(accumulators[parameter]) as local:
            b = None if is_sharded(accumulators[parameter]) else outer_square(uses, tape.size)
            if b is None:
                add_squares(local, uses, tape.size)
            else:
                outer_squares[parameter] = outer_squares[parameter].add_(b) if parameter in outer_squares else b

    # What runs a module again waits until the pass is over, and so does what all processes do together, in one order.
    deferred = [p for p in accumulators if is_sharded(p) or _reruns_module(tape.calls.get(p, []))]
    found: list[nn.Parameter] = []
    for output_gradient, last in _with_last(output_gradients):
        found += tape.backward(
            outputs.values, output_gradient, not last, take, set(deferred), () if found else uncalled
        )
        for parameter in deferred:
            take(parameter, tape.calls.get(parameter, []))
        tape.drop_gradients()
    for parameter, b in outer_squares.items():
        with _recording_failure(parameter, failures):
            add_outer(accumulators[parameter], b, tape.calls[parameter], tape.size)
    return found


def _reruns_module(uses: Uses) -> bool:
    return any(rule_of(name, call.module) == "generic" for name, call in uses)


@contextmanager
def _recording_failure(parameter: nn.Parameter, failures: Failures | None) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # shapes are not what a rule takes them for
        if failures is None:
            raise
        failures[parameter] = error


@contextmanager
def _local_accumulator(total: Any) -> Iterator[Tensor]:
    """Give out what this process adds its squares to.

    Of a sharded total that is a tensor of the whole shape. It is summed up over the processes afterwards, and each adds
    its part: only one layer is whole at a time.
    """
    if not is_sharded(total):
        yield total
        return
    from torch.distributed.tensor import DTensor, Partial

    local = torch.zeros(total.shape, dtype=total.dtype, device=total.device)
    yield local
    summed = DTensor.from_local(local, total.device_mesh, [Partial()] * total.device_mesh.ndim, run_check=False)
    total += summed.redistribute(placements=total.placements)


def accumulate_joint(accumulators: Accumulators, outputs: Outputs, output_gradients: Iterable[Tensor]) -> None:
    """Add the square of a batch's summed gradient, for each output gradient."""
    parameters = list(accumulators)
    for output_gradient, last in _with_last(output_gradients):
        for parameter, gradient in zip(
            parameters, gradients(outputs.values, parameters, output_gradient, retain_graph=not last), strict=True
        ):
            if gradient is not None:
                accumulators[parameter] += gradient.to(accumulators[parameter].dtype).square_()


def _with_last(output_gradients: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Yield each output gradient and whether it is the last; only two exist at a time."""
    iterator = iter(output_gradients)
    output_gradient = next(iterator, None)
    while output_gradient is not None:
        following = next(iterator, None)
        yield output_gradient, following is None
        output_gradient = following
