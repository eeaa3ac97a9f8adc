"""References to a base with a LoRA that is added as each tensor is read, without a copy of the model.

mergekit's own reference adds the LoRA to a copy of the whole model in ``--lora-merge-cache``, before anything is
planned. The references of this module keep the base's files: a plan reads headers alone, and a merge one tensor at a
time.
"""

from pathlib import Path
from typing import Any

from mergekit.common import ModelPath, ModelReference, dtype_from_name
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from torch import Tensor

from squisher_mergekit.errors import MismatchError, NotFoundError, UnsupportedStateError
from squisher_mergekit.merging.lora.files import LoraFiles
from squisher_mergekit.models.adapters import ADAPTER_CONFIG
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.tensors import hub
from squisher_mergekit.tensors.devices.default_device import host_by_default
from squisher_mergekit.tensors.input_files import exists

CACHE_CURE = "let mergekit add it to a copy of the model, by --lora-merge-cache DIR, and give the model fisher: PATH"
_FILES = [ADAPTER_CONFIG, "adapter_model.safetensors"]


class AdaptedLoader(LazyTensorLoader):  # type: ignore[misc]
    """Loader of a base's tensors that adds a LoRA as it reads them.

    Args:
        index: The base's tensors.
        files: Files of the LoRA and the base.
        dtype: Name of the dtype to which W0 is cast first; None to keep its own.
        lazy_unpickle: See :class:`LazyTensorLoader`.

    Raises:
        RefusedError: The adapter is no plain LoRA, or does not fit the base.
    """

    def __init__(self, index: ShardedTensorIndex, files: LoraFiles, dtype: str | None, lazy_unpickle: bool) -> None:
        super().__init__(index, lazy_unpickle)
        self.files = files
        self._dtype = dtype_from_name(dtype)
        try:
            touched = files.lora.touched
        except UnsupportedStateError as error:
            raise UnsupportedStateError(f"{error.message}, or {CACHE_CURE}") from error
        absent = sorted(touched - set(index.tensor_paths))
        if absent:
            raise MismatchError(
                f"a base must have the weights that its LoRA changes, but {files.base.folder} lacks {absent[0]} of "
                f"{files.adapter.folder}; name the base that it was trained on, with the same head"
            )

    @host_by_default()
    def get_tensor(
        self, key: str, device: str = "cpu", aliases: list[str] | None = None, raise_on_missing: bool = True
    ) -> Tensor | None:
        """Return one tensor of the merged model."""
        known = self.index.tensor_paths
        key = key if key in known else next((alias for alias in aliases or () if alias in known), key)
        before: Tensor | None = super().get_tensor(key, "cpu", None, raise_on_missing)
        if before is None:
            return None
        return self.files.lora.merged(key, before if self._dtype is None else before.to(self._dtype)).to(device)


class AdaptedReference(ModelReference, frozen=True):  # type: ignore[misc, call-arg]
    """Reference to a base with a LoRA that is added as its tensors are read."""

    def merged(
        self, cache_dir: str | None = None, trust_remote_code: bool = False, lora_merge_dtype: str | None = None
    ) -> ModelReference:
        """Return the reference to the merged model; nothing is written."""
        return _Added(model=self.model, adapter=self.lora, dtype=lora_merge_dtype)

    def without_lora(self) -> ModelReference:
        """Return the reference to the base alone."""
        return ModelReference(model=self.model, override_architecture=self.override_architecture)


class _Added(ModelReference, frozen=True):  # type: ignore[misc, call-arg]
    """Reference to a merged model: files of the base, tensors with the LoRA."""

    adapter: ModelPath
    dtype: str | None = None

    def lazy_loader(self, cache_dir: str | None = None, lazy_unpickle: bool = True) -> AdaptedLoader:
        """Return the loader of the merged tensors."""
        files = lora_files(self.model, self.adapter, cache_dir)
        return AdaptedLoader(self.tensor_index(cache_dir), files, self.dtype, lazy_unpickle)


def lora_files(model: ModelPath, adapter: ModelPath, cache_dir: str | None) -> LoraFiles:
    """Return the files of a LoRA and its base; those on the Hub are downloaded.

    Args:
        model: The base.
        adapter: The LoRA.
        cache_dir: Folder for files from the Hub.

    Raises:
        NotFoundError: The adapter is neither a local folder nor on the Hub.
    """
    base = Weights(Path(ModelReference(model=model).local_path(cache_dir)))
    local = Path(adapter.path)
    if exists(local):
        return LoraFiles(Weights(local, "adapter_model"), base)
    folder: Any = hub.download(adapter.path, adapter.revision, _FILES, cache_dir)
    if not isinstance(folder, Path) or not (folder / ADAPTER_CONFIG).is_file():
        raise NotFoundError(
            f"a LoRA must be a local folder or on the Hub, but of {adapter.path} on the Hub, "
            f"{folder if isinstance(folder, str) else f'there is no {ADAPTER_CONFIG}'}; correct the name"
        )
    return LoraFiles(Weights(folder, "adapter_model"), base, (adapter.path, adapter.revision))
