"""Per-example gradients of convolutions over one to three axes, with groups and any padding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from squisher_mergekit.estimators.per_example.linear_embedding import products

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
    if module.groups == 1 and module.in_channels < _FEW_CHANNELS:
        return products(*patch_factors(module, x, b)).reshape(len(x), *module.weight.shape)
    return _by_groups(module, *_padded(module, x), b)


def _padded(module: Any, x: Tensor) -> tuple[Tensor, Any]:
    """Return an input with all padding but zeros applied, and the zeros' widths that are left."""
    none = (0,) * len(module.kernel_size)
    if module.padding_mode != "zeros":
        return F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), none
    if isinstance(module.padding, str):
        return F.pad(x, module._reversed_padding_repeated_twice), none
    return x, module.padding


def patch_factors(module: Any, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return B ``(N, T, out)`` and A ``(N, T, in k k)``: example n's weight gradient is ``B_n^T A_n``, reshaped.

    A has the patches of the input under the kernel, for each of the T positions of the output.

    Args:
        module: A convolution without groups.
        x: The input, shape ``(N, channels, ...)``.
        b: The gradient at the output, shape ``(N, channels, ...)``.
    """
    x, padding = _padded(module, x)
    x = F.pad(x, [width for width in reversed(padding) for _ in range(2)]).contiguous()
    steps = x.stride()[2:]
    dilated = [step * dilation for step, dilation in zip(steps, module.dilation, strict=True)]
    strided = [step * stride for step, stride in zip(steps, module.stride, strict=True)]
    shape = (*x.shape[:2], *module.kernel_size, *b.shape[2:])
    patches = x.as_strided(shape, (*x.stride()[:2], *dilated, *strided)).reshape(len(x), -1, b[0, 0].numel())
    return b.flatten(2).transpose(1, 2), patches.transpose(1, 2)


def _by_groups(module: Any, x: Tensor, padding: Any, b: Tensor) -> Tensor:
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
