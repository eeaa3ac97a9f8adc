"""Patching of models on disk: a difference applied to the base, or removed from the trained model, bit for bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from squisher_mergekit.applications.fish_mask.bases import under_names
from squisher_mergekit.applications.fish_mask.difference import Difference, Side, bits_of, read_difference
from squisher_mergekit.errors import MismatchError
from squisher_mergekit.models.weights import Weights, check_out, copy_rest, open_weights
from squisher_mergekit.tensors.atomic import written_beside
from squisher_mergekit.tensors.input_files import expanded
from squisher_mergekit.tensors.safetensors import tensor_infos
from squisher_mergekit.tensors.writer import SafetensorsWriter, header_room

LOG = logging.getLogger("squisher_mergekit")


def apply_files(
    base: str | Path, difference: str | Path, out: str | Path, *, strict: bool = False, progress: bool = False
) -> None:
    """Apply a difference to its base, which gives the trained model.

    Args:
        base: A folder with ``model.safetensors`` or its shards, or a Hub id ``org/name[@revision]``.
        difference: ``difference.safetensors``, or a folder with it.
        out: The folder to make; new or empty. It gets the config of the trained model and the tokenizer of the base.
        strict: Refuse a base with another fingerprint, instead of a warning: its values may differ where the difference
            changes nothing.
        progress: Show a progress bar.

    Raises:
        MismatchError: Names or shapes are not those of the base, or a value to change differs.
        ConfigError: ``out`` is not empty.
        RefusedError: A source cannot be read. After any error ``out`` does not exist.

    Example:
        >>> apply_files("nowhere/at/all", "difference.safetensors", "out")
        Traceback (most recent call last):
        squisher_mergekit.errors.NotFoundError: ...
    """
    _turn("BASE", base, difference, out, "tuned", strict, progress)


def remove_files(
    model: str | Path, difference: str | Path, out: str | Path, *, strict: bool = False, progress: bool = False
) -> None:
    """Remove a difference from its trained model, which gives the base.

    Args:
        model: A folder with ``model.safetensors`` or its shards, or a Hub id ``org/name[@revision]``.
        difference: ``difference.safetensors``, or a folder with it.
        out: The folder to make; new or empty. It gets the config of the base and the tokenizer of the model.
        strict: As for :func:`apply_files`.
        progress: Show a progress bar.

    Raises:
        RefusedError: As for :func:`apply_files`.

    Example:
        >>> remove_files("nowhere/at/all", "difference.safetensors", "out")
        Traceback (most recent call last):
        squisher_mergekit.errors.NotFoundError: ...
    """
    _turn("MODEL", model, difference, out, "base", strict, progress)


def patched(tensors: Mapping[str, Tensor], difference: Difference, side: Side = "tuned") -> dict[str, Tensor]:
    """Return the tensors of the other model of a difference.

    Args:
        tensors: All tensors of one model, by its names.
        difference: The difference.
        side: The model to return: ``tuned`` from the base's tensors, or ``base`` from the trained model's.

    Raises:
        MismatchError: A name is missing, or a value to change differs.
    """
    ours = _by_tuned(difference, side)
    names = {ours.get(name, name): name for name in tensors}
    _check_names(names, difference, side, "memory")
    turned = _turned(((name, tensors[key]) for name, key in names.items()), difference, side, "memory")
    theirs = _theirs(difference, side)
    return {theirs.get(name, name): tensor for name, tensor in turned} | {
        theirs.get(name, name): difference.read_whole(name, side) for name in _added(names, difference, side)
    }


def _turn(
    option: str, source: str | Path, difference: str | Path, out: str | Path, side: Side, strict: bool, progress: bool
) -> None:
    target, opened = expanded(out), read_difference(difference)
    check_out(target)
    weights = open_weights(source, option)
    if side == "tuned":
        weights = under_names(weights, opened.metadata.renamed or {})
    _check_names(weights.infos, opened, side, weights.folder)
    _check_fingerprint(weights, opened, side, strict)
    with (
        tqdm(weights.infos, desc="Writing", unit="tensor", disable=not progress, delay=2) as bar,
        written_beside(target) as folder,
    ):
        _write(weights, opened, side, folder, bar.update)
        copy_rest(weights, folder)
        _finish(weights, opened, side, folder)


def _write(weights: Weights, opened: Difference, side: Side, folder: Path, advance: Callable[[], object]) -> None:
    ours, theirs, added = _by_tuned(opened, side), _theirs(opened, side), _added(weights.infos, opened, side)
    for file, header in weights.headers.items():
        names = [ours.get(name, name) for name in header.infos]
        last = added if file == weights.files[-1] else []
        room = header_room([theirs.get(name, name) for name in (*names, *last)], notes=header.metadata)
        with SafetensorsWriter(folder / file.name, room) as writer:
            for key, value in header.metadata.items():
                writer.note(key, value)
            read = ((name, weights.read(name)) for name in names)
            for name, tensor in _turned(read, opened, side, weights.folder):
                writer.add(theirs.get(name, name), tensor)
                advance()
            for name in last:
                writer.add(theirs.get(name, name), opened.read_whole(name, side))


def _turned(
    tensors: Iterable[tuple[str, Tensor]], opened: Difference, side: Side, place: object
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the wanted model from those of the other, by the names of the trained model."""
    old, new = opened.whole(_other(side)), opened.whole(side)
    for name, tensor in tensors:
        if name in old:
            if not np.array_equal(bits_of(tensor), bits_of(opened.read_whole(name, _other(side)))):
                raise MismatchError(
                    f"{name} must be as in the {_other(side)} model of {opened.file}, but {place} has other values; "
                    f"give the {_other(side)} model that the difference was made from"
                )
            if name in new:
                yield name, opened.read_whole(name, side)
        elif opened.changes(name):
            yield name, opened.put(name, tensor, side, place)
        else:
            yield name, tensor


def _finish(weights: Weights, opened: Difference, side: Side, folder: Path) -> None:
    """Write the config of the wanted model, and the index of its shards."""
    config = getattr(opened.metadata, side)
    if config is not None:
        (folder / "config.json").write_text(config, encoding="utf-8")
    if len(weights.files) > 1:
        infos = {file.name: tensor_infos(folder / file.name) for file in weights.files}
        index = {
            "metadata": {"total_size": sum(info.nbytes for header in infos.values() for info in header.values())},
            "weight_map": {name: file for file, header in infos.items() for name in header},
        }
        (folder / f"{weights.stem}.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )


def _other(side: Side) -> Side:
    return "base" if side == "tuned" else "tuned"


def _by_tuned(opened: Difference, side: Side) -> dict[str, str]:
    """Return name in the source -> name in the trained model, where the two differ."""
    return {} if side == "base" else {base: tuned for tuned, base in (opened.metadata.renamed or {}).items()}


def _theirs(opened: Difference, side: Side) -> Mapping[str, str]:
    """Return name in the trained model -> name in the wanted model, where the two differ."""
    return (opened.metadata.renamed or {}) if side == "base" else {}


def _added(names: Iterable[str], opened: Difference, side: Side) -> list[str]:
    known = set(names)
    return [name for name in opened.whole(side) if name not in known]


def _check_names(names: Iterable[str], opened: Difference, side: Side, place: object) -> None:
    """Check the names of a model against those of a difference."""
    known, old = set(names), opened.whole(_other(side))
    missing = next((name for name in (*opened.changed, *old) if name not in known), None)
    if missing is not None:
        raise MismatchError(
            f"{missing} must be in the {_other(side)} model of {opened.file}, but {place} has none; give the "
            f"{_other(side)} model that the difference was made from"
        )
    there = next((name for name in opened.whole(side) if name in known and name not in old), None)
    if there is not None:
        raise MismatchError(
            f"{there} is added by the difference {opened.file}, but {place} has it already; give the {_other(side)} "
            "model that the difference was made from"
        )


def _check_fingerprint(weights: Weights, opened: Difference, side: Side, strict: bool) -> None:
    made_at: str | None = getattr(opened.metadata, f"{_other(side)}_fingerprint")
    differs = weights.difference_from(made_at)
    if not differs:
        return
    message = f"{weights.folder} is not the {_other(side)} model that {opened.file} was made from: {differs}"
    if strict or made_at is None or not differs.startswith("same names"):
        raise MismatchError(f"{message}; give that model")
    LOG.warning(f"{message}; its values stay where the difference changes nothing")
