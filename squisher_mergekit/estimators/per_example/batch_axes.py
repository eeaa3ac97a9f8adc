"""Batch axis of the arguments of a module that the generic rule runs once for each example.

The first axis of an argument can have the size of the batch by chance, as that of a causal mask ``(T, T)`` of as many
tokens as there are examples. The output of the module tells: run on one example with the right arguments cut, the
module returns that example of its recorded output.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations, count
from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.estimators.per_example.layer_kinds import by_example
from squisher_mergekit.estimators.per_example.tape import Call, first_tensor, tensors_of

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Run = Callable[[tuple[Any, ...], Mapping[str, Any]], Any]
# Largest difference of equal outputs, as a share of the largest entry.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_NARROW_TOLERANCE = 3e-2
_MOST = 8  # arguments that are told apart; a module with more has all of them cut
# Module -> number of examples and shapes of the arguments -> numbers of the arguments that are passed whole.
_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, frozenset[int]]] = weakref.WeakKeyDictionary()


def example_of(arguments: Any, n: int, size: int, whole: frozenset[int] = frozenset()) -> Any:
    """Return example n of a module's arguments, in nested containers too.

    Args:
        arguments: Tensors, containers of them, and other values, which are passed as they are.
        n: Number of the example.
        size: Number of examples.
        whole: Numbers of the tensors, in the order of the arguments, that are passed whole.

    Example:
        >>> example_of((torch.arange(3), torch.eye(2)), 1, 3)
        (tensor([1]), tensor([[1., 0.],
                [0., 1.]]))
    """
    return _cut(arguments, n, size, whole, count())


def whole_arguments(call: Call, size: int, run: Run) -> frozenset[int]:
    """Return the numbers of the tensor arguments without a batch axis whose first axis fits the batch by chance.

    Args:
        call: The call, with its output.
        size: Number of examples.
        run: Function that runs the module on arguments.
    """
    arguments: Arguments = (call.args, dict(call.kwargs))
    shapes = tuple(tuple(tensor.shape) for tensor in tensors_of(arguments))
    fitting = [number for number, shape in enumerate(shapes) if size > 1 and _rows(shape, size)]
    if not fitting or len(fitting) > _MOST:
        return frozenset()
    known = _known.setdefault(call.module, {})
    if (size, shapes) in known:
        return known[size, shapes]
    expected = call.unchanged_output
    if expected is None or (expected.is_cuda and torch.cuda.is_current_stream_capturing()):
        return frozenset()
    found = known[size, shapes] = _nearest(fitting, by_example(expected, size, call), arguments, size, run)
    return found


def _nearest(fitting: list[int], expected: Tensor, arguments: Arguments, size: int, run: Run) -> frozenset[int]:
    """Return the arguments to pass whole so that single examples have their outputs; the fewest that do."""
    tolerance = _TOLERANCE.get(expected.dtype, _NARROW_TOLERANCE) * float(expected.abs().max())
    errors: dict[frozenset[int], float] = {}
    for whole in _subsets(fitting):
        errors[whole] = max(_error(expected[n], arguments, n, size, whole, run) for n in (0, size - 1))
        if errors[whole] <= tolerance:
            return whole
    return min(errors, key=lambda whole: errors[whole])


def _subsets(numbers: list[int]) -> Iterator[frozenset[int]]:
    for length in range(len(numbers) + 1):
        yield from map(frozenset, combinations(numbers, length))


def _error(expected: Tensor, arguments: Arguments, n: int, size: int, whole: frozenset[int], run: Run) -> float:
    """Return the largest difference of the output of an example; infinity if the module refuses its arguments."""
    args, kwargs = example_of(arguments, n, size, whole)
    try:
        with torch.no_grad():
            out = first_tensor(run(args, kwargs))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # modules raise errors of any class for arguments of another shape
        return float("inf")
    if out is None or out.numel() != expected.numel():
        return float("inf")
    error = float((out.reshape(expected.shape).to(expected.dtype) - expected).abs().max())
    return error if error == error else float("inf")


def _rows(shape: tuple[int, ...], size: int) -> int:
    """Return the number of rows of one example in a tensor of a shape; 0 for a tensor without a batch axis."""
    if shape and shape[0] == size:
        return 1
    return shape[0] // size if len(shape) > 1 and shape[0] and shape[0] % size == 0 else 0


def _cut(value: Any, n: int, size: int, whole: frozenset[int], numbers: Iterator[int]) -> Any:
    if isinstance(value, Tensor):
        value, rows = value.detach(), _rows(tuple(value.shape), size)
        return value[n * rows : (n + 1) * rows] if next(numbers) not in whole and rows else value
    if isinstance(value, dict):
        return {key: _cut(item, n, size, whole, numbers) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_cut(item, n, size, whole, numbers) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
