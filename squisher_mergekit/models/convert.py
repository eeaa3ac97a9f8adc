"""Store of one tensor per parameter, such as second moments, under the names on disk; converted when read."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.models.names import CheckpointNames
from squisher_mergekit.models.parameters import describe
from squisher_mergekit.tensors.lazy import MaybeLazy, in_memory, read, unverified
from squisher_mergekit.tensors.safetensors import MemoryStore, TensorInfo, TensorStore


@dataclass(frozen=True)
class Conversion:
    """Origin of a tensor on disk.

    Attributes:
        key: Name of the tensor in the result of :attr:`CheckpointNames.convert`.
        sources: Names in memory of the parameters that it is converted from.
    """

    key: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class MomentStore:
    """Store of second moments: a :class:`~squisher_mergekit.tensors.safetensors.TensorStore` over optimizer state.

    Attributes:
        location: File or folder of the state, for messages.
        moments: Name in memory -> second moment.
        conversions: Name on disk -> origin of the tensor.
        infos: Name on disk -> header of the tensor.
        checkpoint_names: The model's names; None if the names in memory are those on disk.
        verify: Function that returns a mapped tensor in memory, with its checksum verified.
    """

    location: str
    moments: Mapping[str, MaybeLazy]
    conversions: Mapping[str, Conversion]
    infos: Mapping[str, TensorInfo]
    checkpoint_names: CheckpointNames | None
    verify: Callable[[Tensor], Tensor]
    # The last conversion, as callers read the many experts of one packed tensor one after another.
    _last: dict[tuple[str, ...], Mapping[str, Tensor]] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        origin = self.conversions[name]
        if self.checkpoint_names is None:
            return self._moment(origin.key)
        converted = self._last.get(origin.sources)
        if converted is None:
            converted = self.checkpoint_names.convert({source: self._moment(source) for source in origin.sources})
            self._last.clear()
            self._last[origin.sources] = converted
        return converted[origin.key]

    def _moment(self, name: str) -> Tensor:
        return read(in_memory(self.moments[name], self.verify))


def store_moments(
    location: str,
    moments: Mapping[str, MaybeLazy],
    checkpoint_names: CheckpointNames | None,
    weights: Collection[str],
    verify: Callable[[Tensor], Tensor] = unverified,
) -> MomentStore:
    """Store second moments under their names on disk.

    Args:
        location: File or folder of the state, for messages.
        moments: Name in memory -> second moment.
        checkpoint_names: The model's names; None if the names in memory are those on disk.
        weights: Names in the weights, if known: of the names of a tied tensor, the one found there is taken.
        verify: Function that returns a mapped tensor in memory, with its checksum verified.
    """
    conversions, infos = {}, {}
    if checkpoint_names is None:
        conversions = {name: Conversion(name, (name,)) for name in moments}
        shapes: Mapping[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in moments.items()}
    else:
        others: dict[str, list[str]] = {}
        for alias, saved_as in checkpoint_names.aliases.items():
            others.setdefault(saved_as, []).append(alias)
        order = {name: number for number, name in enumerate(moments)}
        ready = [
            key for key, sources in checkpoint_names.sources.items() if all(source in moments for source in sources)
        ]
        for key in sorted(ready, key=lambda key: order[checkpoint_names.sources[key][0]]):
            tied = [key, *others.get(key, [])]
            name = next((name for name in tied if name in weights), key)
            conversions[name] = Conversion(key, checkpoint_names.sources[key])
        shapes = checkpoint_names.shapes
    for name, origin in conversions.items():
        shape, dtype = shapes[origin.key], moments[origin.sources[0]].dtype
        size = dtype.itemsize
        for length in shape:
            size *= length
        infos[name] = TensorInfo(shape, dtype, size)
    return MomentStore(location, moments, conversions, infos, checkpoint_names, verify)


def unchanged_matrices(names: CheckpointNames | None, stored: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return name in memory -> name on disk of the matrices that are saved as they are: no part, transpose or order.

    Args:
        names: The model's names; None if the names in memory are those on disk.
        stored: Name on disk -> shape of the tensors asked for.
    """
    matrices = {name: shape for name, shape in stored.items() if len(shape) == 2}
    if names is None:
        return {name: name for name in matrices}
    other = {saved: alias for alias, saved in names.aliases.items() if alias in matrices}
    found = {}
    for key, sources in names.sources.items():
        name = key if key in matrices else other.get(key)
        if name is not None and len(sources) == 1 and _is_unchanged(names, sources[0], key, matrices[name]):
            found[sources[0]] = name
    return found


def _is_unchanged(names: CheckpointNames, source: str, key: str, shape: tuple[int, ...]) -> bool:
    """Return True if the conversion moves no entry of a matrix; views of two vectors stand for the matrix."""
    if source == key and names.shapes[key] == shape:
        return True
    indices = tuple(
        torch.arange(size, device="cpu").reshape(view).expand(shape)
        for size, view in zip(shape, ((-1, 1), (1, -1)), strict=True)
    )
    moved = [names.convert({source: index}).get(key) for index in indices]
    return all(
        after is not None and after.shape == shape and torch.equal(after, before)
        for after, before in zip(moved, indices, strict=True)
    )


def disk_store(model: nn.Module, tensors: Mapping[str, Any]) -> tuple[TensorStore, Mapping[str, str], bool]:
    """Arrange tensors of a model in memory by their names on disk.

    Args:
        model: The model, wrapped or not.
        tensors: Name in memory -> tensor.

    Returns:
        The store, alias -> name in the store of tied tensors, and True for an adapter.
    """
    described = describe(model)
    if described.adapter is not None:
        return MemoryStore({described.adapter[name]: tensor for name, tensor in tensors.items()}), {}, True
    names = described.checkpoint_names
    store = store_moments("memory", tensors, names, ())
    stored = {conversion.key: name for name, conversion in store.conversions.items()}
    aliases = {other: stored[name] for other, name in (names.aliases if names else {}).items() if name in stored}
    return store, aliases, False
