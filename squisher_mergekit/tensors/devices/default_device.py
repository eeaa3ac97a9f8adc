"""Default device of new tensors: host memory, whatever the caller has set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def host_by_default() -> Iterator[None]:
    """Create tensors in host memory while the body runs, where the call names no device.

    mergekit's workers for several GPUs run their tasks in ``with torch.device("cuda:1")``, and some programs call
    ``torch.set_default_device``. Files are read into host memory all the same. Also a decorator.

    Yields:
        Nothing.

    Example:
        >>> with torch.device("meta"), host_by_default():
        ...     torch.zeros(2)
        tensor([0., 0.])
    """
    if torch.get_default_device().type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield
