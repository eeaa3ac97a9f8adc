"""Weights of a model folder, read tensor by tensor, and changed copies of a model."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from squisher_mergekit.errors import (
    ConfigError,
    CorruptFileError,
    MismatchError,
    NotFoundError,
    RefusedError,
    UnsupportedStateError,
    ValuesError,
)
from squisher_mergekit.models.checkpoint_names import check_config, meta_model, of_model
from squisher_mergekit.models.fingerprint import difference, fingerprint_of
from squisher_mergekit.models.names import CheckpointNames
from squisher_mergekit.tensors import hub
from squisher_mergekit.tensors.atomic import written_beside
from squisher_mergekit.tensors.dtypes import FLOAT8
from squisher_mergekit.tensors.folder_moves import is_new
from squisher_mergekit.tensors.input_files import brief, exists, expanded, read_mapping, refuse_irregular
from squisher_mergekit.tensors.safetensors import (
    SafetensorsHeader,
    SafetensorsStore,
    TensorInfo,
    TensorStore,
    read_header,
    safetensors_files,
)
from squisher_mergekit.tensors.writer import SafetensorsWriter, header_room

BASENAME = "model"
DIFFUSION = "diffusion_pytorch_model"  # basename of diffusers
_SMALL_INTEGERS = (torch.int8, torch.uint8, torch.int32)
# Ends of the names of weights that are stored as integers, by several quantisers.
_PACKED = ("weight", "weight_packed", "_blocks")
# Files of a trainer whose endings are those of a model's own files.
_TRAINER_FILES = {"trainer_state.json", "fisher_config.json", "fisher.safetensors.index.json", "all_results.json"}


class Weights:
    """Weights of a model folder: headers, config and fingerprint are read on first use, and once.

    A folder without safetensors has no files, no infos and no fingerprint. The object describes the folder as it was
    when it was first looked at: make a new one after the files have changed.

    Args:
        path: A model folder, or one ``.safetensors`` file.
        basename: ``model``, or ``adapter_model`` for an adapter.
        store: Tensors to use in place of those on disk.

    Example:
        >>> weights = Weights(Path("nowhere"))
        >>> weights.files, dict(weights.infos), weights.config, weights.fingerprint
        ((), {}, None, None)
    """

    def __init__(self, path: Path, basename: str = BASENAME, store: TensorStore | None = None) -> None:
        single = path.is_file()
        self.folder = path.parent if single else path
        self.basename = basename
        self.pickled = (path,) if single else tuple(sorted(path.glob("pytorch_model*.bin")))
        if single:
            self.__dict__["files"] = (path,) if path.suffix == ".safetensors" else ()
        if store is not None:  # a folder or file of that name has nothing to do with the tensors
            self.__dict__.update({"store": store, "files": ()})
            self.pickled = ()

    def __repr__(self) -> str:
        return f"Weights({str(self.folder)!r}, {self.basename!r})"

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, shard by shard; empty if there are none.

        Raises:
            CorruptFileError: The index cannot be read, or names a file that is missing.
        """
        found = safetensors_files(self.folder, self.basename)
        if not found and self.basename == BASENAME:
            found = safetensors_files(self.folder, DIFFUSION)
        return tuple(found)

    @property
    def stem(self) -> str:
        """Basename of the safetensors files: ``model``, ``adapter_model``, or that of diffusers."""
        return DIFFUSION if any(file.name.startswith(DIFFUSION) for file in self.files) else self.basename

    @cached_property
    def headers(self) -> Mapping[Path, SafetensorsHeader]:
        """File -> header.

        Raises:
            CorruptFileError: A file is truncated.
        """
        return {file: read_header(file) for file in self.files}

    @cached_property
    def store(self) -> TensorStore:
        """Store that reads the tensors."""
        return SafetensorsStore(self.files, str(self.folder), self.headers)

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name on disk -> header of the tensor, shard by shard."""
        return self.store.infos

    @cached_property
    def fingerprint(self) -> str | None:
        """Digest of the files, see :mod:`~squisher_mergekit.models.fingerprint`; None if there are none."""
        return self._fingerprint()

    def _fingerprint(self, *, overlapping: bool = False) -> str | None:
        return fingerprint_of(self.headers.values(), overlapping=overlapping)

    def difference_from(self, made_at: str | None) -> str | None:
        """Describe the difference from the weights with a fingerprint; None where there is none, or it is unknown.

        A fingerprint of 0.1.0, which read small tensors differently, agrees with the same weights.
        """
        if made_at is None:
            return None
        found = difference(made_at, self.fingerprint)
        return None if found is None or made_at == self._fingerprint(overlapping=True) else found

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """Content of ``config.json``; None if the folder has none.

        Raises:
            CorruptFileError: The file is not JSON.
        """
        file = self.folder / "config.json"
        return read_mapping(file) if file.is_file() else None

    @cached_property
    def outline(self) -> tuple[nn.Module, CheckpointNames] | None:
        """Model on the meta device, built from ``config.json``, and its names on disk; None if it cannot be built."""
        try:
            model = meta_model(self.folder)
            return model, of_model(model, set(self.infos))
        except RefusedError:
            return None

    @cached_property
    def stored_dtypes(self) -> Mapping[str, tuple[torch.dtype, int]]:
        """Name on disk -> dtype and number of axes; those of pickled weights if there are no safetensors."""
        if self.files or not self.pickled:
            return {name: (info.dtype, len(info.shape)) for name, info in self.infos.items()}
        return {name: found for file in self.pickled for name, found in _pickled_dtypes(file).items()}

    def read(self, name: str) -> Tensor:
        """Return one tensor; it must not be written to."""
        return self.store.read(name)

    def with_store(self, store: TensorStore) -> Weights:
        """Return the same weights with other tensors in memory, for example under other names."""
        changed = copy.copy(self)
        changed.__dict__.pop("outline", None)
        changed.__dict__["store"] = store
        return changed


def _pickled_dtypes(file: Path) -> dict[str, tuple[torch.dtype, int]]:
    """Return name -> dtype and number of axes of pickled weights, unread; nothing if the file is no mapping."""
    try:
        loaded = torch.load(file, map_location="meta", weights_only=True)
    except Exception:  # mergekit reads the file by its own rules, and reports the damage
        return {}
    tensors = loaded.items() if isinstance(loaded, dict) else ()
    return {name: (tensor.dtype, tensor.ndim) for name, tensor in tensors if isinstance(tensor, Tensor)}


def open_weights(source: str | Path, option: str = "MODEL") -> Weights:
    """Open the weights of a model.

    Args:
        source: A folder with ``model.safetensors`` or its shards, or a Hub id ``org/name[@revision]``.
        option: Name of the option that gave the source, for messages.

    Raises:
        NotFoundError: The source has no such weights.
        CorruptFileError: A file is truncated, a shard is missing, or an entry of the folder is a FIFO or a device.
    """
    folder = expanded(source)
    if not exists(folder):
        folder = hub.download_model(str(source), option)
    refuse_irregular(folder)
    weights = Weights(folder)
    if not folder.is_dir() or not weights.files:
        raise NotFoundError(
            f"{option} must be a folder with {BASENAME}.safetensors or its shards, but {folder} has none; save the "
            "model by save_pretrained and give that folder"
        )
    _ = weights.headers  # a truncated file is refused here, not at the first read
    return weights


def check_folder(folder: Path) -> None:
    """Refuse the folder of a model that other libraries would wait for, build for hours, or fail to parse.

    Raises:
        CorruptFileError: An entry is a FIFO or a device, or ``config.json`` is damaged or of an impossible model.
    """
    refuse_irregular(folder)
    if (folder / "config.json").is_file():
        check_config(folder)


def check_finite(tensor: Tensor, name: str, model: str) -> None:
    """Refuse a weight with NaN or infinite entries.

    Raises:
        ValuesError: The message has the number of each kind.
    """
    counts = {"NaN": int(tensor.isnan().sum()), "infinite": int(tensor.isinf().sum())}
    found = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    if found:
        if tensor.dtype == torch.float16 and not counts["NaN"]:
            most = torch.finfo(tensor.dtype).max
            raise ValuesError(
                f"weights must be finite, but {name} of {model or 'a model'} has {found} of {tensor.numel()} entries "
                f"in float16, which ends at {most:g}; give dtype: bfloat16 or float32, or a checkpoint from before "
                "training broke"
            )
        raise ValuesError(
            f"weights must be finite, but {name} of {model or 'a model'} has {found} of {tensor.numel()} entries; give "
            "a checkpoint from before training broke"
        )


def refuse_quantised(weights: Weights, label: str) -> None:
    """Refuse a model whose weights are quantised, from its headers and its config.

    Args:
        weights: The weights; pickled ones are opened for their dtypes.
        label: Name of the model, for the message.

    Raises:
        UnsupportedStateError: A weight is stored as float8, or as packed integers.
    """
    quantised = bool((weights.config or {}).get("quantization_config"))
    for name, (dtype, axes) in weights.stored_dtypes.items():
        refuse_float8(dtype, name, label)
        packed = axes > 1 and not dtype.is_floating_point
        if packed and (name.endswith(_PACKED) or (quantised and dtype in _SMALL_INTEGERS)):
            raise UnsupportedStateError(_quantised(dtype, name, label))


def refuse_float8(dtype: torch.dtype, name: str, label: str) -> None:
    """Refuse a weight in float8, whose values depend on separate scales.

    Raises:
        UnsupportedStateError: The dtype is a float8.
    """
    if dtype in FLOAT8:
        raise UnsupportedStateError(_quantised(dtype, name, label))


def _quantised(dtype: torch.dtype, name: str, label: str) -> str:
    """Return the message for a quantised weight."""
    return (
        f"weights must be float32, float16 or bfloat16, but {name} of {label} is stored as "
        f"{str(dtype).removeprefix('torch.')}; take the model before it was quantised"
    )


def refuse_damaged(folder: Path, error: Exception) -> NoReturn:
    """Refuse weights that mergekit could not open, naming the file where the folder is local.

    Args:
        folder: Folder of the weights, or a Hub id.
        error: The error of mergekit, safetensors or torch.

    Raises:
        CorruptFileError: Always.
    """
    _ = Weights(folder).headers
    raise CorruptFileError(
        f"the weights of {folder} must be whole files of safetensors or torch.save, but {brief(error)}; copy or "
        "download them again"
    ) from error


def check_alike(tuned: Weights, base: Weights, names: Iterable[str]) -> None:
    """Refuse a base model whose tensors differ in shape or dtype from those of the model trained from it.

    Raises:
        MismatchError: The base lacks a tensor, or its shape or dtype differs.
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
    """Refuse an output folder that is not empty.

    Raises:
        ConfigError: ``out`` is a file, or a folder with files.
    """
    if not is_new(out):
        raise ConfigError(f"{out} must be new or empty; remove it or choose another folder")


def write_changed(
    weights: Weights,
    out: Path,
    change: Callable[[str, Tensor], Tensor | None],
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a copy of a model with changed tensors; ``out`` appears only when all of it is written.

    Shards keep their names and order, tensors their dtype. The model's other files (config, tokenizer) are copied, the
    trainer's files are not.

    Args:
        weights: The model.
        out: The folder to make; new or empty.
        change: Function from name and tensor to the new tensor, of the same dtype; None drops the tensor. It is called
            once per tensor, in the order of ``weights.infos``, and the tensor it returns must not change later.
        beside: Function called at the end with the folder being written, for further files.

    Raises:
        ConfigError: ``out`` is a file, or a folder with files.
    """
    check_out(out)
    with written_beside(out) as folder:
        for file, header in weights.headers.items():
            _write_shard(weights, header, folder / file.name, change)
        copy_rest(weights, folder)
        if beside is not None:
            beside(folder)


def copy_rest(weights: Weights, folder: Path) -> None:
    """Copy a model's files other than its weights: config, tokenizer, the index of its shards; no trainer's files."""
    left_out = set(_TRAINER_FILES)
    if f"{weights.stem}.safetensors" in {file.name for file in weights.files}:
        left_out.add(f"{weights.stem}.safetensors.index.json")  # of older shards: a single file needs no index
    for path in sorted(weights.folder.iterdir()):
        if path.is_file() and path.suffix in hub.MODEL_ENDINGS and path.name not in left_out:
            shutil.copyfile(path, folder / path.name)


def _write_shard(
    weights: Weights, header: SafetensorsHeader, target: Path, change: Callable[[str, Tensor], Tensor | None]
) -> None:
    with SafetensorsWriter(target, header_room(list(header.infos), notes=header.metadata)) as writer:
        for key, value in header.metadata.items():
            writer.note(key, value)
        for name in header.infos:
            changed = change(name, weights.read(name))
            if changed is not None:
                writer.add(name, changed)


def trained_parameters(tuned: Weights, base: Weights, checkpoint_names: CheckpointNames) -> set[str] | None:
    """Return the parameters in memory whose weights differ from the base model's; None if either has no weights.

    The weights are compared in the narrower of their two dtypes, so that frozen weights are equal even if one model
    was saved in another dtype. Changes too small for that dtype are not seen.

    Args:
        tuned: The trained weights.
        base: The weights before training.
        checkpoint_names: The model's names in memory and on disk.
    """
    if not tuned.infos or not base.infos:
        return None
    differing: set[str] = set()
    for name in tuned.infos.keys() & base.infos.keys():
        now, before = tuned.read(name), base.read(name)
        narrow = now.dtype if now.dtype.itemsize <= before.dtype.itemsize else before.dtype
        if now.shape != before.shape or not torch.equal(now.to(narrow), before.to(narrow)):
            differing.update(checkpoint_names.sources.get(checkpoint_names.aliases.get(name, name), ()))
    return differing
