"""Kinds of layers, the rule of each, and the batch axis of a call's tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.estimators.per_example import kernel_fallback
from squisher_mergekit.estimators.per_example.tape import Call

NARROW = (torch.bfloat16, torch.float16)
Rule = Literal["matrix", "rows", "convolution", "bias", "scale", "generic"]


def rule_of(name: str, module: nn.Module) -> Rule:
    """Return the name of the rule for a module's parameter.

    Example:
        >>> rule_of("weight", nn.Linear(2, 3)), rule_of("bias", nn.LayerNorm(3)), rule_of("weight", nn.PReLU())
        ('matrix', 'bias', 'generic')
    """
    linear = is_exactly(module, nn.Linear) or is_conv1d(module)
    if name == "weight" and linear:
        return "matrix"
    if name == "weight" and is_exactly(module, nn.Embedding):
        return "rows"
    if is_conv(module):
        return "convolution"
    if name == "bias" and (linear or is_norm(module)):
        return "bias"
    if "." not in name and is_norm(module):
        return "scale"
    return "generic"


def reruns_module(name: str, module: nn.Module) -> bool:
    """Return True if the rule for a module's parameter runs the module again."""
    return rule_of(name, module) == "generic"


def is_exactly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return True if a module is of a kind and does not override its ``forward``."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def is_conv1d(module: nn.Module) -> bool:
    """Return True for GPT-2's linear layer, whose weight is transposed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_conv(module: nn.Module) -> bool:
    """Return True for a convolution over one to three axes."""
    return any(is_exactly(module, kind) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def has_channels(module: nn.Module) -> bool:
    """Return True for a norm whose parameters belong to the second axis."""
    return isinstance(module, nn.GroupNorm | nn.modules.batchnorm._BatchNorm)


def is_norm(module: nn.Module) -> bool:
    """Return True for a norm that scales its normalized input, entry by entry."""
    rms = "RMSNorm" in type(module).__name__ or type(module).__name__ in ("T5LayerNorm", "LayerNorm")
    return isinstance(module, nn.LayerNorm) or has_channels(module) or rms


def by_example(tensor: Tensor, size: int, call: Call) -> Tensor:
    """Return a tensor with the examples along the first axis, shape ``(N, ...)``.

    Args:
        tensor: Tensor whose first axis is N, or N times rows of one example.
        size: Number of examples N.
        call: Call of the tensor, for the message.

    Raises:
        UnsupportedStateError: The first axis is not a multiple of N.
    """
    if tensor.ndim and tensor.shape[0] == size:
        return tensor
    if tensor.ndim > 1 and tensor.shape[0] and tensor.shape[0] % size == 0:
        return tensor.reshape(size, -1, *tensor.shape[1:])
    raise UnsupportedStateError(
        f"{type(call.module).__name__} must have its {size} examples along the first axis, found a tensor of shape "
        f"{list(tensor.shape)}; freeze its parameters, or take grouping batch"
    )


def gradient_at(call: Call, size: int) -> Tensor:
    """Return the gradient at a call's output, shape ``(N, ...)``."""
    assert call.gradient is not None
    return by_example(call.gradient, size, call).detach()


def input_of(call: Call) -> Tensor:
    """Return a call's first argument, on the device of its gradient.

    A hook sees the arguments before ``accelerate`` moves them to a layer on another GPU, as it does for the output
    layer of a model that is spread over several and has one tied table.
    """
    assert call.gradient is not None
    found: Tensor = call.args[0].detach()
    return found.to(call.gradient.device)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or float64 unchanged: narrower squares would underflow."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def exact(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast, which would make products of float32 narrow."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def factor_pair(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return B and A in the dtype of their product: narrow on a GPU, whose tensor cores sum in float32; else wide.

    Under autocast a layer may get a float32 input, which it multiplies in the narrow dtype of its output.
    """
    if kernel_fallback.on_gpu(b) and b.dtype in NARROW and a.is_floating_point() and a.dtype != torch.float64:
        return b, a.to(b.dtype)
    return wide(b), wide(a)
