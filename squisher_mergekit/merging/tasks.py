"""The graph task that loads the Fishers of one output tensor, just before they are used."""

import threading
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.tokenizer import BuildTokenizer
from pydantic import BaseModel
from torch import Tensor

from squisher_mergekit.fisher.config import FisherConfig, Scaling
from squisher_mergekit.fisher.files import MemoryStore
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging.loading import LoadedFisher, load_tensor

_OPEN: dict[int, Fisher] = {}
_LOCK = threading.Lock()


def hold(fisher: Fisher) -> int:
    """Keep an open Fisher for the tasks of this process, which can hold plain values only; return its number."""
    with _LOCK:
        _OPEN[id(fisher)] = fisher
    return id(fisher)


class FisherRequest(BaseModel, frozen=True):
    """One model's part: which tensor of which open Fisher, and at which scale (see :func:`.loading.load_tensor`).

    ``number`` is None for F = 0. ``model_type`` is set where the tensor is put together by transformers' conversion.
    """

    model: ModelReference
    number: int | None
    name: str
    scaling: Scaling
    normalize: str
    floor: float
    fisher_scale: float
    model_type: str | None = None

    def load(self) -> LoadedFisher:
        """Read the tensor.

        Raises:
            RefusedError: It cannot be read.
        """
        if self.number is None:
            return load_tensor(None, self.name, scaling="raw", normalize="none", floor=0.0, fisher_scale=1.0)
        with _LOCK:
            source: Any = _OPEN[self.number]
        if self.model_type is not None:
            source = _Converted(source, self.name, self.model_type)
        return load_tensor(
            source,
            self.name,
            scaling=self.scaling,
            normalize=self.normalize,
            floor=self.floor,
            fisher_scale=self.fisher_scale,
        )


class _Converted(Fisher):
    """A Fisher of one tensor: the one that transformers' checkpoint conversion makes of another Fisher's tensors.

    All of transformers' conversions used here move elements, so that they hold for a Fisher as for a weight. The parts
    may have been stepped differently often, so each is brought to its scale first.
    """

    def __init__(self, fisher: Fisher, target: str, model_type: str) -> None:
        super().__init__(MemoryStore({}, fisher.location), FisherConfig(statistic="mean"))
        self._whole, self._target, self._model_type = fisher, target, model_type
        self._scaling: Scaling = "raw"

    def __getitem__(self, name: str) -> Tensor:
        from mergekit.architecture.conversion import convert_checkpoint_tensors

        parts = {key: lambda key=key: self._whole.scaled(key, self._scaling) for key in self._whole}
        tensor: Tensor = convert_checkpoint_tensors(self._model_type, parts, self._target)
        return tensor

    def resolve(self, name: str) -> str | None:
        return name if name == self._target else None

    def factor(self, name: str, scaling: Scaling = "debiased") -> float:
        self._scaling = scaling
        return 1.0

    def moments(self, scaling: Scaling = "debiased") -> tuple[float, float]:
        return self._whole.moments(scaling)


class GatherFishers(Task[dict[ModelReference, LoadedFisher]]):  # type: ignore[misc]
    """Load the Fishers of one output tensor: model -> tensor and factor.

    A plain dict, so that the executor moves the tensors to the device of the arithmetic. The label is that of the
    weights: a load without one would be scheduled before everything else, and hold all Fishers at once.

    ``tokenizer_task``: where the vocabulary is re-ordered, rows move as the weights' rows do, and a row that a model
    lacks gets 0. ``truncate``: rows beyond the smallest vocabulary are cut off, as they are from the weights.
    """

    requests: tuple[FisherRequest, ...]
    label: str | None
    tokenizer_task: BuildTokenizer | None = None
    vocabulary_axis: int = 0
    pad_to_multiple_of: int | None = None
    truncate: bool = False

    def arguments(self) -> dict[str, Task[Any]]:
        """Return the tokenizer's task, if the vocabulary is re-ordered."""
        return {} if self.tokenizer_task is None else {"tokenizer_info": self.tokenizer_task}

    def group_label(self) -> str | None:
        """Return the label of the weights."""
        return self.label

    def priority(self) -> int:
        """Return the weights' own priority."""
        return -1000

    def execute(self, tokenizer_info: Any = None) -> dict[ModelReference, LoadedFisher]:
        """Load, and follow the vocabulary."""
        loaded = {request.model: request.load() for request in self.requests}
        known = {model: item["tensor"] for model, item in loaded.items() if item["tensor"] is not None}
        if tokenizer_info is not None:
            vocabulary = len(tokenizer_info.tokenizer.get_vocab())
            multiple = self.pad_to_multiple_of or 1
            rows = -(-vocabulary // multiple) * multiple
            for model, tensor in known.items():
                permutation = tokenizer_info.permutations[model]
                loaded[model]["tensor"] = permute_rows(tensor, permutation, rows, self.vocabulary_axis)
        elif self.truncate and known:
            rows = min(tensor.shape[self.vocabulary_axis] for tensor in known.values())
            for model, tensor in known.items():
                loaded[model]["tensor"] = tensor.narrow(self.vocabulary_axis, 0, rows)
        return loaded


def permute_rows(tensor: Tensor, permutation: dict[int, int], rows: int, axis: int) -> Tensor:
    """Re-order a Fisher along the vocabulary; a row without a source is 0, and so carries no weight.

    Args:
        tensor: The Fisher.
        permutation: New row -> old row, negative where the model lacks the token.
        rows: New number of rows.
        axis: The vocabulary's axis.

    Returns:
        A new tensor with ``rows`` rows along ``axis``.
    """
    pairs = [(new, old) for new, old in permutation.items() if old >= 0]
    result = tensor.new_zeros([rows if i == axis else size for i, size in enumerate(tensor.shape)])
    if pairs:
        new, old = (torch.tensor(side) for side in zip(*pairs, strict=True))
        result.index_copy_(axis, new, tensor.index_select(axis, old))
    return result
