"""A model's weights on disk, read tensor by tensor, and a changed copy of the model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from squisher_mergekit.errors import ConfigError, MismatchError, NotFoundError, RefusedError
from squisher_mergekit.models.checkpoint_names import CheckpointNames, meta_model, of_model
from squisher_mergekit.models.fingerprint import fingerprint
from squisher_mergekit.tensors import hub
from squisher_mergekit.tensors.atomic import written_beside
from squisher_mergekit.tensors.safetensors import (
    SafetensorsStore,
    TensorInfo,
    TensorStore,
    safetensors_files,
    safetensors_notes,
    tensor_infos,
)
from squisher_mergekit.tensors.writer import SafetensorsWriter, header_room

BASENAME = "model"
# The trainer's, by endings that a model's own files have.
_TRAINERS = {"trainer_state.json", "fisher_config.json", "fisher.safetensors.index.json", "all_results.json"}


class Weights:
    """Weights of a model folder: headers and fingerprint are read on first use, and once.

    A folder without safetensors has no files, no infos and no fingerprint.

    Args:
        path: A model folder, or one ``.safetensors`` file.
        basename: ``model``, or ``adapter_model`` for an adapter.
        store: Tensors to use in place of those on disk.
    """

    def __init__(self, path: Path, basename: str = BASENAME, store: TensorStore | None = None) -> None:
        single = path.is_file()
        self.folder = path.parent if single else path
        self.basename = basename
        if single:
            self.__dict__["files"] = (path,) if path.suffix == ".safetensors" else ()
        if store is not None:
            self.__dict__["store"] = store

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, shard by shard; empty if there are none."""
        return tuple(safetensors_files(self.folder, self.basename))

    @cached_property
    def store(self) -> TensorStore:
        """Store that reads the tensors."""
        return SafetensorsStore(self.files, str(self.folder))

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name -> header, shard by shard."""
        return self.store.infos

    @cached_property
    def fingerprint(self) -> str | None:
        """Digest of the files; None if there are none."""
        if not self.files:
            return None
        return fingerprint(self.files[0] if len(self.files) == 1 else self.folder, self.basename)

    def read(self, name: str) -> Tensor:
        """Return one tensor, a view of the mapped file; it must not be written to."""
        return self.store.read(name)

    @cached_property
    def outline(self) -> tuple[nn.Module, CheckpointNames] | None:
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
        folder = hub.download_model(str(source), option)
    files = safetensors_files(folder, BASENAME) if folder.is_dir() else []
    if not files:
        raise NotFoundError(
            f"{option} must be a folder with {BASENAME}.safetensors or its shards, but {folder} has none; save the "
            "model by save_pretrained and give that folder"
        )
    weights = Weights(folder)
    _ = weights.infos
    return weights


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


def headers(folder: Path, basename: str = "model") -> dict[str, TensorInfo]:
    """Return name -> header of the weights in a folder; empty where there are no safetensors.

    Raises:
        CorruptFileError: A file is truncated, or its index names one that is missing.
    """
    return {name: info for file in safetensors_files(folder, basename) for name, info in tensor_infos(file).items()}


def changed(tuned: Path, base: Path, checkpoint_names: CheckpointNames) -> set[str] | None:
    """Return the parameters in memory whose weights differ from the base model's; None if either has no weights.

    Both are compared in the narrower of their dtypes: what was frozen is equal then, even if one was saved in another
    dtype. What training moved by less than that dtype shows is not among them.

    Args:
        tuned: Folder of the trained weights.
        base: Folder of the weights before training.
        checkpoint_names: The model.
    """
    stores = [SafetensorsStore(safetensors_files(folder, "model"), str(folder)) for folder in (tuned, base)]
    if not all(store.infos for store in stores):
        return None
    differing: set[str] = set()
    for name in stores[0].infos.keys() & stores[1].infos.keys():
        now, before = (store.read(name) for store in stores)
        narrow = now.dtype if now.dtype.itemsize <= before.dtype.itemsize else before.dtype
        if now.shape != before.shape or not torch.equal(now.to(narrow), before.to(narrow)):
            differing.update(checkpoint_names.sources.get(checkpoint_names.aliases.get(name, name), ()))
    return differing
