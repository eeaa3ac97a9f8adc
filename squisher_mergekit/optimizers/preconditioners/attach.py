"""Factors of a Fisher from the slots of Shampoo and SOAP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from squisher_mergekit.fisher.config import FactorsInfo
from squisher_mergekit.fisher.factors.mapping import SIDES, Factors, factors_over
from squisher_mergekit.models.convert import MomentStore, unchanged_matrices
from squisher_mergekit.optimizers.slots import OptimizerSlot
from squisher_mergekit.tensors.lazy import MaybeLazy, in_memory, read
from squisher_mergekit.tensors.safetensors import TensorInfo


@dataclass(frozen=True)
class _FactorStore:
    """Store of factors, whole ones as one block each, verified and brought to the CPU as they are read.

    Attributes:
        location: File or folder of the state, for messages.
        matrices: Name -> factor, ``[n, n]`` or ``[blocks, b, b]``.
        verify: Function that verifies the checksum of a mapped tensor's bytes.
    """

    location: str
    matrices: Mapping[str, MaybeLazy]
    verify: Callable[[Tensor], Tensor]

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Name -> header."""
        return {
            name: TensorInfo(_in_blocks(factor.shape), _dtype(factor), factor.shape.numel() * _dtype(factor).itemsize)
            for name, factor in self.matrices.items()
        }

    def read(self, name: str) -> Tensor:
        """Return one factor."""
        factor = read(in_memory(self.matrices[name], self.verify)).detach()
        return factor.to("cpu", _dtype(factor), copy=True).reshape(_in_blocks(factor.shape))


def _in_blocks(shape: torch.Size) -> tuple[int, ...]:
    """Return the shape of a factor in blocks."""
    return (1, *shape) if len(shape) == 2 else tuple(shape)


def _dtype(factor: MaybeLazy) -> torch.dtype:
    return torch.bfloat16 if factor.dtype == torch.bfloat16 else torch.float32


def factors_of(slots: Mapping[str, OptimizerSlot], store: MomentStore) -> Factors | None:
    """Return the factors of matrices that are saved as they are; None if the optimizer has none.

    Args:
        slots: Name in memory -> slot.
        store: The second moments by name on disk.
    """
    with_factors = {name: slot for name, slot in slots.items() if any(f is not None for f in slot.factors)}
    if not with_factors:
        return None
    shapes = {name: info.shape for name, info in store.infos.items()}
    names = unchanged_matrices(store.checkpoint_names, shapes)
    matrices: dict[str, MaybeLazy] = {}
    taken: dict[str, list[str]] = {side: [] for side in SIDES}
    used = []
    for name, slot in with_factors.items():
        if name not in names:
            continue
        used.append(slot)
        for side, factor in zip(SIDES, slot.factors, strict=True):
            if factor is not None:
                matrices[f"{names[name]}.{side}"] = factor
                taken[side].append(names[name])
    if not used:
        return None
    kinds = [kind for slot in used if (kind := slot.of_factors or slot.moment) is not None]
    decays, steps, initial = {kind.decay for kind in kinds}, {slot.steps for slot in used}, used[0].initial
    info = FactorsInfo(
        source="optimizer",
        statistic=kinds[0].statistic,
        rows=tuple(taken["rows"]),
        columns=tuple(taken["columns"]),
        decay=decays.pop() if len(decays) == 1 else None,
        steps=steps.pop() if len(steps) == 1 else None,
        initial=initial or None,
    )
    return factors_over(_FactorStore(store.location, matrices, store.verify), info, shapes)
