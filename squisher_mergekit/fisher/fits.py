"""Check by headers alone that a Fisher belongs to some weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.fingerprint import difference, fingerprint
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.tensors.safetensors import (
    TensorInfo,
    check_shape,
)


def check(fisher: Fisher, weights: dict[str, TensorInfo], folder: Path) -> None:
    """Hold names and shapes of a Fisher against the weights' headers, where there are weights.

    Raises:
        MismatchError: A name is not there, or a shape differs.
    """
    for name in fisher if weights else ():
        if name not in weights:
            raise MismatchError(
                f"the names of a Fisher must be those of the weights, but {name} in {fisher.location} is not in "
                f"{folder}; give the model that was trained"
            )
        check_shape(name, fisher.info(name).shape, weights[name].shape, fisher.location)


def check_fits(fisher: Fisher, weights: Weights, names: Iterable[str]) -> str | None:
    """Hold a Fisher against weights by headers alone.

    Args:
        fisher: Made at these weights, or at others of the same model.
        weights: The weights.
        names: The tensors that it has to cover.

    Returns:
        What differs from the weights it was made at; None if nothing does or that is unknown.

    Raises:
        MismatchError: It lacks one, it names one that the weights lack, or a shape differs.
    """
    for name in names:
        if name not in fisher:
            raise MismatchError(
                f"a Fisher must cover every tensor that is chosen from, but {fisher.location} lacks {name} of "
                f"{weights.folder} ({fisher.config.coverage.without.get(name, 'not in it')}); give a Fisher that has "
                "it, or leave the tensor out"
            )
    for name in fisher:
        same = (name, *(alias for alias, kept in fisher.aliases.items() if kept == name))
        found = next((one for one in same if one in weights.infos), None)
        if found is None:
            raise MismatchError(
                f"the names of a Fisher must be those of the weights, but {name} in {fisher.location} is not in "
                f"{weights.folder}; give the Fisher of this model"
            )
        check_shape(name, fisher.info(name).shape, weights.infos[found].shape, fisher.location)
    return difference(fisher.config.weights_fingerprint, fingerprint(weights.folder))
