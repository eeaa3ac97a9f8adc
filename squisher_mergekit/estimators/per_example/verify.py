"""Whether gradients that were told apart by example are those of each example alone.

The first examples of the data are differentiated one by one, by autograd, and their squares held against those of the
rules. Where a parameter's differ it is used by another module than the one that holds it: the module around is then
differentiated as a whole, then the one around that, up to the model itself.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.estimators.per_example.accumulate import Failed, Totals, add_batch, no_totals
from squisher_mergekit.estimators.per_example.layer_kinds import gradient_at
from squisher_mergekit.estimators.per_example.t5_bias import SPECIAL
from squisher_mergekit.estimators.per_example.tape import Moved, Tape, Uses, gradients, taped
from squisher_mergekit.estimators.tasks import Batch, Forward, Outputs, Task, run, size_of
from squisher_mergekit.tensors.sharded import is_sharded, sharded_modules

LOG = logging.getLogger("squisher_mergekit")
EXAMPLES = 2  # that are checked
_SAME = 1e-2  # share of the largest output, by which outputs may differ that are the same but for rounding
# Of a tensor's largest entry. A rule that does not fit is wrong by far more; narrow weights round that much.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}

Wrong = dict[nn.Parameter, Exception | None]


@dataclass(frozen=True)
class Proof:
    """What was found out about a model by trying.

    ``moved``: parameters that are used by other modules than those that hold them. ``spread``: modules that give out
    one thing for all examples; None: any may. ``proven``: parameters whose squares were seen to be right; the others
    were not used.
    """

    moved: Moved
    spread: Collection[nn.Module] | None
    proven: set[nn.Parameter]


@dataclass(frozen=True)
class Trial:
    """How a model is run: ``model``, ``task`` and ``forward`` as for :func:`~squisher_mergekit.estimate_fisher`."""

    model: nn.Module
    task: Task
    forward: Forward | None

    @contextmanager
    def taped(self, batch: Batch, moved: Moved, spread: Collection[nn.Module] | None) -> Iterator[tuple[Tape, Outputs]]:
        """Run the model on a batch, and give out what was noted, for as long as the body lasts, and the outputs."""
        with taped(self.model, size_of(batch), SPECIAL, moved, spread) as tape:
            outputs = run(self.model, batch, self.task, self.forward)
        try:
            yield tape, outputs
        finally:
            tape.close()


def prove(
    trial: Trial, batch: Batch, known: Proof | None = None, count: int = EXAMPLES, scratch: Totals | None = None
) -> Proof:
    """Find the parameters that are used by other modules than those that hold them, by trying.

    Args:
        trial: The model, in eval mode. If it is sharded all processes must take part.
        batch: Whose first examples are differentiated one by one; of all of them it is seen whether they mix.
        known: What was found out before.
        count: How many examples are differentiated one by one.
        scratch: Memory of the size of the model, all 0 before and afterwards.

    Raises:
        UnsupportedStateError: The model mixes its examples.
    """
    model = trial.model
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if any(is_sharded(parameter) for parameter in names):
        from accelerate.utils import send_to_device

        # Gradients of sharded parameters are means over the processes, which therefore must look at the same examples.
        shared = [batch]
        dist.broadcast_object_list(shared, src=0)
        batch = send_to_device(shared[0], next(iter(names)).device)
    moved = dict(known.moved) if known else {}
    # What is computed in a narrower dtype rounds by as much as some mistakes are large.
    with torch.autocast(next(iter(names)).device.type, enabled=False):
        spread = known.spread if known else _spread(trial, batch)
        while True:
            used, wrong = _compare(trial, first_examples(batch, count), scratch or no_totals(names), moved, spread)
            with trial.taped(batch, moved, spread) as (tape, outputs):
                wrong |= {p: error for p, error in mixed(tape, outputs, names, keep=False).items() if p in used}
            for parameter, error in wrong.items():
                _move(model, names[parameter], parameter, moved, error)
            if not wrong:
                _tell(model, names, moved)
                return Proof(moved, spread, used)


def _spread(trial: Trial, batch: Batch) -> Collection[nn.Module]:
    """Return the modules whose one output for all examples can be repeated: if not all of them, none."""
    with torch.no_grad():
        values = run(trial.model, batch, trial.task, trial.forward).values
    _reshard(trial.model)
    try:
        with trial.taped(batch, {}, None) as (tape, outputs):
            found, once = outputs.values.detach(), set(tape.once)
            del outputs  # and the graph with it
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError):
        return ()
    finally:
        _reshard(trial.model)
    if found.shape != values.shape:
        return ()
    largest = max(values.max(), -values.min())
    values -= found
    return once if max(values.max(), -values.min()) <= _SAME * largest else ()


def _reshard(model: nn.Module) -> None:
    """Let go of the whole parameters that a forward pass has gathered for a backward pass, which does not follow."""
    for module in sharded_modules(model):
        module.reshard()


def mixed(tape: Tape, outputs: Outputs, parameters: Iterable[nn.Parameter], keep: bool) -> Wrong:
    """Return the parameters in whose calls examples do not lie where they are looked for.

    Where the gradient at the outputs is 0 for some examples, it must be 0 for them at each call.

    Args:
        tape: Of the forward pass that gave the outputs.
        outputs: Of the model.
        parameters: Of the model.
        keep: Another backward pass will follow.
    """
    size, values = tape.size, outputs.values
    column = _any_column(values)
    silent = torch.arange(size, device=values.device) % 2 == 1
    column[silent] = 0
    wrong: Wrong = {}

    def look(parameter: nn.Parameter, uses: Uses) -> None:
        for _, call in uses:
            try:
                if call.gradient is not None and bool(gradient_at(call, size)[silent].any()):
                    wrong[parameter] = None
            except UnsupportedStateError as error:
                wrong[parameter] = error

    tape.backward(values, column, keep, look, unreached=tape.without_call(parameters))
    tape.forget()
    return wrong


def _tell(model: nn.Module, names: Mapping[nn.Parameter, str], moved: Moved) -> None:
    whole = [names[parameter] for parameter, (home, _) in moved.items() if home is model]
    if whole:
        LOG.warning(
            "%d of %d parameters (%s, ...) have gradients that only the whole model tells apart: it is run for one "
            "example after the other, which is as slow as a loop",
            len(whole), len(names), whole[0],
        )  # fmt: skip


def _move(model: nn.Module, full_name: str, parameter: nn.Parameter, moved: Moved, error: Exception | None) -> None:
    """Give a parameter to the module around the one that has it."""
    home, name = moved.get(parameter, (None, ""))
    path = full_name.removesuffix(f".{name}" if name else "").rpartition(".")[0]
    if home is model or (home is None and not path):
        why = "the model mixes its examples" if error is None else " ".join(str(error).split())[:200]
        raise UnsupportedStateError(
            f"the gradients of {full_name} cannot be told apart example by example: {why}; freeze it, or take "
            "grouping batch"
        ) from error
    if not name:  # held by the module at path; the one around it is next
        path = path.rpartition(".")[0]
    within = full_name.removeprefix(f"{path}." if path else "")
    around = model.get_submodule(path)
    if is_sharded(parameter) and any(module is not around for module in sharded_modules(around)):
        raise UnsupportedStateError(
            f"{full_name} is used by {type(around).__name__}, which cannot be run by itself, as its layers are sharded "
            "one by one; take a model in each process, or freeze it"
        )
    moved[parameter] = (around, within)


def _compare(
    trial: Trial, batch: Batch, expected: Totals, moved: Moved, spread: Collection[nn.Module] | None
) -> tuple[set[nn.Parameter], Wrong]:
    """Return the parameters that are used, and those whose squares are not the sums of those of each example alone.

    ``expected`` is filled with these sums, and emptied again.
    """
    parameters = list(expected)
    with trial.taped(batch, moved, spread) as (tape, outputs):
        column = _any_column(outputs.values)
        used = set()
        for n in range(tape.size):
            for parameter, gradient in zip(parameters, _alone(outputs, parameters, column, n), strict=True):
                if gradient is not None:
                    used.add(parameter)
                    expected[parameter].addcmul_(*[gradient.to(expected[parameter].dtype)] * 2)
            del gradient
        tops = {parameter: _largest(expected[parameter]) for parameter in used}
        bounds = _bounds(tops, tape)
        # What is found is taken off what is expected, so that nothing has to be kept beside it.
        for total in expected.values():
            total.mul_(-_copies(total))
        failed = Failed()
        add_batch(expected, tape, outputs, [column], tape.without_call(parameters), failed)
    wrong: Wrong = {}
    for parameter in parameters:
        off = _largest(expected[parameter]) / _copies(expected[parameter])
        if parameter in failed or (parameter in used and off > bounds[parameter]):
            wrong[parameter] = failed.get(parameter)
        expected[parameter].zero_()
    return used, wrong


def _any_column(values: Tensor) -> Tensor:
    """Return some gradient at the outputs, the same each time."""
    generator = torch.Generator(values.device).manual_seed(0)
    return torch.randn(values.shape, generator=generator, device=values.device).to(values.dtype)


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


def _bounds(tops: Mapping[nn.Parameter, float], tape: Tape) -> dict[nn.Parameter, float]:
    """Return how far squares may be off, by the largest entry of each parameter's."""
    bounds = {}
    for parameter, top in tops.items():
        dtypes = {parameter.dtype, *(call.dtype for _, call in tape.calls.get(parameter, []))}
        # Of what was reached, gradients that are nothing but rounding are not compared.
        floor = 1e-9 * max(tops.values()) if parameter in tape.calls else 0.0
        bounds[parameter] = max(_TOLERANCE[dtype] for dtype in dtypes) * max(top, floor)
    return bounds


def _copies(total: Any) -> int:
    """Return how many processes add their squares of the same examples."""
    return int(total.device_mesh.size()) if is_sharded(total) else 1


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
