"""The graph task that loads the Fishers of one output tensor, and theta_0 for ``density``, just before their use."""

import threading
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.tokenizer import BuildTokenizer
from pydantic import BaseModel
from torch import Tensor

from squisher_mergekit.fisher.config import FisherConfig, Scaling
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging.density import Rows
from squisher_mergekit.merging.read import LoadedFisher, load_tensor, no_fisher
from squisher_mergekit.tensors.safetensors import MemoryStore

_OPEN: dict[int, Fisher] = {}
_LOCK = threading.Lock()


def hold(fisher: Fisher) -> int:
    """Keep an open Fisher for the tasks of this process, which can hold plain values only; return its number."""
    with _LOCK:
        _OPEN[id(fisher)] = fisher
    return id(fisher)


class FisherRequest(BaseModel, frozen=True):
    """One model's part: which tensor of which open Fisher, and at which scale (see ``read.load_tensor``).

    ``number`` is None for F = 0. ``model_type`` is set where the tensor is put together by transformers' conversion.
    """

    model: ModelReference
    number: int | None
    name: str
    scaling: Scaling
    normalize: str
    floor: float
    fisher_scale: float
    density: float = 1.0
    model_type: str | None = None

    def load(self) -> LoadedFisher:
        """Read the tensor.

        Raises:
            RefusedError: It cannot be read.
        """
        if self.number is None:
            return no_fisher(self.name)
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
            density=self.density,
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
    """Load the Fishers of one output tensor: model -> tensor and factor, and theta_0 where it is asked for.

    A plain dict, so that the executor moves the tensors to the device of the arithmetic. The label is that of the
    weights: a load without one would be scheduled before everything else, and hold all Fishers at once.

    ``origins``: model -> the task that loads its theta_0; ``base``: the model that those are of, or that is an input.
    ``tokenizer_task``: where the vocabulary is re-ordered, rows move as the weights' rows do, and a row that a model
    lacks gets 0. ``truncate``: rows beyond the smallest vocabulary are cut off, as they are from the weights.
    """

    requests: tuple[FisherRequest, ...]
    # Task[Any] would be made anew from each task's fields.
    origins: tuple[tuple[ModelReference, Task], ...] = ()
    label: str | None
    base: ModelReference | None = None
    tokenizer_task: BuildTokenizer | None = None
    vocabulary_axis: int = 0
    pad_to_multiple_of: int | None = None
    truncate: bool = False

    def arguments(self) -> dict[str, Task[Any]]:
        """Return the tasks that load theta_0, and the tokenizer's task, if the vocabulary is re-ordered."""
        found: dict[str, Task[Any]] = {f"origin of {model}": task for model, task in self.origins}
        return found if self.tokenizer_task is None else {"tokenizer_info": self.tokenizer_task, **found}

    def group_label(self) -> str | None:
        """Return the label of the weights."""
        return self.label

    def priority(self) -> int:
        """Return the weights' own priority."""
        return -1000

    def execute(self, tokenizer_info: Any = None, **origins: Tensor) -> dict[ModelReference, LoadedFisher]:
        """Load, and follow the vocabulary."""
        loaded = {request.model: request.load() for request in self.requests}
        for model, _ in self.origins:
            loaded[model]["origin"] = origins[f"origin of {model}"]
        if tokenizer_info is not None:
            self._permute(loaded, tokenizer_info)
        elif self.truncate:
            self._truncate(loaded)
        return loaded

    def _permute(self, loaded: dict[ModelReference, LoadedFisher], tokenizer_info: Any) -> None:
        vocabulary = len(tokenizer_info.tokenizer.get_vocab())
        multiple = self.pad_to_multiple_of or 1
        rows, moves = -(-vocabulary // multiple) * multiple, tokenizer_info.permutations
        moved: dict[int, Tensor] = {}  # the models mostly share one theta_0
        for model, item in loaded.items():
            for key in ("tensor", "scores"):
                item[key] = _follow(item[key], moves[model], rows, self.vocabulary_axis)
            if item["density"] < 1:
                item["rows"] = shared_rows(moves[model], moves[self.base], rows, self.vocabulary_axis)
            if (origin := item["origin"]) is not None:
                if id(origin) not in moved:
                    moved[id(origin)] = permute_rows(origin, moves[self.base], rows, self.vocabulary_axis)
                item["origin"] = moved[id(origin)]

    def _truncate(self, loaded: dict[ModelReference, LoadedFisher]) -> None:
        axis = self.vocabulary_axis
        rows = min((item["tensor"].shape[axis] for item in loaded.values() if item["tensor"] is not None), default=0)
        for item in loaded.values():
            for key in ("tensor", "scores"):
                tensor = item[key]
                item[key] = None if tensor is None else tensor.narrow(axis, 0, rows)
            if (origin := item["origin"]) is not None:
                own = min(origin.shape[axis], rows)
                same = {row: row for row in range(own)}
                item["origin"] = origin.narrow(axis, 0, rows) if own == rows else permute_rows(origin, same, rows, axis)
                item["rows"] = None if own == rows else Rows(torch.arange(own), torch.arange(own, rows), axis)


def _follow(tensor: Tensor | None, permutation: dict[int, int], rows: int, axis: int) -> Tensor | None:
    return None if tensor is None else permute_rows(tensor, permutation, rows, axis)


def shared_rows(own: dict[int, int], base: dict[int, int], rows: int, axis: int) -> Rows:
    """Return which rows of a re-ordered vocabulary a model and the base had before.

    Args:
        own: New row -> the model's old row, negative where it lacks the token.
        base: The same of the base.
        rows: Number of rows; those beyond the vocabulary are padding, which nobody had.
        axis: The vocabulary's axis.

    Example:
        >>> shared_rows({0: 1, 1: 0, 2: -1}, {0: 0, 1: -1, 2: 1}, 4, axis=0)
        Rows(shared=tensor([0]), unbased=tensor([1, 3]), axis=0)
    """
    unbased = [row for row in range(rows) if base.get(row, -1) < 0]
    shared = [row for row in range(rows) if base.get(row, -1) >= 0 and own.get(row, -1) >= 0]
    return Rows(torch.tensor(shared, dtype=torch.int64), torch.tensor(unbased, dtype=torch.int64), axis)


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
        new, old = (torch.tensor(side, device=tensor.device) for side in zip(*pairs, strict=True))
        result.index_copy_(axis, new, tensor.index_select(axis, old))
    return result
