"""The second moments of an optimizer's file under the names of the weights, converted when read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from squisher_mergekit.fisher.mapping import TensorInfo
from squisher_mergekit.optimizers.skeleton import Skeleton


@dataclass(frozen=True)
class MomentStore:
    """A :class:`~squisher_mergekit.fisher.mapping.TensorStore` over mapped tensors of an optimizer's file.

    ``moments``: name in memory -> tensor. ``sources``: name on disk -> names in memory. One tensor is read at a time.
    """

    location: str
    moments: Mapping[str, Tensor]
    sources: Mapping[str, tuple[str, ...]]
    infos: Mapping[str, TensorInfo]
    skeleton: Skeleton | None

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        sources = self.sources[name]
        if self.skeleton is None or sources == (name,):
            return self.moments[name]
        return self.skeleton.convert({source: self.moments[source] for source in sources})[name]


def store_moments(location: str, moments: Mapping[str, Tensor], skeleton: Skeleton | None) -> MomentStore:
    """Arrange second moments by their names on disk.

    Args:
        location: For messages.
        moments: Name in memory -> second moment.
        skeleton: The model, if known; names that are none of its parameters are taken to be names on disk.
    """
    sources: dict[str, tuple[str, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    named = skeleton is not None and all(name in {p.name for p in skeleton.parameters} for name in moments)
    if skeleton is not None and named:
        for name, needed in skeleton.sources.items():
            if all(source in moments for source in needed):
                sources[name], shapes[name] = needed, skeleton.stored_shapes[name]
    else:
        sources = {name: (name,) for name in moments}
        shapes = {name: tuple(tensor.shape) for name, tensor in moments.items()}
    infos: dict[str, Any] = {}
    for name, needed in sources.items():
        dtype = moments[needed[0]].dtype
        size = 1
        for length in shapes[name]:
            size *= length
        infos[name] = TensorInfo(shapes[name], dtype, size * dtype.itemsize)
    return MomentStore(location, moments, sources, infos, skeleton if named else None)
