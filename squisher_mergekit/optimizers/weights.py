"""What the headers of the weights tell of a Fisher, and which weights training has changed."""

from pathlib import Path

import torch

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.fisher.files import SafetensorsStore, safetensors_files, tensor_infos
from squisher_mergekit.fisher.mapping import Fisher, TensorInfo, check_shape
from squisher_mergekit.models.checkpoint_names import Skeleton


def headers(folder: Path, basename: str = "model") -> dict[str, TensorInfo]:
    """Return name -> header of the weights in a folder; empty where there are no safetensors.

    Raises:
        CorruptFileError: A file is truncated, or its index names one that is missing.
    """
    return {name: info for file in safetensors_files(folder, basename) for name, info in tensor_infos(file).items()}


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


def changed(tuned: Path, base: Path, skeleton: Skeleton) -> set[str] | None:
    """Return the parameters in memory whose weights differ from the base model's; None if either has no weights.

    Both are compared in the narrower of their dtypes: what was frozen is equal then, even if one was saved in another
    dtype. What training moved by less than that dtype shows is not among them.

    Args:
        tuned: Folder of the trained weights.
        base: Folder of the weights before training.
        skeleton: The model.
    """
    stores = [SafetensorsStore(safetensors_files(folder, "model"), str(folder)) for folder in (tuned, base)]
    if not all(store.infos for store in stores):
        return None
    differing: set[str] = set()
    for name in stores[0].infos.keys() & stores[1].infos.keys():
        now, before = (store.read(name) for store in stores)
        narrow = now.dtype if now.dtype.itemsize <= before.dtype.itemsize else before.dtype
        if now.shape != before.shape or not torch.equal(now.to(narrow), before.to(narrow)):
            differing.update(skeleton.sources.get(skeleton.aliases.get(name, name), ()))
    return differing
