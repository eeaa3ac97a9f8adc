"""Per-example gradients of convolutions over one to three axes, with groups and any padding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_EXAMPLES = 32  # in one call: the fastest number, measured on a CPU
_FEW_CHANNELS = 8  # input channels below which a CPU's grouped convolution is slower than one matrix product


def gradients(name: str, module: Any, x: Tensor, b: Tensor) -> Tensor:
    """Return the gradients of N examples, shape ``(N, *parameter)``.

    Args:
        name: ``weight`` or ``bias``.
        module: The convolution.
        x: The input, shape ``(N, channels, ...)``, float32 or float64.
        b: The gradient at the output, shape ``(N, channels, ...)``.
    """
    if name == "bias":
        return b.flatten(2).sum(-1)
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding: Any = (0,) * len(module.kernel_size)
    elif isinstance(module.padding, str):
        x = F.pad(x, module._reversed_padding_repeated_twice)
        padding = (0,) * len(module.kernel_size)
    else:
        padding = module.padding
    if module.in_channels < _FEW_CHANNELS and module.groups == 1:
        return _by_patches(module, x, b, padding)
    return _by_groups(module, x, b, padding)


def _by_patches(module: Any, x: Tensor, b: Tensor, padding: Any) -> Tensor:
    """Return the product of the kernel's patches, ``(N, in k k, T)``, with the output gradient, ``(N, out, T)``."""
    x = F.pad(x, [width for width in reversed(padding) for _ in range(2)]).contiguous()
    steps = x.stride()[2:]
    dilated = [step * dilation for step, dilation in zip(steps, module.dilation, strict=True)]
    strided = [step * stride for step, stride in zip(steps, module.stride, strict=True)]
    shape = (*x.shape[:2], *module.kernel_size, *b.shape[2:])
    patches = x.as_strided(shape, (*x.stride()[:2], *dilated, *strided)).reshape(len(x), -1, b[0, 0].numel())
    return torch.bmm(patches, b.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(len(x), *module.weight.shape)


def _by_groups(module: Any, x: Tensor, b: Tensor, padding: Any) -> Tensor:
    """Return the weight gradient of one grouped convolution, with the examples as groups."""
    count = len(x)
    weight_shape = (count * module.out_channels, *module.weight.shape[1:])
    flat_x, flat_b = x.reshape(1, -1, *x.shape[2:]), b.reshape(1, -1, *b.shape[2:])
    gradient = torch.ops.aten.convolution_backward(
        flat_b, flat_x, flat_x.new_empty(weight_shape), None, list(module.stride), list(padding), list(module.dilation),
        False, [0] * len(module.kernel_size), count * module.groups, [False, True, False],
    )[1]  # fmt: skip
    shaped: Tensor = gradient.reshape(count, *module.weight.shape)
    return shaped
