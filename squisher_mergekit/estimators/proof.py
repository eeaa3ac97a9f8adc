"""Whether gradients that were told apart by example are those of each example alone.

The first examples of the data are differentiated one by one, by autograd, and their squares held against those of the
rules. Where a parameter's differ it is used by another module than the one that holds it: the module around is then
differentiated as a whole, then the one around that, up to the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.estimators.capture import Moved, Tape, gradients, taped
from squisher_mergekit.estimators.special import SPECIAL
from squisher_mergekit.estimators.squares import add_batch, no_totals
from squisher_mergekit.estimators.tasks import Batch, Forward, Outputs, Task, run, size_of
from squisher_mergekit.optimizers.sharding import is_sharded

EXAMPLES = 2  # that are checked
# Of a tensor's largest entry. A rule that does not fit is wrong by far more; narrow weights round that much.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


def find_homes(model: nn.Module, batch: Batch, task: Task, forward: Forward | None) -> Moved:
    """Find the parameters that are used by other modules than those that hold them, by trying.

    Args:
        model: In eval mode. If it is sharded all processes must take part.
        batch: The first one, of which the first two examples are taken.
        task: What the outputs mean.
        forward: See :func:`~squisher_mergekit.estimate_fisher`.

    Returns:
        What :func:`~squisher_mergekit.estimators.capture.taped` is to know.

    Raises:
        UnsupportedStateError: The model mixes its examples.
    """
    moved: Moved = {}
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    first = first_examples(batch, EXAMPLES)
    if any(is_sharded(parameter) for parameter in names):
        # Gradients of sharded parameters are means over the processes, which therefore must look at the same examples.
        shared = [first]
        dist.broadcast_object_list(shared, src=0)
        first = _to(shared[0], next(iter(names)).device)
    # What is computed in a narrower dtype rounds by as much as some mistakes are large.
    with torch.autocast(next(iter(names)).device.type, enabled=False):
        while wrong := _wrong(model, first, task, forward, list(names), moved):
            for parameter in wrong:
                _move(model, names[parameter], parameter, moved)
    return moved


def _move(model: nn.Module, full_name: str, parameter: nn.Parameter, moved: Moved) -> None:
    """Give a parameter to the module around the one that has it."""
    home, name = moved.get(parameter, (None, ""))
    if home is model:
        raise UnsupportedStateError(
            f"the gradients of {full_name} cannot be told apart example by example: the model mixes its examples; "
            "freeze it, or take grouping batch"
        )
    path = full_name.removesuffix(f".{name}" if name else "").rpartition(".")[0]
    if not name:  # held by the module at path; the one around it is next
        path = path.rpartition(".")[0]
    within = full_name.removeprefix(f"{path}." if path else "")
    moved[parameter] = (model.get_submodule(path), within)


def _wrong(
    model: nn.Module,
    batch: Batch,
    task: Task,
    forward: Forward | None,
    parameters: list[nn.Parameter],
    moved: Moved,
) -> list[nn.Parameter]:
    """Return the parameters whose squared gradients are not the sum of those of each example alone."""
    size = size_of(batch)
    with taped(model, size, SPECIAL, moved) as tape:
        outputs = run(model, batch, task, forward)
    generator = torch.Generator(outputs.values.device).manual_seed(0)
    column = torch.randn(outputs.values.shape, generator=generator, device=outputs.values.device)
    column = column.to(outputs.values.dtype)
    expected, used = no_totals(parameters), set()
    for n in range(size):
        for parameter, gradient in zip(parameters, _alone(outputs, parameters, column, n), strict=True):
            if gradient is not None:
                used.add(parameter)
                expected[parameter] += gradient.to(expected[parameter].dtype).square()
    totals = no_totals(parameters)
    add_batch(totals, tape, outputs, [column], [parameter for parameter in parameters if parameter not in tape.calls])
    return _unequal(totals, expected, used, tape)


def _alone(outputs: Outputs, parameters: Sequence[nn.Parameter], column: Tensor, n: int) -> Sequence[Tensor | None]:
    """Return the gradients of one example; of sharded parameters as they arrive in ``.grad``, which is put back."""
    if not any(is_sharded(parameter) for parameter in parameters):
        return gradients(outputs.values[n], parameters, column[n], keep=True)
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        outputs.values[n].backward(column[n], retain_graph=True)  # type: ignore[no-untyped-call]
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def _unequal(
    totals: Mapping[nn.Parameter, Tensor],
    expected: Mapping[nn.Parameter, Tensor],
    used: set[nn.Parameter],
    tape: Tape,
) -> list[nn.Parameter]:
    tops = {p: _largest(total) for p, total in expected.items() if p in used}
    found = []
    for p, top in tops.items():
        dtypes = {p.dtype, *(call.dtype for _, call in tape.calls.get(p, []))}
        # Of what was reached, gradients that are nothing but rounding are not compared.
        floor = 1e-9 * max(tops.values()) if p in tape.calls else 0.0
        # All processes have added their squares of the same examples to what is sharded.
        total: Any = totals[p]
        total = total / total.device_mesh.size() if is_sharded(total) else total
        if _largest(total - expected[p]) > max(_TOLERANCE[dtype] for dtype in dtypes) * max(top, floor):
            found.append(p)
    return found


def _largest(tensor: Any) -> float:
    """Return the largest size of an entry; over all processes if they share the tensor."""
    local = tensor.to_local() if is_sharded(tensor) else tensor
    found = local.abs().max() if local.numel() else local.new_zeros(())
    if is_sharded(tensor):
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def first_examples(batch: Batch, count: int) -> Any:
    """Return the first examples of a batch.

    Example:
        >>> first_examples({"x": torch.tensor([1, 2, 3]), "scale": 2.0}, 2)
        {'x': tensor([1, 2]), 'scale': 2.0}
    """
    size = size_of(batch)

    def cut(value: Any) -> Any:
        return value[:count] if isinstance(value, Tensor) and value.ndim and len(value) == size else value

    if isinstance(batch, Mapping):
        return {key: cut(value) for key, value in batch.items()}
    inputs = {k: cut(v) for k, v in batch[0].items()} if isinstance(batch[0], Mapping) else cut(batch[0])
    return inputs, cut(batch[1])


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    return value
