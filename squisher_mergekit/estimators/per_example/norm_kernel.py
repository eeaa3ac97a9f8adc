"""Fused kernel on the GPU: gradients of a norm's weight for each example, without the normalized input in memory.

``g_n = sum_t normalize(x_nt) * b_nt``, for layer norms and root mean square norms over the last axis. Torch would
take about ten passes over the activations in float32 for the same; this is one pass over each in its own dtype.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.estimators.per_example.kernel_fallback import can_launch, give_up, launching_on
from squisher_mergekit.estimators.per_example.layer_kinds import is_exactly

KERNEL = "norm"
_MOST_COLUMNS = 1 << 14  # that one program keeps in registers
_FEWEST_ROWS = 8  # of a program
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Normalization:
    """Formula of a norm: ``x / sqrt(mean(x^2) + epsilon)`` over the last axis.

    Attributes:
        epsilon: Added to the mean square.
        centered: If True, the mean of x is subtracted first.
    """

    epsilon: float
    centered: bool


def norm_gradients(x: Tensor, b: Tensor, norm: Normalization) -> Tensor:
    """Return ``sum_t normalize(x_nt) * b_nt`` in float32, shape ``(N, H)``.

    Args:
        x: Inputs of the norm, shape ``(N, T, H)``, any floating dtype.
        b: Gradients at its outputs, of the same shape.
        norm: Formula of the norm.
    """
    from squisher_mergekit.estimators.per_example import norm_kernel_triton as device_code

    x, b = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (x, b))
    examples, rows, columns = x.shape
    chunks = max(1, min(-(-rows // _FEWEST_ROWS), -(-4 * _processors(x.device) // max(examples, 1))))
    out = torch.empty((examples, chunks, columns), dtype=torch.float32, device=x.device)
    width = 1 << (columns - 1).bit_length()
    with launching_on(x.device):
        device_code.sum_products[(examples, chunks)](
            x, b, out, rows, columns, norm.epsilon, x.stride(0), x.stride(1), b.stride(0), b.stride(1), chunks,
            COLUMNS=width, CENTERED=norm.centered, num_warps=min(16, max(1, width // 512)),
        )  # fmt: skip
    return out.sum(1)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def try_norm_gradients(module: nn.Module, name: str, x: Tensor, b: Tensor) -> Tensor | None:
    """Return the gradients of a norm's weight by the kernel, shape ``(N, H)``; None where it does not run.

    Args:
        module: The norm.
        name: Name of the parameter in the module.
        x: Inputs of the norm, shape ``(N, ..., H)``.
        b: Gradients at its outputs, of the same shape.
    """
    narrow = torch.float64 not in (x.dtype, b.dtype)
    if name != "weight" or not (narrow and x.shape == b.shape and x.numel() and can_launch(KERNEL, b)):
        return None
    norm = normalization_of(module, x.dtype)
    if norm is None or x.shape[-1] > _MOST_COLUMNS:
        return None
    shape = (len(x), -1, x.shape[-1])
    try:
        return norm_gradients(x.reshape(shape), b.reshape(shape), norm)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        give_up(KERNEL, b, error)
        return None


_known: weakref.WeakKeyDictionary[nn.Module, Normalization | None] = weakref.WeakKeyDictionary()


def normalization_of(module: nn.Module, dtype: torch.dtype = torch.float32) -> Normalization | None:
    """Return the formula of a norm over the last axis; None if its code computes another one.

    A norm of a language model counts by its values: it runs once on the CPU, for inputs so small that its epsilon
    matters, and must have the slope of the formula.

    Args:
        module: A norm.
        dtype: Of its inputs, which an epsilon of None depends on.

    Example:
        >>> normalization_of(nn.LayerNorm(3)), normalization_of(nn.GroupNorm(1, 3))
        (Normalization(epsilon=1e-05, centered=True), None)
    """
    shape: Any = getattr(module, "normalized_shape", None)
    if is_exactly(module, nn.LayerNorm):
        return Normalization(module.eps, True) if len(shape) == 1 else None  # type: ignore[arg-type]
    if is_exactly(module, nn.RMSNorm):
        epsilon: Any = module.eps
        return Normalization(torch.finfo(dtype).eps if epsilon is None else epsilon, False) if len(shape) == 1 else None
    if module not in _known:
        _known[module] = _probe(module)
    return _known[module]


def _probe(module: nn.Module) -> Normalization | None:
    """Return the formula of a root mean square norm, if its slope has the formula's values for random inputs."""
    weight = getattr(module, "weight", None)
    epsilon: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    state = [*module.parameters(), *module.buffers()]
    if not (isinstance(weight, Tensor) and weight.ndim == 1 and len(state) == 1 and isinstance(epsilon, float)):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, len(weight), generator=generator) * max(epsilon, 1e-12) ** 0.5
    expected = x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            ends = [_forward_with(module, torch.full(weight.shape, fill), x) for fill in (1.0, 0.0)]
        off = float((ends[0] - ends[1] - expected).abs().max())
    except Exception:  # any code may be in a module's forward
        return None
    return Normalization(epsilon, False) if off <= _TOLERANCE * float(expected.abs().max()) else None


def _forward_with(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """Run a norm's forward with another weight, without its hooks."""
    found: Tensor = torch.func.functional_call(_Unhooked(module), {"inner.weight": weight}, (x,))
    return found


class _Unhooked(nn.Module):
    """Module that calls another one's forward without its hooks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner.forward(x)
