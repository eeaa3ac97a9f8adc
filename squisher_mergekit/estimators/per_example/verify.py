"""Verification of per-example gradients against a loop over single examples.

Autograd differentiates the first examples one by one, and their squares are compared with those of the rules. If they
differ for a parameter, another module than the one that registers it uses it: then the parent is differentiated as a
whole, then its parent, up to the model itself.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.estimators.per_example.accumulate import (
    Accumulators,
    Failures,
    accumulate_batch,
    zero_accumulators,
)
from squisher_mergekit.estimators.per_example.layer_kinds import gradient_at, reruns_module
from squisher_mergekit.estimators.per_example.t5_bias import SPECIAL_MODULES
from squisher_mergekit.estimators.per_example.tape import Owners, Tape, Uses, gradients, taped
from squisher_mergekit.estimators.tasks import Batch, Forward, Outputs, Task, count_examples, run_model
from squisher_mergekit.tensors.sharded import is_sharded, sharded_modules

LOG = logging.getLogger("squisher_mergekit")
NUM_EXAMPLES = 2  # compared with the loop
_OUTPUT_TOLERANCE = 1e-2  # of the largest output; equal outputs differ by rounding alone
# As a share of a tensor's largest entry: above the rounding of each dtype, far below the error of a wrong rule.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}

Key = TypeVar("Key")
Mismatches = dict[nn.Parameter, Exception | None]


@dataclass(frozen=True)
class Verification:
    """Result of verifying a model's per-example gradients.

    Attributes:
        owner_of: Parameter -> the module that uses it and its name there, if another module registers it.
        broadcast_modules: Modules with one output for all examples, which is expanded to the batch; None: any module.
        verified: Parameters with correct squared gradients; no example used the others.
    """

    owner_of: Owners
    broadcast_modules: Collection[nn.Module] | None
    verified: set[nn.Parameter]


@dataclass(frozen=True)
class TapedModel:
    """Model that records its layers' calls when it runs.

    Attributes:
        model: The model, in eval mode.
        task: See :func:`~squisher_mergekit.estimate_fisher`.
        forward: See there.
    """

    model: nn.Module
    task: Task
    forward: Forward | None

    @contextmanager
    def run(
        self, batch: Batch, owner_of: Owners, broadcast_modules: Collection[nn.Module] | None
    ) -> Iterator[tuple[Tape, Outputs]]:
        """Run the model on a batch, and yield tape and outputs; the tape is cleared after the body."""
        size = count_examples(batch)
        with taped(self.model, size, SPECIAL_MODULES, owner_of, broadcast_modules, reruns_module) as tape:
            outputs = run_model(self.model, batch, self.task, self.forward)
        try:
            yield tape, outputs
        finally:
            tape.close()


def verify(
    taped_model: TapedModel,
    batch: Batch,
    known: Verification | None = None,
    count: int = NUM_EXAMPLES,
    scratch: Accumulators | None = None,
) -> Verification:
    """Verify per-example gradients against a loop over single examples.

    Args:
        taped_model: The model. All processes of a sharded model must take part.
        batch: A batch. Its first examples are compared with the loop; all of them are checked for mixing.
        known: Result of an earlier verification.
        count: Number of examples in the loop.
        scratch: Accumulators of all trainable parameters, all zero before and afterwards; None: allocate them.

    Returns:
        The result, with the owners that make all compared gradients agree.

    Raises:
        UnsupportedStateError: The model mixes its examples.
    """
    model = taped_model.model
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if any(is_sharded(parameter) for parameter in names):
        from accelerate.utils import send_to_device

        # Gradients of sharded parameters are means over the processes, so that all must compare the same examples.
        shared = [batch]
        dist.broadcast_object_list(shared, src=0)
        batch = send_to_device(shared[0], next(iter(names)).device)
    first = first_examples(batch, count)
    owner_of = dict(known.owner_of) if known else {}
    # Autocast rounds as coarsely as some wrong rules err.
    with torch.autocast(next(iter(names)).device.type, enabled=False):
        broadcast_modules = known.broadcast_modules if known else _find_broadcast_modules(taped_model, first)
        while True:
            used, mismatches = _compare_with_loop(
                taped_model, first, scratch or zero_accumulators(names), owner_of, broadcast_modules
            )
            with taped_model.run(batch, owner_of, broadcast_modules) as (tape, outputs):
                mixing = mixing_parameters(tape, outputs, names, retain_graph=False)
            mismatches |= {parameter: error for parameter, error in mixing.items() if parameter in used}
            for parameter, error in mismatches.items():
                _assign_to_parent(model, names[parameter], parameter, owner_of, error)
            if not mismatches:
                _warn_if_slow(model, names, owner_of)
                return Verification(owner_of, broadcast_modules, used)


def _find_broadcast_modules(taped_model: TapedModel, batch: Batch) -> Collection[nn.Module]:
    """Return the modules with one output for all examples; none if expanding it changes the model's outputs."""
    with torch.no_grad():
        values = run_model(taped_model.model, batch, taped_model.task, taped_model.forward).values
    _reshard(taped_model.model)
    try:
        with taped_model.run(batch, {}, None) as (tape, outputs):
            found, once = outputs.values.detach(), set(tape.broadcasted)
            del outputs  # and the graph with it
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError):
        return ()
    finally:
        _reshard(taped_model.model)
    if found.shape != values.shape:
        return ()
    largest = max(values.max(), -values.min())
    values -= found
    return once if max(values.max(), -values.min()) <= _OUTPUT_TOLERANCE * largest else ()


def _reshard(model: nn.Module) -> None:
    """Free the gathered parameters of a forward pass that no backward pass follows."""
    for module in sharded_modules(model):
        module.reshard()


def mixing_parameters(
    tape: Tape, outputs: Outputs, parameters: Iterable[nn.Parameter], retain_graph: bool
) -> Mismatches:
    """Return the parameters whose calls mix examples, or have them along another axis.

    If the gradient at the outputs is zero for some examples, it must be zero for them at each call.

    Args:
        tape: Record of the forward pass.
        outputs: Outputs of that forward pass.
        parameters: Trainable parameters of the model.
        retain_graph: True if another backward pass follows.

    Returns:
        Parameter -> error, or None if its gradient is not zero for a masked example.
    """
    output_gradient = _random_output_gradient(outputs.values)
    output_gradient[1::2] = 0
    mismatches: Mismatches = {}
    leaks: dict[int, Tensor] = {}  # id of a call -> True if a masked example has a gradient
    calls_of: dict[nn.Parameter, list[int]] = {}

    def look(parameter: nn.Parameter, uses: Uses) -> None:
        for _, call in uses:
            if call.gradient is None:
                continue
            try:
                if id(call) not in leaks:
                    leaks[id(call)] = gradient_at(call, tape.size)[1::2].any()
                calls_of.setdefault(parameter, []).append(id(call))
            except UnsupportedStateError as error:
                mismatches[parameter] = error

    tape.backward(outputs.values, output_gradient, retain_graph, look, uncalled=tape.without_call(parameters))
    tape.drop_gradients()
    found = _to_host(leaks)
    for parameter, calls in calls_of.items():
        if any(found[call] for call in calls):
            mismatches.setdefault(parameter, None)
    return mismatches


def check_mixing(
    tape: Tape, outputs: Outputs, names: Mapping[nn.Parameter, str], batches: int, retain_graph: bool
) -> None:
    """Check that no layer mixes the examples of a batch.

    Args:
        tape: Record of the forward pass.
        outputs: Outputs of that forward pass.
        names: Trainable parameter -> name in memory.
        batches: Number of batches before.
        retain_graph: True if another backward pass follows.

    Raises:
        UnsupportedStateError: A layer does.
    """
    for parameter, error in mixing_parameters(tape, outputs, names, retain_graph).items():
        raise UnsupportedStateError(
            f"{names[parameter]} must have a gradient for each example, but in batch {batches + 1} "
            "its module gets other parts of the examples than before; freeze it, or take grouping batch"
        ) from error


def _to_host(scalars: Mapping[Key, Tensor]) -> dict[Key, float]:
    """Return the values of scalars on any devices; the host waits once for each device, not for each scalar."""
    keys_on: dict[torch.device, list[Key]] = {}
    for key, scalar in scalars.items():
        keys_on.setdefault(scalar.device, []).append(key)
    values: dict[Key, float] = {}
    for keys in keys_on.values():
        values |= zip(keys, torch.stack([scalars[key] for key in keys]).tolist(), strict=True)
    return {key: values[key] for key in scalars}


def _warn_if_slow(model: nn.Module, names: Mapping[nn.Parameter, str], owner_of: Owners) -> None:
    """Warn if the whole model must run for each example."""
    whole = [names[parameter] for parameter, (owner, _) in owner_of.items() if owner is model]
    if whole:
        LOG.warning(
            "%d of %d parameters (%s, ...) have per-example gradients only if the whole model runs for each example, "
            "which is as slow as a loop",
            len(whole), len(names), whole[0],
        )  # fmt: skip


def _assign_to_parent(
    model: nn.Module, full_name: str, parameter: nn.Parameter, owner_of: Owners, error: Exception | None
) -> None:
    """Make the parent of a parameter's owner its new owner.

    Raises:
        UnsupportedStateError: The owner is the whole model, or the parent has sharded layers.
    """
    owner, name = owner_of.get(parameter, (None, ""))
    path = full_name.removesuffix(f".{name}" if name else "").rpartition(".")[0]
    if owner is model or (owner is None and not path):
        why = "the model mixes its examples" if error is None else " ".join(str(error).split())[:200]
        raise UnsupportedStateError(
            f"{full_name} must have a gradient for each example, but {why}; freeze it, or take grouping batch"
        ) from error
    if not name:  # the module at path registers it
        path = path.rpartition(".")[0]
    within = full_name.removeprefix(f"{path}." if path else "")
    parent = model.get_submodule(path)
    if is_sharded(parameter) and any(module is not parent for module in sharded_modules(parent)):
        raise UnsupportedStateError(
            f"{full_name} must be used inside its own layer, but {type(parent).__name__} uses it, whose layers are "
            "sharded one by one; take a model in each process, or freeze it"
        )
    owner_of[parameter] = (parent, within)


def _compare_with_loop(
    taped_model: TapedModel,
    batch: Batch,
    expected: Accumulators,
    owner_of: Owners,
    broadcast_modules: Collection[nn.Module] | None,
) -> tuple[set[nn.Parameter], Mismatches]:
    """Return the parameters that the outputs depend on, and those whose squares differ from the loop's.

    ``expected`` holds the loop's sums during the comparison, and is zero again afterwards.
    """
    parameters = list(expected)
    with taped_model.run(batch, owner_of, broadcast_modules) as (tape, outputs):
        output_gradient = _random_output_gradient(outputs.values)
        used = set()
        for n in range(tape.size):
            for parameter, gradient in zip(
                parameters, _single_example_gradients(outputs, parameters, output_gradient, n), strict=True
            ):
                if gradient is not None:
                    used.add(parameter)
                    _add_square(expected[parameter], gradient)
            del gradient
        largest = _largest_entries({parameter: expected[parameter] for parameter in parameters if parameter in used})
        tolerances = _tolerances(largest, tape)
        # Accumulating onto the negative sums saves a second set of accumulators.
        for total in expected.values():
            total.mul_(-_process_count(total))
        failures = Failures()
        accumulate_batch(expected, tape, outputs, [output_gradient], tape.without_call(parameters), failures)
    mismatches: Mismatches = {}
    errors = _largest_entries(expected)
    for parameter in parameters:
        error = errors[parameter] / _process_count(expected[parameter])
        if parameter in failures or (parameter in used and error > tolerances[parameter]):
            mismatches[parameter] = failures.get(parameter)
        expected[parameter].zero_()
    return used, mismatches


def _add_square(total: Any, gradient: Any) -> None:
    """Add the square of a gradient; on a GPU torch widens narrow entries as it reads them."""
    wide = gradient.to(total.device, total.dtype) if is_sharded(total) or total.is_cpu else gradient
    total.addcmul_(wide, wide)


def _random_output_gradient(values: Tensor) -> Tensor:
    """Return a random gradient at the outputs, the same in every call."""
    generator = torch.Generator(values.device).manual_seed(0)
    return torch.randn(values.shape, generator=generator, device=values.device).to(values.dtype)


def _single_example_gradients(
    outputs: Outputs, parameters: Sequence[nn.Parameter], output_gradient: Tensor, n: int
) -> Sequence[Tensor | None]:
    """Return the gradients of example n; sharded parameters pass them through ``.grad``, which is restored."""
    if not any(is_sharded(parameter) for parameter in parameters):
        return gradients(outputs.values[n], parameters, output_gradient[n], retain_graph=True)
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        outputs.values[n].backward(output_gradient[n], retain_graph=True)  # type: ignore[no-untyped-call]
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def _tolerances(largest: Mapping[nn.Parameter, float], tape: Tape) -> dict[nn.Parameter, float]:
    """Return the tolerated error of each parameter's squares, from the largest entry of each."""
    tolerances = {}
    for parameter, top in largest.items():
        dtypes = {parameter.dtype, *(call.dtype for _, call in tape.calls.get(parameter, []))}
        # Gradients that vanish by symmetry are rounding alone.
        floor = 1e-9 * max(largest.values()) if parameter in tape.calls else 0.0
        tolerances[parameter] = max(_TOLERANCE[dtype] for dtype in dtypes) * max(top, floor)
    return tolerances


def _process_count(total: Any) -> int:
    """Return the number of processes that add the squares of the same examples to an accumulator."""
    return int(total.device_mesh.size()) if is_sharded(total) else 1


def _largest_entries(tensors: Mapping[nn.Parameter, Any]) -> dict[nn.Parameter, float]:
    """Return the largest absolute entry of each tensor, over all processes for sharded ones."""
    found = {}
    for parameter, tensor in tensors.items():
        local = tensor.to_local() if is_sharded(tensor) else tensor
        found[parameter] = torch.maximum(*_ends(local))
        if is_sharded(tensor):
            dist.all_reduce(found[parameter], op=dist.ReduceOp.MAX)
    return _to_host(found)


def _ends(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the negative smallest and the largest entry, in one pass; zeros for a tensor without entries."""
    if not tensor.numel():
        return tensor.new_zeros(()), tensor.new_zeros(())
    smallest, largest = torch.aminmax(tensor)
    return -smallest, largest


def first_examples(batch: Batch, count: int) -> Any:
    """Return the first ``count`` examples of a batch; values without a batch axis are unchanged.

    Example:
        >>> first_examples({"x": torch.tensor([1, 2, 3]), "scale": 2.0}, 2)
        {'x': tensor([1, 2]), 'scale': 2.0}
    """
    size = count_examples(batch)

    def cut(value: Any) -> Any:
        return value[:count] if isinstance(value, Tensor) and value.ndim and len(value) == size else value

    if isinstance(batch, Mapping):
        return {key: cut(value) for key, value in batch.items()}
    inputs = {k: cut(v) for k, v in batch[0].items()} if isinstance(batch[0], Mapping) else cut(batch[0])
    return inputs, cut(batch[1])
