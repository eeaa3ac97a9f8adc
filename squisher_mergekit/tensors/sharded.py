"""Tensors sharded over processes: detection, gathering, and work on rank 0 that gathers them one by one."""

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
    """Return True for a DTensor, of which each rank holds a shard."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """Return a whole tensor as it is, and gather a sharded one; all ranks must call this together."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def distributed_like(tensor: Tensor, like: Any, dtype: torch.dtype) -> Tensor:
    """Return a tensor with the device and the sharding of another.

    Args:
        tensor: A whole tensor, or one sharded as ``like`` is.
        like: The tensor that gives device and sharding.
        dtype: Dtype of the result.
    """
    moved = tensor.detach().to(like.device, dtype)
    if not is_sharded(like) or is_sharded(tensor):
        return moved
    from torch.distributed.tensor import distribute_tensor

    distributed: Tensor = distribute_tensor(moved, like.device_mesh, like.placements)
    return distributed


def sum_over_processes(total: Tensor, device: torch.device) -> None:
    """Sum a tensor over all processes in place, on the device that they communicate by."""
    part = total.to(device)
    dist.all_reduce(part)
    if part is not total:
        total.copy_(part)


def sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules whose parameters FSDP2 shards."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a module that was not imported shards nothing
    return [module for module in model.modules() if fsdp is not None and isinstance(module, fsdp.FSDPModule)]


def rank() -> int:
    """Return the rank of this process; 0 outside a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class OnRankZero:
    """Function run on rank 0 while the other ranks serve gathers of their shards.

    All ranks make one of these with the same tensors in the same order, and call :meth:`run`. One tensor at a time is
    whole, on rank 0 alone; the other ranks answer the gathers that rank 0 asks for, in any order.
    """

    def __init__(self) -> None:
        self.tensors: list[Any] = []

    def add(self, tensor: Tensor) -> GatheredOnRead:
        """Return a lazy tensor that is gathered when rank 0 reads it."""
        self.tensors.append(tensor)
        return GatheredOnRead(tensor, len(self.tensors) - 1, self)

    def gather(self, number: int) -> Tensor:
        """Gather a tensor on the CPU; called on rank 0, within :meth:`run`."""
        dist.broadcast_object_list([number], src=0)
        return gathered(self.tensors[number]).detach().cpu()

    def run(self, work: Callable[[], T]) -> T | None:
        """Call a function on rank 0, and serve its gathers on the others.

        Args:
            work: The function; it may read the lazy tensors that :meth:`add` returned.

        Returns:
            The function's result on rank 0; None on the other ranks.

        Raises:
            SquisherError: On the other ranks, if the function failed on rank 0.
        """
        if rank() != 0:
            self._serve_gathers()
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

    def _serve_gathers(self) -> None:
        while self.tensors:
            request: list[Any] = [None]
            dist.broadcast_object_list(request, src=0)
            if isinstance(request[0], int):
                self.tensors[request[0]].full_tensor()
            elif request[0]:
                raise SquisherError(f"the first process could not write the Fisher: {request[0]}")
            else:
                return


@dataclass(frozen=True)
class GatheredOnRead:
    """Sharded tensor as a :class:`~squisher_mergekit.tensors.lazy.LazyTensor`, gathered when rank 0 reads it.

    Attributes:
        tensor: The sharded tensor.
        number: Its number in ``on_rank_zero``.
        on_rank_zero: The function run that gathers it.
    """

    tensor: Any
    number: int
    on_rank_zero: OnRankZero

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor."""
        return torch.Size(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the entries."""
        dtype: torch.dtype = self.tensor.dtype
        return dtype

    @property
    def parts(self) -> Sequence[Tensor]:
        """The shard of this rank."""
        return (self.tensor.to_local(),)

    def read(self) -> Tensor:
        """Return the whole tensor, on the CPU."""
        return self.on_rank_zero.gather(self.number)
