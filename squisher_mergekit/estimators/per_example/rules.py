"""Squared per-example gradients of a parameter, from its modules' inputs and the gradients at their outputs.

Each kind of layer has a rule in terms of ``A``, the input, and ``B``, the gradient at the output, per example. Modules
without a rule are differentiated once for each example (the generic rule).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.estimators.per_example import convolution, kernel_fallback
from squisher_mergekit.estimators.per_example.batch_axes import example_of, whole_arguments
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
from squisher_mergekit.estimators.per_example.tape import Call, Use, first_tensor
from squisher_mergekit.tensors.sharded import gathered

Values = Mapping[str, Tensor]


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
