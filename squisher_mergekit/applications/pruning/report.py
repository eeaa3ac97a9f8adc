"""What pruning did, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from squisher_mergekit.applications.masks import Mask
from squisher_mergekit.applications.pruning.recipe import Plan, Recipe


@dataclass(frozen=True)
class Layer:
    """How much of one tensor is kept."""

    name: str
    shape: tuple[int, ...]
    kept: int

    @property
    def entries(self) -> int:
        """How many entries it has."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """The share that is 0."""
        return 1 - self.kept / self.entries if self.entries else 0.0


@dataclass(frozen=True)
class Report:
    """What was pruned.

    ``layers``: the tensors chosen from. ``ignored``: name -> why not. ``entries``: of the whole model. ``mask``: by the
    names in ``model.safetensors``. ``differs``: how the weights differ from those that the Fisher was made at.
    """

    recipe: Recipe
    layers: tuple[Layer, ...]
    ignored: Mapping[str, str]
    entries: int
    mask: Mask
    differs: str | None = None

    @property
    def over_all(self) -> Layer:
        """All that was chosen from, as if it were one tensor."""
        shape = (sum(layer.entries for layer in self.layers),)
        return Layer("chosen from", shape, sum(layer.kept for layer in self.layers))

    @property
    def sparsity(self) -> float:
        """The share of the entries chosen from that is 0."""
        return self.over_all.sparsity

    @property
    def sparsity_of_model(self) -> float:
        """The share of the whole model that was pruned."""
        return (self.over_all.entries - self.over_all.kept) / self.entries

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {
            "recipe": self.recipe.about(),
            "sparsity": self.sparsity,
            "sparsity_of_model": self.sparsity_of_model,
            "entries": self.entries,
            "chosen_from": self.over_all.entries,
            "kept": self.over_all.kept,
            "layers": {
                layer.name: asdict(layer) | {"entries": layer.entries, "sparsity": layer.sparsity}
                for layer in self.layers
            },
            "ignored": dict(self.ignored),
            "fisher_differs": self.differs,
        }


def make_report(plan: Plan, kept: Mapping[str, int], mask: Mask, differs: str | None = None) -> Report:
    """Put together what was pruned.

    Args:
        plan: What was chosen from.
        kept: Name -> how many entries are kept.
        mask: The masks.
        differs: See :class:`Report`.
    """
    layers = tuple(Layer(name, plan.shapes[name], kept[name]) for name in plan.sizes)
    return Report(plan.recipe, layers, plan.ignored, sum(map(math.prod, plan.shapes.values())), mask, differs)
