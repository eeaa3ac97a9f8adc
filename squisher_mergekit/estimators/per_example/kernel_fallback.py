"""Availability of Triton's kernels, and the fallback to torch where one does not run."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging

import torch
from torch import Tensor

LOG = logging.getLogger("squisher_mergekit")

_failed: set[tuple[str, str]] = set()  # kernel, device


def on_gpu(tensor: Tensor) -> bool:
    """Return True if a tensor is on a GPU."""
    return tensor.is_cuda


def can_launch(kernel: str, tensor: Tensor) -> bool:
    """Return True if a tensor is on a GPU, Triton is installed, and the kernel has not failed on this GPU."""
    return on_gpu(tensor) and (kernel, str(tensor.device)) not in _failed and _has_triton()


def launching_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which a GPU is the current one, where Triton launches whatever the tensors' device is."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return contextlib.nullcontext()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def give_up(kernel: str, tensor: Tensor, error: Exception) -> None:
    """Log that a kernel fails on a tensor's device, so that :func:`can_launch` refuses it from now on."""
    _failed.add((kernel, str(tensor.device)))
    reason = " ".join(str(error).split())[:200]
    LOG.warning("the fused kernel %s does not run on %s (%s); torch takes its place", kernel, tensor.device, reason)
