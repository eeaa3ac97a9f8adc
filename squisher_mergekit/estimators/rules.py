"""Squared per-example gradients of a parameter, from its modules' inputs and the gradients at their outputs.

``A`` is a module's input and ``B`` the gradient at its output, example by example. One rule a kind of module; what has
none goes the generic way, by differentiating that module alone for each example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.estimators.capture import Call, first_tensor

_CHUNK = 1 << 20  # entries of per-example gradients that are formed at once
_CONVOLVED = 8  # examples that one grouped convolution takes; more are slower on a CPU

Use = tuple[str, Call]


def add_squares(total: Tensor, uses: Sequence[Use], size: int) -> None:
    """Add the squared gradients of all examples to a parameter's total.

    ``total += sum_n (sum_u g_nu)^2``, over the examples n and the uses u of a shared parameter.

    Args:
        total: Shaped like the parameter, float32 or float64.
        uses: In the order of the forward pass; those without a gradient count as 0.
        size: Number of examples.

    Raises:
        UnsupportedStateError: A module does not keep its examples apart.
    """
    uses = [use for use in uses if use[1].gradient is not None]
    kinds = {_kind(name, call) for name, call in uses}
    if not kinds:
        return
    if kinds == {"matrix"}:
        pairs = [_matrix(name, call, size) for name, call in uses]
        matrix_squares(total, _joined([b for b, _ in pairs]), _joined([a for _, a in pairs]))
    elif kinds == {"rows"}:
        parts = [_rows(call, size) for _, call in uses]
        row_squares(total, _joined([ids for ids, _ in parts]), _joined([b for _, b in parts]))
    elif kinds == {"matrix", "rows"}:
        _tied_squares(total, uses, size)
    else:
        most = _CONVOLVED if all(_is_conv(call.module) for _, call in uses) else size
        for start in range(0, size, chunk := min(most, max(1, _CHUNK // max(total.numel(), 1)))):
            examples = slice(start, min(start + chunk, size))
            gradients = sum(_gradients(name, call, size, examples) for name, call in uses)
            assert isinstance(gradients, Tensor)
            total += gradients.to(total.dtype).square_().sum(0).reshape(total.shape)


def _kind(name: str, call: Call) -> str:
    module = call.module
    if name == "weight" and (_is(module, nn.Linear) or _is_conv1d(module)):
        return "matrix"
    if name == "weight" and _is(module, nn.Embedding):
        return "rows"
    return "other"


def _is(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module computes what this kind does, and nothing more."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def _is_conv1d(module: nn.Module) -> bool:
    """Return whether this is GPT-2's linear layer, whose weight is transposed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def by_example(tensor: Tensor, size: int, call: Call) -> Tensor:
    """Return a tensor with the examples in front: shape ``(N, ...)``.

    Raises:
        UnsupportedStateError: It cannot be told whose entries are whose.
    """
    if tensor.ndim and tensor.shape[0] == size:
        return tensor
    if tensor.ndim > 1 and tensor.shape[0] and tensor.shape[0] % size == 0:
        return tensor.reshape(size, -1, *tensor.shape[1:])
    raise UnsupportedStateError(
        f"{type(call.module).__name__} must keep its {size} examples apart, but has a tensor of shape "
        f"{list(tensor.shape)}; leave its parameters out by freezing them, or take grouping batch"
    )


def _gradient(call: Call) -> Tensor:
    if call.gradient is None:
        raise TypeError("a call without a gradient")
    return call.gradient


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Join along the second axis, that of tokens."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


# --- matrices ---------------------------------------------------------------------------------------------------------


def _matrix(name: str, call: Call, size: int) -> tuple[Tensor, Tensor]:
    """Return B and A of a linear layer as ``(N, T, out)`` and ``(N, T, in)``; of GPT-2's the other way round."""
    a, b = by_example(call.args[0], size, call), by_example(_gradient(call), size, call)
    a, b = a.reshape(size, -1, a.shape[-1]), b.reshape(size, -1, b.shape[-1])
    return (a, b) if _is_conv1d(call.module) else (b, a)


def matrix_squares(total: Tensor, b: Tensor, a: Tensor) -> None:
    """Add ``sum_n (B_n^T A_n)^2``, entry by entry.

    Args:
        total: Shape ``(out, in)``.
        b: Shape ``(N, T, out)``.
        a: Shape ``(N, T, in)``.

    Example:
        >>> total = torch.zeros(1, 2)
        >>> matrix_squares(total, torch.ones(1, 3, 1), torch.tensor([[[1.0, 0], [1, 0], [1, 2]]]))
        >>> total
        tensor([[9., 4.]])
    """
    b, a = _wide(b.detach()), _wide(a.detach())
    if b.shape[1] == 1:
        total.addmm_(b[:, 0].square().T, a[:, 0].square())
        return
    chunk = max(1, _CHUNK // max(total.numel(), 1))
    if chunk == 1:
        one = torch.empty_like(total)
        for n in range(len(b)):
            torch.mm(b[n].T, a[n], out=one)
            total.addcmul_(one, one)
        return
    for start in range(0, len(b), chunk):
        part = torch.bmm(b[start : start + chunk].transpose(1, 2), a[start : start + chunk])
        total += part.square_().sum(0)


def outer_square(uses: Sequence[Use], size: int) -> Tensor | None:
    """Return ``b_n^2``, shape ``(N, out)``, of a linear layer that is called once and sees no sequence; else None."""
    if len(uses) != 1 or _kind(*uses[0]) != "matrix" or uses[0][1].gradient is None:
        return None
    b, _ = _matrix(*uses[0], size)
    return _wide(b[:, 0].detach()).square() if b.shape[1] == 1 and not _is_conv1d(uses[0][1].module) else None


def add_outer(total: Tensor, b_squared: Tensor, uses: Sequence[Use], size: int) -> None:
    """Add ``sum_n b_n^2 (a_n^2)^T`` to a linear layer's total."""
    ((_, call),) = uses
    a = _wide(by_example(call.args[0], size, call).reshape(size, -1).detach())
    total.addmm_(b_squared.T, a.square())


# --- rows of a table --------------------------------------------------------------------------------------------------


def _rows(call: Call, size: int) -> tuple[Tensor, Tensor]:
    """Return the ids ``(N, S)`` of an embedding and the gradient ``(N, S, H)`` at what was looked up."""
    module: Any = call.module
    if module.max_norm is not None or module.scale_grad_by_freq:
        raise UnsupportedStateError(
            "an embedding with max_norm or scale_grad_by_freq has no gradient of one example alone; set neither"
        )
    ids = call.args[0]
    ids = (ids.expand(size, *ids.shape[1:]) if ids.shape[0] == 1 else by_example(ids, size, call)).reshape(size, -1)
    b = by_example(_gradient(call), size, call)
    b = b.reshape(size, -1, b.shape[-1])
    if module.padding_idx is not None:
        b = b.masked_fill((ids == module.padding_idx).unsqueeze(-1), 0.0)
    return ids, b


def _per_token(ids: Tensor, b: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sum up the gradients of equal tokens of an example.

    Returns:
        Example and token of each sum, and the sums.
    """
    size = len(ids)
    keys = (ids + torch.arange(size, device=ids.device).unsqueeze(1) * rows).flatten()
    unique, places = torch.unique(keys, return_inverse=True)
    b = _wide(b.detach()).reshape(-1, b.shape[-1])
    sums = b.new_zeros(len(unique), b.shape[-1]).index_add_(0, places, b)
    return unique // rows, unique % rows, sums


def row_squares(total: Tensor, ids: Tensor, b: Tensor) -> None:
    """Add the squared gradients of a table of which each example looks up rows, some of them repeatedly.

    Args:
        total: Shape ``(V, H)``.
        ids: Shape ``(N, S)``.
        b: Shape ``(N, S, H)``.

    Example:
        >>> total = torch.zeros(3, 1)
        >>> row_squares(total, torch.tensor([[2, 2], [0, 2]]), torch.ones(2, 2, 1))
        >>> total.flatten()
        tensor([1., 0., 5.])
    """
    _, tokens, sums = _per_token(ids, b, len(total))
    total.index_add_(0, tokens, sums.square_().to(total.dtype))


def _tied_squares(total: Tensor, uses: Sequence[Use], size: int) -> None:
    """Add those of a table that is an output layer's weight too: ``(e + h)^2 = e^2 + h^2 + 2 e h``.

    ``h`` is needed beside ``e`` only in the rows of the example's own tokens.
    """
    matrices = [_matrix(name, call, size) for name, call in uses if _kind(name, call) == "matrix"]
    tables = [_rows(call, size) for name, call in uses if _kind(name, call) == "rows"]
    b, a = (_wide(_joined([pair[k] for pair in matrices]).detach()) for k in (0, 1))
    matrix_squares(total, b, a)
    ids, at_rows = (_joined([pair[k] for pair in tables]) for k in (0, 1))
    examples, tokens, e = _per_token(ids, at_rows, len(total))
    for n in range(size):
        mine = examples == n
        h = b[n][:, tokens[mine]].T @ a[n]
        total.index_add_(0, tokens[mine], (e[mine].square() + 2 * e[mine] * h).to(total.dtype))


# --- all others -------------------------------------------------------------------------------------------------------


def _gradients(name: str, call: Call, size: int, examples: slice) -> Tensor:
    """Return the gradients of some examples, shape ``(n, *parameter)``."""
    module = call.module
    b = by_example(_gradient(call), size, call)[examples]
    parameter = module.get_parameter(name)
    if name == "bias" and (_is(module, nn.Linear) or _is_conv1d(module)):
        return _wide(b.reshape(len(b), -1, b.shape[-1])).sum(1)
    if _is_conv(module):
        return _conv_gradients(name, call, by_example(call.args[0], size, call)[examples], b)
    if name == "bias" and _is_norm(module):
        return _reduced(_wide(b), module, parameter)
    slope = _slope(name, call)
    if slope is not None:
        product = _wide(b) * by_example(slope, size, call)[examples]
        return _reduced(product, module, parameter)
    if _kind(name, call) == "matrix":
        left, right = _matrix(name, call, size)
        return torch.bmm(_wide(left[examples].detach()).transpose(1, 2), _wide(right[examples].detach()))
    if _kind(name, call) == "rows":
        ids, at_rows = _rows(call, size)
        found, tokens, sums = _per_token(ids[examples], at_rows[examples], len(parameter))
        return sums.new_zeros(len(b), *parameter.shape).index_put_((found, tokens), sums)
    return _generic(name, call, size, examples)


def _reduced(product: Tensor, module: nn.Module, parameter: Tensor) -> Tensor:
    """Sum over all but the examples and the axes of the parameter: the last ones, or the channels of an image."""
    if isinstance(module, nn.GroupNorm | nn.modules.batchnorm._BatchNorm):
        return product.reshape(len(product), product.shape[1], -1).sum(-1)
    return product.reshape(len(product), -1, *parameter.shape).sum(1)


def _slope(name: str, call: Call) -> Tensor | None:
    """Return the derivative of each output by the one entry of the weight that scales it.

    None if the module is none of those where there is one.
    """
    module: Any = call.module
    if "." in name or not _is_norm(module):
        return None
    x = _wide(call.args[0].detach())
    if _is(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.running_mean is None:
            raise UnsupportedStateError("a batch norm without running statistics mixes its examples; take another norm")
        return F.batch_norm(x, module.running_mean, module.running_var, None, None, False, 0.0, module.eps)
    return _by_linearity(name, call)


def _is_norm(module: nn.Module) -> bool:
    known = isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm)
    return known or _is_rms_norm(module)


def _is_rms_norm(module: nn.Module) -> bool:
    return "RMSNorm" in type(module).__name__ or type(module).__name__ in ("T5LayerNorm", "LayerNorm")


def _by_linearity(name: str, call: Call) -> Tensor:
    """Return the slope of a norm of any code: its output with weights 1, less that with weights 0.

    The norms of language models scale by the weight, or by one more than it; both are linear in it, entry by entry.
    """
    module = call.module
    parameters = {key: p.detach() for key, p in module.named_parameters(recurse=False)}
    args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in call.args)
    ends = []
    for fill in (1.0, 0.0):
        weights = {**parameters, name: torch.full_like(parameters[name], fill)}
        with torch.no_grad():
            out = first_tensor(torch.func.functional_call(module, weights, args, dict(call.kwargs)))
        assert out is not None
        ends.append(_wide(out))
    return ends[0] - ends[1]


def _is_conv(module: nn.Module) -> bool:
    return any(_is(module, kind) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _conv_gradients(name: str, call: Call, x: Tensor, b: Tensor) -> Tensor:
    """Return those of a convolution, by one grouped convolution in which the examples are groups."""
    module: Any = call.module
    b = _wide(b.detach())
    if name == "bias":
        return b.flatten(2).sum(-1)
    x = _wide(x.detach())
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding: Any = (0,) * len(module.kernel_size)
    elif isinstance(module.padding, str):
        x = F.pad(x, module._reversed_padding_repeated_twice)
        padding = (0,) * len(module.kernel_size)
    else:
        padding = module.padding
    count, out = len(x), module.out_channels
    weight_shape = (count * out, *module.weight.shape[1:])
    flat_x, flat_b = x.reshape(1, -1, *x.shape[2:]), b.reshape(1, -1, *b.shape[2:])
    gradient = torch.ops.aten.convolution_backward(
        flat_b, flat_x, flat_x.new_empty(weight_shape), None, list(module.stride), list(padding), list(module.dilation),
        False, [0] * len(module.kernel_size), count * module.groups, [False, True, False],
    )[1]  # fmt: skip
    shaped: Tensor = gradient.reshape(count, *module.weight.shape)
    return shaped


def _generic(name: str, call: Call, size: int, examples: slice) -> Tensor:
    """Return those of any module, by differentiating it for one example after the other.

    Tensors among its arguments that have the examples in front are cut, all others are given whole.
    """
    module = call.module
    rest = {key: p.detach() for key, p in module.named_parameters() if key != name}
    b = by_example(_gradient(call), size, call)
    found = []
    for n in range(size)[examples]:
        with torch.enable_grad():
            parameter = module.get_parameter(name).detach().requires_grad_()
            args, kwargs = _cut((call.args, dict(call.kwargs)), n, size)
            out = first_tensor(torch.func.functional_call(module, {**rest, name: parameter}, args, kwargs))
            assert out is not None
            (gradient,) = torch.autograd.grad(out, parameter, b[n].reshape(out.shape), allow_unused=True)
        found.append(torch.zeros_like(parameter) if gradient is None else gradient)
    return _wide(torch.stack(found))


def _cut(value: Any, n: int, size: int) -> Any:
    """Return one example's part of a module's arguments."""
    if isinstance(value, Tensor):
        value = value.detach()
        if value.ndim and value.shape[0] == size:
            return value[n : n + 1]
        if value.ndim > 1 and value.shape[0] and value.shape[0] % size == 0:
            rows = value.shape[0] // size
            return value[n * rows : (n + 1) * rows]
        return value
    if isinstance(value, dict):
        return {key: _cut(item, n, size) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_cut(item, n, size) for item in value)
    return value
