"""Lookup of a task's weights in the files of a model, as mergekit's own loader finds them."""

import functools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache, LoadTensor

from squisher_mergekit.models.loading import LoadableModel, loadable


@dataclass(frozen=True)
class FoundWeight:
    """Weight of one model for one task.

    Attributes:
        loader: mergekit's loader of the model's files.
        stored: Name in the files; None if the weight is built from other tensors when it is read.
        aliases: Other names of the same tensor.
        tied: True if the files have the weight only under the name of a tensor that it can be tied to.
    """

    loader: Any
    stored: str | None
    aliases: tuple[str, ...]
    tied: bool = False


def find_weight(task: Any, model: ModelReference) -> FoundWeight | None:
    """Return the weight of a model for a task; None if the model has none."""
    gather = gather_of(task)
    if not hasattr(gather, "weight_info"):
        loader, stored = raw_loader(gather.tensors[model].model), gather.tensors[model].tensor_name
        return FoundWeight(loader, stored, ()) if stored in loader.index.tensor_paths else None
    load, loader = load_task(gather, model, model), LoaderCache().get(model)
    stored, names = load._resolve_name(loader), (load.tensor, *(load.aliases or ()))
    if stored is None and not weight_converts(model, loader, names):
        return None
    # A tied name belongs to another tensor, which replaces this one: the Fisher is that tensor's.
    tied = stored is not None and stored not in names
    aliases = () if tied else tuple(name for name in names if name != stored)
    return FoundWeight(loader, stored, aliases, tied)


def gather_of(task: Any) -> Any:
    """Return the task that gathers the weights, without a vocabulary's re-ordering around it."""
    return getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)


def load_task(gather: Any, model: ModelReference, owner: ModelReference) -> LoadTensor:
    """Return the task that reads from the files of ``owner`` the tensor that ``model`` contributes."""
    weight = gather.weight_info[model]
    # Equal to those of GatherTensors.arguments, so that the graph reads a tensor once.
    return LoadTensor(
        model=owner,
        tensor=weight.name,
        dtype=weight.force_dtype or gather.dtype,
        device=gather.device,
        optional=weight.optional,
        aliases=weight.aliases,
        tied_names=weight.tied_names,
    )


def raw_loader(model: str) -> Any:
    """Return mergekit's loader of a single file."""
    from mergekit.scripts.merge_raw_pytorch import SimpleLoaderCache

    return SimpleLoaderCache().get(model)


@functools.cache
def model_type(model: Any) -> str | None:
    """Return the ``model_type`` of a model's config."""
    found: str | None = model_config(model).model_type
    return found


@functools.cache
def own_class(model: Any) -> LoadableModel | None:
    """Return the class that a model's config names, without weights."""
    return loadable(model_config(model))


def forget_files() -> None:
    """Forget loaders and configs of earlier merges of this process; their files may have been replaced since."""
    LoaderCache.loaders.clear()
    model_type.cache_clear()
    own_class.cache_clear()


def model_config(model: Any) -> Any:
    """Return the config of a model."""
    return model.config(trust_remote_code=LoaderCache().trust_remote_code)


@functools.cache
def converts(kind: str | None) -> bool:
    """Return True if transformers converts weights of a model type when it loads them."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return bool(kind and get_checkpoint_conversion_mapping(kind))


def converts_to(model: Any, name: str, targets: Collection[str]) -> bool:
    """Return True if transformers converts a tensor on disk to one of some targets when it loads the model."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    kind = None if not targets or Path(model.model.path).is_file() else model_type(model)
    for step in (get_checkpoint_conversion_mapping(kind) if kind else None) or []:
        renamed, source = step.rename_source_key(name)
        if source is not None:
            first = step.target_patterns[0]
            if any(renamed.replace(first, pattern) in targets for pattern in step.target_patterns):
                return True
            name = renamed
    return False


def weight_converts(model: Any, loader: Any, names: tuple[str, ...]) -> bool:
    """Return True if transformers builds one of the tensors from those in a model's files."""
    from mergekit.architecture.conversion import can_convert_checkpoint_keys

    stored = set(loader.index.tensor_paths)
    return any(can_convert_checkpoint_keys(model_type(model), stored, name) for name in names)
