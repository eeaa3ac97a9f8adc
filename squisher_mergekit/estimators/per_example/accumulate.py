"""Accumulators of squared gradients, and the two ways to add a batch to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.estimators.per_example.factor_sums import FactorSums
from squisher_mergekit.estimators.per_example.host_sums import HostSums
from squisher_mergekit.estimators.per_example.layer_kinds import reruns_module
from squisher_mergekit.estimators.per_example.linear_embedding import add_outer, outer_square
from squisher_mergekit.estimators.per_example.rules import add_squares
from squisher_mergekit.estimators.per_example.tape import Tape, Uses, gradients
from squisher_mergekit.estimators.tasks import Outputs
from squisher_mergekit.tensors.sharded import is_sharded

Accumulators = dict[nn.Parameter, Tensor]
Failures = dict[nn.Parameter, Exception]


def zero_accumulators(parameters: Iterable[nn.Parameter], device: torch.device | None = None) -> Accumulators:
    """Return zero accumulators with each parameter's sharding, in float32 (float64 for float64).

    Args:
        parameters: The parameters.
        device: Device of the accumulators; None: that of each parameter.
    """
    contiguous = torch.contiguous_format
    return {
        p: torch.zeros_like(p, dtype=_accumulator_dtype(p), device=device, memory_format=contiguous) for p in parameters
    }


def _accumulator_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's accumulator."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def accumulate_batch(
    accumulators: Accumulators,
    tape: Tape,
    outputs: Outputs,
    output_gradients: Iterable[Tensor],
    uncalled: Sequence[nn.Parameter] = (),
    failures: Failures | None = None,
    reached: set[nn.Parameter] | None = None,
    host_sums: HostSums | None = None,
    factor_sums: FactorSums | None = None,
) -> list[nn.Parameter]:
    """Add the squares of a batch's per-example gradients, for each output gradient.

    If a gradient is an outer product ``b_n a_n^T``, so is its square: the ``b_n^2`` of all output gradients are summed
    first, then multiplied with ``a_n^2`` once.

    Args:
        accumulators: Parameter -> accumulator to add to. All processes must take part for sharded parameters.
        tape: Record of the forward pass.
        outputs: Outputs of that forward pass.
        output_gradients: Gradients at the outputs.
        uncalled: Parameters without a recorded call.
        failures: Collects the error of each parameter whose rule fails; without it the error is raised.
        reached: Collects the parameters that received a gradient, also those without an accumulator.
        host_sums: Adds to accumulators in host memory; without it the host waits for each addition.
        factor_sums: Sums of the factors; None if there are none.

    Returns:
        The parameters of ``uncalled`` that the outputs depend on.
    """
    outer_squares: dict[nn.Parameter, Tensor] = {}

    def take(parameter: nn.Parameter, uses: Uses) -> None:
        if reached is not None and any(call.gradient is not None for _, call in uses):
            reached.add(parameter)
        if parameter not in accumulators:
            return
        if factor_sums is not None:
            factor_sums.add(parameter, uses, tape.size)
        total = accumulators[parameter]
        with _recording_failure(parameter, failures), _local_accumulator(total, parameter, host_sums) as local:
            b = None if is_sharded(accumulators[parameter]) else outer_square(uses, tape.size)
            if b is None:
                add_squares(local, uses, tape.size)
            else:
                outer_squares[parameter] = outer_squares[parameter].add_(b) if parameter in outer_squares else b

    # Rules that run a module again would disturb a backward pass; collectives must run in one order on all processes.
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
        total = accumulators[parameter]
        with _recording_failure(parameter, failures), _local_accumulator(total, parameter, host_sums) as local:
            add_outer(local, b, tape.calls[parameter], tape.size)
    return found


def _reruns_module(uses: Uses) -> bool:
    """Return True if a rule of these uses runs its module again."""
    return any(reruns_module(name, call.module) for name, call in uses)


@contextmanager
def _recording_failure(parameter: nn.Parameter, failures: Failures | None) -> Iterator[None]:
    """Record an error of the body in ``failures``, or raise it if there are none."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # the rule expects other shapes
        if failures is None:
            raise
        failures[parameter] = error


@contextmanager
def _local_accumulator(total: Any, parameter: nn.Parameter, host_sums: HostSums | None) -> Iterator[Tensor]:
    """Yield the tensor that this process adds its squares to, on the parameter's device.

    For a sharded accumulator it has the whole shape. Afterwards it is summed over the processes, and each rank adds its
    shard: only one layer is whole at a time. For an accumulator in host memory it is added there afterwards.
    """
    if not is_sharded(total) and total.device == parameter.device:
        yield total
        return
    if not is_sharded(total):
        local = torch.zeros_like(total, device=parameter.device)
        yield local
        if host_sums is None:
            total += local.to(total.device)
        else:
            host_sums.add(total, local)
        return
    from torch.distributed.tensor import DTensor, Partial

    local = torch.zeros(total.shape, dtype=total.dtype, device=total.device)
    yield local
    summed = DTensor.from_local(local, total.device_mesh, [Partial()] * total.device_mesh.ndim, run_check=False)
    total += summed.redistribute(placements=total.placements)


def accumulate_joint(
    accumulators: Accumulators,
    outputs: Outputs,
    output_gradients: Iterable[Tensor],
    host_sums: HostSums | None = None,
    factor_sums: FactorSums | None = None,
) -> None:
    """Add the square of a batch's summed gradient, for each output gradient."""
    parameters = list(accumulators)
    for output_gradient, last in _with_last(output_gradients):
        for parameter, gradient in zip(
            parameters, gradients(outputs.values, parameters, output_gradient, retain_graph=not last), strict=True
        ):
            if gradient is not None:
                if factor_sums is not None:
                    factor_sums.add_gradients(parameter, gradient[None])
                with _local_accumulator(accumulators[parameter], parameter, host_sums) as local:
                    # Not in place: one tensor can be the gradient of two parameters.
                    local += gradient.to(local.dtype).square()


def _with_last(output_gradients: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Yield each output gradient and whether it is the last; only two exist at a time."""
    iterator = iter(output_gradients)
    output_gradient = next(iterator, None)
    while output_gradient is not None:
        following = next(iterator, None)
        yield output_gradient, following is None
        output_gradient = following
