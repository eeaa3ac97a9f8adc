"""Checks, from headers alone, that a Fisher fits given weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.fingerprint import difference
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.tensors.safetensors import TensorInfo, check_shape, resized_rows

LOG = logging.getLogger("squisher_mergekit")


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


class _MoreRows:
    """Store of a Fisher with new rows at the end of some tensors, in which F is 0."""

    def __init__(self, fisher: Fisher, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._fisher = fisher
        self._shapes = shapes
        self.location = fisher.location
        self.infos = {name: self._info(name) for name in fisher}

    def _info(self, name: str) -> TensorInfo:
        info = self._fisher.info(name)
        shape = self._shapes.get(name, info.shape)
        return replace(info, shape=shape, nbytes=math.prod(shape) * info.dtype.itemsize)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, with its new rows."""
        stored = self._fisher[name]
        shape = self._shapes.get(name)
        if shape is None:
            return stored
        rows = (shape[0] - stored.shape[0], *shape[1:])
        return torch.cat([stored, stored.new_full(rows, self._fisher.offset(name))])


def with_new_rows(fisher: Fisher, weights: Weights) -> Fisher:
    """Return a Fisher that fits embeddings which were enlarged after training: F is 0 in the new rows.

    Args:
        fisher: The Fisher of the smaller embeddings.
        weights: The weights; any other difference of shapes leaves the Fisher unchanged.
    """
    pairs = {n: (fisher.info(n).shape, weights.infos[n].shape) for n in fisher if n in weights.infos}
    rows = resized_rows(pairs.values())
    if rows is None or rows[0] >= rows[1]:
        return fisher
    LOG.warning(
        "%s: the embeddings of %s were resized from %d to %d rows after training; the new rows count as unseen (F = 0)",
        fisher.location,
        weights.folder,
        *rows,
    )
    enlarged = {name: after for name, (before, after) in pairs.items() if before != after}
    return Fisher(_MoreRows(fisher, enlarged), fisher.config, fisher.aliases)


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
    return difference(fisher.config.weights_fingerprint, weights.fingerprint)
