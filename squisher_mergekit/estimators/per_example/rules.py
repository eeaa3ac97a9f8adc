"""Squared per-example gradients of a parameter, from its modules' inputs and the gradients at their outputs.

Each kind of layer has a rule in terms of ``A``, the input, and ``B``, the gradient at the output, per example. Modules
without a rule are differentiated once for each example (the generic rule).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import combinations, count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.estimators.per_example import convolution, kernel_fallback
from squisher_mergekit.estimators.per_example.layer_kinds import (
    Rule,
    by_example,
    exact,
    factor_pair,
    gradient_at,
    has_channels,
    input_of,
    is_conv,
    is_conv1d,
    is_exactly,
    rule_of,
    wide,
)
from squisher_mergekit.estimators.per_example.linear_embedding import (
    add_matrix,
    add_rows,
    add_tied,
    chunk_of,
    factors,
    lookups,
    matrix_squares,
    products,
    token_sums,
)
from squisher_mergekit.estimators.per_example.norm_kernel import try_norm_gradients
from squisher_mergekit.estimators.per_example.tape import Call, Use, first_tensor, tensors_of
from squisher_mergekit.tensors.sharded import gathered

Values = Mapping[str, Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Run = Callable[[tuple[Any, ...], Mapping[str, Any]], Any]
# Largest difference of equal outputs, as a share of the largest entry.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_NARROW_TOLERANCE = 3e-2
_MOST = 8  # arguments that are told apart; a module with more has all of them cut
# Module -> number of examples and shapes of the arguments -> numbers of the arguments that are passed whole.
_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, frozenset[int]]] = weakref.WeakKeyDictionary()


def add_squares(total: Tensor, uses: Sequence[Use], size: int) -> None:
    """Add the squared gradients of all examples to a parameter's accumulator.

    ``total += sum_n (sum_u g_nu)^2``, over the examples n and the uses u of a shared parameter.

    Args:
        total: Accumulator with the shape of the parameter, float32 or float64.
        uses: Calls of the parameter's modules, in the order of the forward pass. Calls without a gradient count as 0.
        size: Number of examples.

    Raises:
        UnsupportedStateError: A module mixes its examples.
    """
    uses = [use for use in uses if use[1].gradient is not None]
    kinds = {rule_of(name, call.module) for name, call in uses}
    if not kinds:
        return
    # The generic rule runs a module again, as the model ran it.
    with nullcontext() if "generic" in kinds else exact(total.device):
        _add_by_rule(total, uses, size, kinds)


def _add_by_rule(total: Tensor, uses: Sequence[Use], size: int, kinds: set[Rule]) -> None:
    """Add the squares by the rule of the layers, or of their combination."""
    if kinds == {"matrix"}:
        add_matrix(total, uses, size)
    elif kinds == {"rows"}:
        add_rows(total, uses, size)
    elif kinds == {"matrix", "rows"} and not any(is_conv1d(call.module) for _, call in uses):
        add_tied(total, uses, size)
    elif len(uses) == 1 and _has_patches(*uses[0]):
        _add_patches(total, uses[0][1], size)
    else:
        most = convolution.MAX_EXAMPLES if all(is_conv(call.module) for _, call in uses) else size
        values = [_values(name, call) for name, call in uses]
        for start in range(0, size, chunk := min(most, chunk_of(total))):
            examples = slice(start, min(start + chunk, size))
            parts = [
                _gradients(use, size, examples, total.shape, known) for use, known in zip(uses, values, strict=True)
            ]
            total += sum(parts[1:], parts[0]).to(total.dtype).square_().sum(0).reshape(total.shape)


def _has_patches(name: str, call: Call) -> bool:
    """Return True for a convolution on a GPU, where products of patches are faster than a grouped convolution."""
    assert call.gradient is not None
    module: Any = call.module
    dense: bool = name == "weight" and is_conv(module) and module.groups == 1
    return dense and kernel_fallback.on_gpu(call.gradient)


def _add_patches(total: Tensor, call: Call, size: int) -> None:
    """Add the squares of a convolution's weight, as those of a linear layer over the patches of its input."""
    x, b = by_example(input_of(call), size, call), gradient_at(call, size)
    for start in range(0, size, chunk := convolution.MAX_EXAMPLES):
        pair = factor_pair(b[start : start + chunk], x[start : start + chunk])
        b_patches, a_patches = convolution.patch_factors(call.module, pair[1], pair[0])
        matrix_squares(total.view(len(total), -1), b_patches, a_patches)


def _values(name: str, call: Call) -> Values:
    """Return a module's gathered parameters for the generic rule; other rules need none."""
    if rule_of(name, call.module) != "generic":
        return {}
    return {key: gathered(p.detach()) for key, p in call.module.named_parameters()}


def _gradients(use: Use, size: int, examples: slice, shape: torch.Size, values: Values) -> Tensor:
    """Return the gradients of a slice of the examples, shape ``(n, *parameter)``."""
    name, call = use
    module, rule = call.module, rule_of(use[0], use[1].module)
    if rule == "generic":
        return _generic(name, call, size, examples, values)
    if rule == "matrix":
        b, a = factors(call, size)
        return products(b[examples], a[examples])
    if rule == "rows":
        ids, at_rows = lookups(call, size)
        tokens, sums = token_sums(ids[examples], at_rows[examples])
        index = tokens.unsqueeze(-1).expand_as(sums)
        return sums.new_zeros(len(sums), *shape).scatter_add_(1, index, sums)
    b = gradient_at(call, size)[examples]
    if rule == "bias":
        return _reduced(b, module, shape)
    x = input_of(call)
    if rule == "convolution":
        return convolution.gradients(name, module, wide(by_example(x, size, call)[examples]), wide(b))
    if len(x) == size and (fused := try_norm_gradients(module, name, x[examples], b)) is not None:
        return fused
    return _reduced(by_example(_slope(name, call), size, call)[examples].mul_(wide(b)), module, shape)


def _reduced(product: Tensor, module: nn.Module, shape: torch.Size) -> Tensor:
    """Sum over all axes but the examples' and the parameter's: the last axes, or the channels of an image."""
    dtype = torch.float64 if product.dtype == torch.float64 else torch.float32
    if has_channels(module):
        return product.reshape(len(product), product.shape[1], -1).sum(-1, dtype=dtype)
    return product.reshape(len(product), -1, *shape).sum(1, dtype=dtype)


def _slope(name: str, call: Call) -> Tensor:
    """Return the derivative of each output of a norm by the weight's entry that scales it."""
    module: Any = call.module
    x = wide(input_of(call))
    if is_exactly(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.running_mean is None:
            raise UnsupportedStateError(
                "a batch norm must have running statistics, but this one normalizes over the batch; take another norm"
            )
        return F.batch_norm(x, module.running_mean, module.running_var, None, None, False, 0.0, module.eps)
    return _slope_by_difference(name, call)


def _slope_by_difference(name: str, call: Call) -> Tensor:
    """Return the slope of any norm that is linear in its weight: its output at weight 1 minus its output at weight 0.

    The norms of language models scale by the weight ``w`` or by ``1 + w``. A bias cancels in the difference.
    """
    parameters = {
        key: torch.zeros(p.shape, dtype=p.dtype, device=p.device)
        for key, p in call.module.named_parameters(recurse=False)
    }
    args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in call.args)
    ends = []
    for fill in (1.0, 0.0):
        given = {**parameters, name: torch.full_like(parameters[name], fill)}
        with torch.no_grad():
            out = first_tensor(_run_again(call.module, given, args, call.kwargs))
        assert out is not None
        ends.append(wide(out))
    return ends[0] - ends[1]


def _generic(name: str, call: Call, size: int, examples: slice, values: Values) -> Tensor:
    """Return the gradients of a slice of the examples by running the module once for each.

    Argument tensors with a batch axis are cut; all others are passed whole.
    """
    b = gradient_at(call, size)
    whole = whole_arguments(call, size, lambda args, kwargs: _run_again(call.module, values, args, kwargs))
    found = []
    for n in range(size)[examples]:
        with torch.enable_grad():
            parameter = values[name].detach().requires_grad_()
            args, kwargs = example_of((call.args, dict(call.kwargs)), n, size, whole)
            out = first_tensor(_run_again(call.module, {**values, name: parameter}, args, kwargs))
            assert out is not None
            # A parameter that the example does not use, such as another task's token, has no graph.
            column, used = b[n].reshape(out.shape), out.requires_grad
            (gradient,) = torch.autograd.grad(out, parameter, column, allow_unused=True) if used else (None,)
        found.append(torch.zeros_like(parameter) if gradient is None else gradient)
    return wide(torch.stack(found))


class _Forward(nn.Module):
    """Wrapper that runs a module without its hooks, which would gather parameters that are whole already."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)


def _run_again(module: nn.Module, values: Values, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a module with the given parameters."""
    given = {f"inner.{key}": value for key, value in values.items()}
    return torch.func.functional_call(_Forward(module), given, args, dict(kwargs))


# --- arguments of a module that runs again ----------------------------------------------------------------------------
# The first axis of an argument can have the size of the batch by chance, as that of a causal mask (T, T) of as many
# tokens as there are examples. The output tells: run on one example with the right arguments cut, the module returns
# that example of its recorded output.


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
