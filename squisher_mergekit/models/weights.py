"""A model's weights on disk, read tensor by tensor, and a changed copy of the model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from squisher_mergekit.errors import ConfigError, MismatchError, NotFoundError, RefusedError
from squisher_mergekit.fisher import hub
from squisher_mergekit.fisher.files import (
    SafetensorsStore,
    safetensors_files,
    safetensors_notes,
    tensor_infos,
    written_beside,
)
from squisher_mergekit.fisher.mapping import Fisher, TensorInfo, TensorStore, check_shape
from squisher_mergekit.models.checkpoint_names import Skeleton, meta_model, of_model
from squisher_mergekit.models.fingerprint import difference, fingerprint
from squisher_mergekit.tensors.writer import SafetensorsWriter, header_room

BASENAME = "model"
# The trainer's, by endings that a model's own files have.
_TRAINERS = {"trainer_state.json", "fisher_config.json", "fisher.safetensors.index.json", "all_results.json"}


@dataclass(frozen=True)
class Weights:
    """The weights in a folder: ``store`` reads them, ``files`` are their shards."""

    folder: Path
    files: tuple[Path, ...]
    store: TensorStore = field(repr=False)

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name -> header, shard by shard."""
        return self.store.infos

    def read(self, name: str) -> Tensor:
        """Return one tensor, a view of the mapped file; it must not be written to."""
        return self.store.read(name)

    @cached_property
    def outline(self) -> tuple[nn.Module, Skeleton] | None:
        """The model that ``config.json`` describes, without weights, and its names on disk; None if there is none."""
        try:
            model = meta_model(self.folder)
            return model, of_model(model, set(self.infos))
        except RefusedError:
            return None


def open_weights(source: str | Path, option: str = "MODEL") -> Weights:
    """Open the weights of a model.

    Args:
        source: A folder with ``model.safetensors`` or its shards, or a Hub id ``org/name[@revision]``.
        option: What it is called in a message.

    Raises:
        NotFoundError: There are no such weights.
        CorruptFileError: A file is truncated, or a shard is missing.
    """
    folder = Path(source).expanduser()
    if not folder.exists():
        folder = hub.model(str(source), option)
    files = safetensors_files(folder, BASENAME) if folder.is_dir() else []
    if not files:
        raise NotFoundError(
            f"{option} must be a folder with {BASENAME}.safetensors or its shards, but {folder} has none; save the "
            "model by save_pretrained and give that folder"
        )
    return Weights(folder, tuple(files), SafetensorsStore(files, str(folder)))


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


def check_alike(tuned: Weights, base: Weights, names: Iterable[str]) -> None:
    """Refuse a base that does not share some tensors with the model trained from it.

    Raises:
        MismatchError: The base has none of a name, or another shape or dtype.
    """
    for name in names:
        ours, theirs = tuned.infos[name], base.infos.get(name)
        if theirs is None or (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            found = "has none" if theirs is None else f"has {list(theirs.shape)} of {theirs.dtype}"
            raise MismatchError(
                f"{name} must be alike in both models, but {tuned.folder} has {list(ours.shape)} of {ours.dtype} and "
                f"{base.folder} {found}; give the model that this one was trained from"
            )


def check_out(out: Path) -> None:
    """Refuse a place for a model that is taken.

    Raises:
        ConfigError: There is a file, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} must be new or empty; remove it or choose another folder")


def write_changed(
    weights: Weights,
    out: Path,
    change: Callable[[str, Tensor], Tensor | None],
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a copy of a model in which tensors are changed; nothing stays at ``out`` unless all of it was written.

    Shards keep their names and order, tensors their dtype. What else belongs to the model (config, tokenizer) is
    copied, what belongs to the trainer is not.

    Args:
        weights: The model.
        out: The folder to make; new or empty.
        change: From name and tensor to the new tensor, of the same dtype; None leaves the tensor out. It is called once
            a tensor, in the order of ``weights.infos``, and what it returns must not change any more.
        beside: Called at the end with the folder that is being written, for further files.

    Raises:
        ConfigError: ``out`` is taken.
    """
    check_out(out)
    with written_beside(out) as folder:
        for file in weights.files:
            _write_shard(weights, file, folder / file.name, change)
        copy_rest(weights, folder)
        if beside is not None:
            beside(folder)


def copy_rest(weights: Weights, folder: Path) -> None:
    """Copy what else belongs to a model: config, tokenizer, the index of its shards; not what is the trainer's."""
    for path in sorted(weights.folder.iterdir()):
        if path.is_file() and path.suffix in hub.MODEL_ENDINGS and path.name not in _TRAINERS:
            shutil.copyfile(path, folder / path.name)


def _write_shard(weights: Weights, file: Path, target: Path, change: Callable[[str, Tensor], Tensor | None]) -> None:
    own = list(tensor_infos(file))
    with SafetensorsWriter(target, header_room(own)) as writer:
        for key, value in safetensors_notes(file).items():
            writer.note(key, value)
        for name in own:
            changed = change(name, weights.read(name))
            if changed is not None:
                writer.add(name, changed)
