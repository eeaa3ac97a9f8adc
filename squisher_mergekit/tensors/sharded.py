"""Tensors that several processes hold in parts: where they lie, and how the first process gathers them one by one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from squisher_mergekit.errors import SquisherError

T = TypeVar("T")


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor is a DTensor, of which this process holds a part."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor as it is, or gathered from all processes if it is sharded; they must all ask for it."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def distributed_like(tensor: Tensor, like: Any, dtype: torch.dtype) -> Tensor:
    """Return a tensor on the device of another; of a sharded one the part of this process, of a whole tensor.

    Args:
        tensor: Whole, or sharded as ``like`` is.
        like: Where it is to lie.
        dtype: What to convert it to.
    """
    moved = tensor.detach().to(like.device, dtype)
    if not is_sharded(like) or is_sharded(tensor):
        return moved
    from torch.distributed.tensor import distribute_tensor

    distributed: Tensor = distribute_tensor(moved, like.device_mesh, like.placements)
    return distributed


def sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules whose parameters FSDP2 holds in parts."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing is sharded by what was not imported
    return [module for module in model.modules() if fsdp is not None and isinstance(module, fsdp.FSDPModule)]


def rank() -> int:
    """Return the number of this process; 0 where there is one alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class OnRankZero:
    """Work for the first process, in which the others take part by their shares of sharded tensors.

    All processes make one with the same tensors in the same order and call :meth:`run`. Whole is only one tensor at a
    time, and what the first process does with it is its own affair: the others follow its questions.
    """

    def __init__(self) -> None:
        self.tensors: list[Any] = []

    def add(self, tensor: Tensor) -> Sharded:
        """Return a form of a sharded tensor that is gathered when the first process reads it."""
        self.tensors.append(tensor)
        return Sharded(tensor, len(self.tensors) - 1, self)

    def gather(self, number: int) -> Tensor:
        """Ask for a tensor; for the first process, within :meth:`run`."""
        dist.broadcast_object_list([number], src=0)
        return gathered(self.tensors[number]).detach().cpu()

    def run(self, work: Callable[[], T]) -> T | None:
        """Do the work in the first process.

        Args:
            work: What may read the forms that :meth:`add` gave.

        Returns:
            What the work returns; None in the other processes.

        Raises:
            SquisherError: In the other processes, if the work failed in the first.
        """
        if rank() != 0:
            self._follow()
            return None
        message = "it was stopped"
        try:
            result = work()
            message = ""
            return result
        except Exception as error:
            message = str(error) or type(error).__name__
            raise
        finally:
            if self.tensors:
                dist.broadcast_object_list([message], src=0)

    def _follow(self) -> None:
        while self.tensors:
            asked: list[Any] = [None]
            dist.broadcast_object_list(asked, src=0)
            if isinstance(asked[0], int):
                self.tensors[asked[0]].full_tensor()
            elif asked[0]:
                raise SquisherError(f"the first process could not write the Fisher: {asked[0]}")
            else:
                return


@dataclass(frozen=True)
class Sharded:
    """A sharded tensor as a form of a second moment (see ``optimizers.values``)."""

    tensor: Any
    number: int
    on_rank_zero: OnRankZero

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        return torch.Size(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        dtype: torch.dtype = self.tensor.dtype
        return dtype

    @property
    def parts(self) -> Sequence[Tensor]:
        """What this process holds."""
        return (self.tensor.to_local(),)

    def read(self) -> Tensor:
        """Return the whole, on the CPU."""
        return self.on_rank_zero.gather(self.number)
