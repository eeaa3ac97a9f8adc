"""Checks, from headers alone, that a Fisher fits given weights."""

from __future__ import annotations

from collections.abc import Iterable

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.tensors.safetensors import check_shape

_Tensor = tuple[str, tuple[int, ...]]  # name and shape


def check_headers(fisher: Fisher, weights: Weights) -> None:
    """Check the names and shapes of a Fisher against the headers of weights.

    Args:
        fisher: The Fisher.
        weights: The weights; a folder without weights checks nothing.

    Raises:
        MismatchError: A name is not in the weights, or a shape differs.
    """
    for name in fisher if weights.infos else ():
        if name not in weights.infos:
            raise MismatchError(
                f"the names of a Fisher must be those of the weights, but {name} in {fisher.location} is not in "
                f"{weights.folder}; give the model that was trained"
            )
        check_shape(name, fisher.info(name).shape, weights.infos[name].shape, fisher.location)


def check_base(fisher: Fisher, base: Weights) -> None:
    """Check from headers that a base is a model of the Fisher's architecture.

    One common tensor suffices: a head may be new, a vocabulary larger, and a bare model saves names without the prefix
    that a model with a head adds.

    Args:
        fisher: The Fisher.
        base: The model before training, or a folder with its ``config.json``; one with neither checks nothing.

    Raises:
        MismatchError: No tensor of the Fisher has name and shape of one in the base.
    """
    shapes: dict[str, tuple[int, ...]] = {name: info.shape for name, info in base.infos.items()}
    if not shapes and base.outline is not None:
        shapes = dict(base.outline[1].shapes)
    if not shapes or not fisher:
        return
    found = [(name, fisher.info(name).shape) for name in fisher]
    if _share(shapes.items(), found) or _share(_bare(shapes.items()), found) or _share(shapes.items(), _bare(found)):
        return
    name, shape = next(((name, shape) for name, shape in found if name in shapes), found[0])
    # A Fisher of a new head alone lists frozen tensors that the base knows.
    if name not in shapes and not shapes.keys().isdisjoint(fisher.config.coverage.without):
        return
    theirs = f"has {list(shapes[name])}" if name in shapes else "has no such tensor"
    raise MismatchError(
        f"the base must be the model before training, but no tensor of {fisher.location} is in {base.folder} with its "
        f"shape: {name} is {list(shape)}, and the base {theirs}; give the model that the training began with, or leave "
        "the base out"
    )


def _share(some: Iterable[_Tensor], others: Iterable[_Tensor]) -> bool:
    return not set(some).isdisjoint(others)


def _bare(tensors: Iterable[_Tensor]) -> Iterable[_Tensor]:
    """Yield tensors under their names without the first part."""
    return ((name.partition(".")[2], shape) for name, shape in tensors)


def check_fits(fisher: Fisher, weights: Weights, names: Iterable[str]) -> str | None:
    """Check the coverage, names, shapes and fingerprint of a Fisher against weights.

    Args:
        fisher: The Fisher, made at these weights or at others of the same model.
        weights: The weights.
        names: The tensors that the Fisher must cover.

    Returns:
        The difference from the weights at which the Fisher was made, in words; None if they are equal or unknown.

    Raises:
        MismatchError: The Fisher lacks one of ``names``, has a name that the weights lack, or a shape differs.
    """
    for name in names:
        if name not in fisher:
            raise MismatchError(
                f"a Fisher must cover every tensor that is chosen from, but {fisher.location} lacks {name} of "
                f"{weights.folder} ({fisher.config.coverage.without.get(name, 'not in it')}); give a Fisher that has "
                "it, or leave the tensor out"
            )
    for name in fisher:
        tied = (name, *(alias for alias, kept in fisher.aliases.items() if kept == name))
        stored = next((alias for alias in tied if alias in weights.infos), None)
        if stored is None:
            raise MismatchError(
                f"the names of a Fisher must be those of the weights, but {name} in {fisher.location} is not in "
                f"{weights.folder}; give the Fisher of this model"
            )
        check_shape(name, fisher.info(name).shape, weights.infos[stored].shape, fisher.location)
    return weights.difference_from(fisher.config.weights_fingerprint)
