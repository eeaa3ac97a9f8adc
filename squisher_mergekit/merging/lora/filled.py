"""Fisher of a base with a LoRA, with F also for layers that this LoRA left alone and another one changed.

F of such a layer is unknown, not 0: the model kept W0 there because nothing trained it. It gets one value, the mean of
the model's lifted F over the layers of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch

from squisher_mergekit.fisher.config import Scaling
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.summary import kind_of
from squisher_mergekit.tensors.safetensors import TensorInfo

_Kind = tuple[str, str, int]


class FilledFisher(Fisher):
    """Fisher that has one value for each further layer of a kind that it knows.

    Its mean and norm, and thus ``normalize:``, are those of the known layers alone.

    Args:
        known: The Fisher of the layers that the LoRA changed.
        shapes: Name -> shape of all weights of the base.

    Attributes:
        fills: Names of the layers with one value.
    """

    def __init__(self, known: Fisher, shapes: Mapping[str, tuple[int, ...]]) -> None:
        kinds: dict[_Kind, list[str]] = {}
        for name in known:
            kinds.setdefault(_kind(name, len(known.info(name).shape)), []).append(name)
        members = {
            name: kinds[kind]
            for name, shape in shapes.items()
            if name not in known and (kind := _kind(name, len(shape))) in kinds
        }
        self.fills = frozenset(members)
        self._known = known
        infos = {name: TensorInfo(shapes[name], torch.float32, 0) for name in members}
        super().__init__(_FilledStore(known, infos, members), known.config, known.aliases, known.factors)

    def moments(self, scaling: Scaling = "debiased") -> tuple[float, float]:
        """Return the mean and L2 norm over the entries of the known layers."""
        return self._known.moments(scaling)


class _FilledStore:
    """Store of the tensors of a Fisher, and of constant ones."""

    def __init__(self, known: Fisher, infos: Mapping[str, TensorInfo], members: Mapping[str, list[str]]) -> None:
        self.location = known.location
        self.infos = {name: known.info(name) for name in known} | dict(infos)
        self._known, self._members = known, members
        self._mean: Callable[[tuple[str, ...]], float] = cache(self._mean_over)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        if name not in self._members:
            return self._known[name]
        return torch.full(self.infos[name].shape, self._mean(tuple(self._members[name])), dtype=torch.float32)

    def _mean_over(self, names: tuple[str, ...]) -> float:
        """Return the mean over the entries of some tensors, in float64."""
        total, count = 0.0, 0
        for name in names:
            parts = self._known.kept_parts(name)
            size = self._known[name].numel() if parts is None else len(parts[".row"]) * len(parts[".col"])
            part = self._known[name] if parts is None else parts[".row"]
            total, count = total + part.mean(dtype=torch.float64).item() * size, count + size
        return total / count


def _kind(name: str, axes: int) -> _Kind:
    """Return the kind of a layer's tensor: weights and biases of one layer differ."""
    return kind_of(name), name.rpartition(".")[2], axes
