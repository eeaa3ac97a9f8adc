"""Second moments, or any other tensor for each parameter, by the names on disk; converted when read."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from squisher_mergekit.models.checkpoint_names import CheckpointNames
from squisher_mergekit.tensors.lazy import MaybeLazy, parts, read, unverified
from squisher_mergekit.tensors.safetensors import TensorInfo


@dataclass(frozen=True)
class Recipe:
    """How a stored tensor is made: ``sources``, names in memory; ``key``, what the conversion of these calls it."""

    key: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class MomentStore:
    """A :class:`~squisher_mergekit.tensors.safetensors.TensorStore` over an optimizer's state.

    ``moments``: name in memory -> tensor. ``recipes``: name on disk -> how it is made of them. ``verify``: holds the
    bytes of a mapped tensor against their checksum.
    """

    location: str
    moments: Mapping[str, MaybeLazy]
    recipes: Mapping[str, Recipe]
    infos: Mapping[str, TensorInfo]
    checkpoint_names: CheckpointNames | None
    verify: Callable[[Tensor], None]
    # The conversion read last: the many experts of one packed tensor are asked for one after the other.
    _last: dict[tuple[str, ...], Mapping[str, Tensor]] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        recipe = self.recipes[name]
        if self.checkpoint_names is None:
            return self._moment(recipe.key)
        converted = self._last.get(recipe.sources)
        if converted is None:
            converted = self.checkpoint_names.convert({source: self._moment(source) for source in recipe.sources})
            self._last.clear()
            self._last[recipe.sources] = converted
        return converted[recipe.key]

    def _moment(self, name: str) -> Tensor:
        stored = self.moments[name]
        for part in parts(stored):
            self.verify(part)
        return read(stored)


def store_moments(
    location: str,
    moments: Mapping[str, MaybeLazy],
    checkpoint_names: CheckpointNames | None,
    weights: Collection[str],
    verify: Callable[[Tensor], None] = unverified,
) -> MomentStore:
    """Arrange second moments by their names on disk.

    Args:
        location: For messages.
        moments: Name in memory -> second moment.
        checkpoint_names: The model that these are parameters of; None if the names are those on disk.
        weights: The names in the weights, if known: of the names of a tied tensor, the one found there is taken.
        verify: Holds the bytes of a mapped tensor against their checksum.
    """
    recipes, infos = {}, {}
    if checkpoint_names is None:
        recipes = {name: Recipe(name, (name,)) for name in moments}
        shapes: Mapping[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in moments.items()}
    else:
        others: dict[str, list[str]] = {}
        for alias, kept in checkpoint_names.aliases.items():
            others.setdefault(kept, []).append(alias)
        order = {name: number for number, name in enumerate(moments)}
        ready = [
            key for key, sources in checkpoint_names.sources.items() if all(source in moments for source in sources)
        ]
        for key in sorted(ready, key=lambda key: order[checkpoint_names.sources[key][0]]):
            names = [key, *others.get(key, [])]
            recipes[next((name for name in names if name in weights), key)] = Recipe(key, checkpoint_names.sources[key])
        shapes = checkpoint_names.shapes
    for name, recipe in recipes.items():
        shape, dtype = shapes[recipe.key], moments[recipe.sources[0]].dtype
        size = dtype.itemsize
        for length in shape:
            size *= length
        infos[name] = TensorInfo(shape, dtype, size)
    return MomentStore(location, moments, recipes, infos, checkpoint_names, verify)
