"""Report of a pruning, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from squisher_mergekit.applications.masks import Mask
from squisher_mergekit.applications.pruning.recipe import PruningRecipe
from squisher_mergekit.applications.selection import SelectionPlan


@dataclass(frozen=True)
class PrunedLayer:
    """Number of kept entries of one tensor.

    Attributes:
        name: Name on disk.
        shape: Shape of the tensor.
        kept: Number of entries that are kept.
    """

    name: str
    shape: tuple[int, ...]
    kept: int

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """Share of the entries that is 0."""
        return 1 - self.kept / self.entries if self.entries else 0.0


@dataclass(frozen=True)
class PruningReport:
    """Result of a pruning.

    Attributes:
        recipe: The options.
        layers: The candidate tensors.
        ignored: Name -> reason, for tensors that stay unchanged.
        entries: Number of entries of the whole model.
        mask: Masks by name in ``model.safetensors``.
        differs: Difference from the weights at which the Fisher was made, in words; None if equal or unknown.
    """

    recipe: PruningRecipe
    layers: tuple[PrunedLayer, ...]
    ignored: Mapping[str, str]
    entries: int
    mask: Mask
    differs: str | None = None

    @property
    def over_all(self) -> PrunedLayer:
        """Sum of the candidate tensors, as one tensor."""
        shape = (sum(layer.entries for layer in self.layers),)
        return PrunedLayer("chosen from", shape, sum(layer.kept for layer in self.layers))

    @property
    def sparsity(self) -> float:
        """Share of the candidate entries that is 0."""
        return self.over_all.sparsity

    @property
    def sparsity_of_model(self) -> float:
        """Share of the whole model that was pruned."""
        return (self.over_all.entries - self.over_all.kept) / self.entries

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "recipe": self.recipe.metadata(),
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


def make_report(
    recipe: PruningRecipe, plan: SelectionPlan, kept: Mapping[str, int], mask: Mask, differs: str | None = None
) -> PruningReport:
    """Return the report of a pruning.

    Args:
        recipe: The options.
        plan: The plan.
        kept: Name -> number of kept entries.
        mask: The masks.
        differs: Difference from the weights at which the Fisher was made, see :class:`PruningReport`.
    """
    layers = tuple(PrunedLayer(name, plan.shapes[name], kept[name]) for name in plan.sizes)
    return PruningReport(recipe, layers, plan.outside, sum(map(math.prod, plan.shapes.values())), mask, differs)
