"""Graph tasks of a merge: one merges a tensor with its Fishers, one lets a failed merge wait for its output files."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import TensorWriterTask
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.tokenizer import PermutedVocabulary
from mergekit.tokenizer.truncate import TruncatedVocabulary
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.fisher.config import FisherConfig, Scaling
from squisher_mergekit.fisher.factors.mapping import Side
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging.coupling.execution import Structure
from squisher_mergekit.merging.density import Rows
from squisher_mergekit.merging.mergekit.methods import ResolvedFisher
from squisher_mergekit.merging.output_folder import OutputFolder
from squisher_mergekit.merging.parameters import METHODS
from squisher_mergekit.merging.read import LoadedFisher, load_tensor
from squisher_mergekit.merging.run import Run
from squisher_mergekit.merging.sources import OpenFisher
from squisher_mergekit.merging.votes.threshold import Choice
from squisher_mergekit.models.weights import check_finite
from squisher_mergekit.tensors.devices.default_device import host_by_default
from squisher_mergekit.tensors.safetensors import MemoryStore

CPU = torch.device("cpu")


class FisherRequest(BaseModel, frozen=True, arbitrary_types_allowed=True):
    """Request for one tensor of one model's Fisher, at the scale of the merge (see :func:`.read.load_tensor`).

    Attributes:
        model: The model.
        opened: Its Fisher; None for F = 0.
        name: Name of the tensor.
        scaling: Scale of the Fisher.
        normalize: Divisor over the whole model.
        floor: Smallest F, relative to the mean over the tensor.
        fisher_scale: Factor on the Fisher.
        density: Share of the task vector that is kept.
        density_by: Score that ranks the entries for the density.
        model_type: Architecture whose checkpoint conversion builds the tensor; None if the Fisher has the tensor.
        padding: Axis and size to which rows of F = 0 are added.
        sides: Sides whose recorded factors are read.
        zeros: Shape of a tensor of zeros, for a weight that the model leaves to others; None for a tensor that is read.
    """

    model: ModelReference
    opened: OpenFisher | None
    name: str
    scaling: Scaling = "raw"
    normalize: str = "none"
    floor: float = 0.0
    fisher_scale: float = 1.0
    density: float = 1.0
    density_by: str = "fisher"
    model_type: str | None = None
    padding: tuple[int, int] | None = None
    sides: tuple[Side, ...] = ()
    zeros: tuple[int, ...] | None = None

    def load(self, device: torch.device = CPU) -> LoadedFisher:
        """Read the tensor, to a device.

        Raises:
            RefusedError: The tensor cannot be read.
        """
        if self.opened is None:
            return LoadedFisher(
                self.name, tensor=None if self.zeros is None else torch.zeros(self.zeros, device=device)
            )
        fisher = self.opened.fisher if device == CPU else self.opened.fisher.on(device)
        loaded = load_tensor(
            fisher if self.model_type is None else _Converted(fisher, self.name, self.model_type),
            self.name,
            scaling=self.scaling,
            normalize=self.normalize,
            floor=self.floor,
            fisher_scale=self.fisher_scale,
            density=self.density,
            density_by=self.density_by,
            sides=self.sides,
            ranks=fisher,
        )
        return loaded if self.padding is None else loaded.padded(*self.padding)


class _Converted(Fisher):
    """Fisher of one tensor, built by transformers' checkpoint conversion from the tensors of another Fisher.

    The conversions used here only move elements, so that they are valid for a Fisher as for a weight. The parts can
    have different numbers of steps, so each is scaled before the conversion.
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


class FisherMergeTask(ExecuteMergeMethodTask):  # type: ignore[misc]
    """Merge of one output tensor by a method of this package: mergekit's task, with the Fishers of the tensor.

    The Fishers are read when the task runs, so that those of one tensor at a time are in memory. A row of a re-ordered
    vocabulary moves with the row of the weight; a row that a model lacks gets F = 0.

    Attributes:
        run: The merge that this task belongs to.
        requests: Tensors to read, one per model; empty for a tensor that mergekit copies.
        origins: Model -> task that reads its theta_0, for a density below 1 or coupled rows or columns.
        origin_model: Model whose weights are theta_0.
        curvature: Structure of the Fishers; None for the diagonal.
        transposed: True for a matrix ``[in, out]``.
        copied: True for a weight that all models have alike from their base.
        thresholds: Task that finds thresholds of whole models; None if no model has one.
        spare: The base and the task that reads its weight, for tokens that no model in the sum has; None if no
            vocabulary is re-ordered, or if the base is in the sum.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    run: Run
    requests: tuple[FisherRequest, ...] = ()
    # With Task[Any], pydantic would copy each task into a new one.
    origins: tuple[tuple[ModelReference, Task], ...] = ()
    origin_model: ModelReference | None = None
    curvature: Structure | None = None
    transposed: bool = False
    copied: bool = False
    thresholds: Task | None = None
    spare: tuple[ModelReference, Task] | None = None

    def arguments(self) -> dict[str, Task[Any]]:
        """Return the tasks that find thresholds, read rows of the base, and :meth:`inputs`."""
        found = self.inputs() | ({} if self.thresholds is None else {"thresholds": self.thresholds})
        if self.spare is not None:
            found |= {"tokenizer_info": self.gather_tensors.tokenizer_task, "spare": self.spare[1]}
        return found

    def inputs(self) -> dict[str, Task[Any]]:
        """Return the tasks that read the weights, theta_0, and the tokenizer of a re-ordered vocabulary."""
        found: dict[str, Task[Any]] = {**super().arguments()}
        if self.requests and isinstance(self.gather_tensors, PermutedVocabulary):
            found["tokenizer_info"] = self.gather_tensors.tokenizer_task
        return found | {f"origin of {model}": task for model, task in self.origins}

    @host_by_default()
    def execute(
        self,
        tensors: dict[ModelReference, Tensor],
        tokenizer_info: Any = None,
        thresholds: Mapping[ModelReference, Mapping[str, Choice]] = MappingProxyType({}),
        spare: Tensor | None = None,
        **origins: Tensor,
    ) -> Tensor | None:
        """Read the Fishers of the tensor, merge, and give tokens of the base alone the base's rows.

        Raises:
            RefusedError: A Fisher cannot be read, or does not fit its weight.
        """
        self.run.reached(self.output_weight.name)
        merged = self._merged(tensors, tokenizer_info, thresholds, origins)
        if merged is None or spare is None or not tensors:
            return merged
        return self._with_spare_rows(merged, spare, tokenizer_info, tensors)

    def _merged(
        self,
        tensors: dict[ModelReference, Tensor],
        tokenizer_info: Any,
        thresholds: Mapping[ModelReference, Mapping[str, Choice]],
        origins: dict[str, Tensor],
    ) -> Tensor | None:
        if self.copied:
            tensor = next(iter(tensors.values()))
            check_finite(tensor, self.output_weight.name, " or ".join(map(str, tensors)))
            return tensor
        parameters = {**self.input_parameters}
        for model, fisher in self.load(tokenizer_info, origins, tensors).items():
            if model in tensors:
                choice = thresholds.get(model, {}).get(self.output_weight.name)
                fisher = fisher if choice is None else replace(fisher, cut=choice.cut)
                resolved = ResolvedFisher(fisher.to(tensors[model].device), self.run, self.curvature, self.transposed)
                parameters[model] = {**parameters[model], "fisher": resolved}
        # The copy is mergekit's plain task with the Fishers in place of their names.
        merged: Tensor | None = ExecuteMergeMethodTask.execute(
            self.model_copy(update={"input_parameters": parameters}), tensors
        )
        if not self.requests and merged is not None and merged.isnan().any():  # mergekit copied it
            check_finite(merged, self.output_weight.name, " or ".join(map(str, tensors)))
        return merged

    def load(
        self, tokenizer_info: Any, origins: dict[str, Tensor], tensors: Mapping[ModelReference, Tensor]
    ) -> dict[ModelReference, LoadedFisher]:
        """Read the Fishers of the tensor, with theta_0, in the order of the vocabulary of the output.

        Args:
            tokenizer_info: mergekit's record of the vocabularies; None if none is re-ordered.
            origins: Name of an argument -> theta_0 of a model.
            tensors: The weights, in that order already, on the device that the Fishers get.
        """
        first = next(iter(tensors.values()), None)
        device = CPU if first is None else first.device
        loaded = {request.model: request.load(device) for request in self.requests}
        for model, _ in self.origins:
            loaded[model] = replace(loaded[model], origin=origins[f"origin of {model}"])
        if tokenizer_info is not None:
            return self._permute(loaded, tokenizer_info)
        if isinstance(self.gather_tensors, TruncatedVocabulary) and first is not None:
            return self._truncate(loaded, first.shape[self._axis])
        return loaded

    @property
    def _axis(self) -> int:
        return self.output_weight.vocabulary_axis or 0

    def _permute(
        self, loaded: dict[ModelReference, LoadedFisher], tokenizer_info: Any
    ) -> dict[ModelReference, LoadedFisher]:
        vocabulary, axis = tokenizer_info.tokenizer.get_vocab(), self._axis
        multiple = self.gather_tensors.pad_to_multiple_of or 1
        size, permutations = -(-len(vocabulary) // multiple) * multiple, tokenizer_info.permutations
        # A row that the user sets for all models is not the base's: nothing takes it back, and lambda does not move it.
        tokens = dict(**(self.gather_tensors.tokens or {}))
        forced = {vocabulary[token]: -1 for token, each in tokens.items() if each.force and token in vocabulary}
        base = {**permutations.get(self.origin_model, {}), **forced}
        result, origins = {}, dict[int, Tensor]()  # most models share one theta_0
        for model, item in loaded.items():
            permutation, origin, rows = permutations[model], item.origin, None
            if item.density < 1 or origin is not None:
                rows = shared_rows(permutation, base, size, axis)
            if origin is not None:
                if id(origin) not in origins:
                    origins[id(origin)] = permute_rows(origin, base, size, axis)
                origin = origins[id(origin)]
            tensor, scores = (_permuted(part, permutation, size, axis) for part in (item.tensor, item.scores))
            result[model] = replace(item, tensor=tensor, scores=scores, origin=origin, rows=rows)
        return result

    def _with_spare_rows(
        self, merged: Tensor, spare: Tensor, tokenizer_info: Any, models: Iterable[ModelReference]
    ) -> Tensor:
        """Return the merge with the base's rows for tokens of the base alone, which mergekit sets to 0."""
        assert self.spare is not None
        permutations = tokenizer_info.permutations
        base, owned = permutations[self.spare[0]], [permutations[model] for model in models]
        tokens = dict(**(self.gather_tensors.tokens or {}))
        rows = [
            row
            for token, row in tokenizer_info.tokenizer.get_vocab().items()
            if token not in tokens and base.get(row, -1) >= 0 and all(own.get(row, -1) < 0 for own in owned)
        ]
        if not rows:
            return merged
        name, label, axis = self.output_weight.name, str(self.spare[0]), self._axis
        check_finite(spare, name, label)
        if spare.movedim(axis, 0).shape[1:] != merged.movedim(axis, 0).shape[1:]:
            raise MismatchError(
                f"tokens of the base alone need rows of {name} shaped as the models', but that of {label} is "
                f"{list(spare.shape)} and the merge {list(merged.shape)}; give the model that all were trained from as "
                "base_model:"
            )
        place = torch.tensor(rows, device=spare.device)
        old = torch.tensor([base[row] for row in rows], device=spare.device)
        taken = spare.index_select(axis, old).to(merged)
        return merged.index_copy(axis, place.to(merged.device), taken)

    def _truncate(self, loaded: dict[ModelReference, LoadedFisher], size: int) -> dict[ModelReference, LoadedFisher]:
        axis, result = self._axis, {}
        for model, item in loaded.items():
            origin, rows = item.origin, None
            if origin is not None:
                known = min(origin.shape[axis], size)
                if known == size:
                    origin = origin.narrow(axis, 0, size)
                else:
                    origin = permute_rows(origin, {row: row for row in range(known)}, size, axis)
                    rows = Rows(torch.arange(known), torch.arange(known, size), axis)
            tensor, scores = (
                None if part is None else part.narrow(axis, 0, size) for part in (item.tensor, item.scores)
            )
            result[model] = replace(item, tensor=tensor, scores=scores, origin=origin, rows=rows)
        return result


class TrackedWriterTask(TensorWriterTask):  # type: ignore[misc]
    """mergekit's task that opens the output: in a temporary folder, which waits for shards still being written.

    Attributes:
        folder: The temporary folder.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    folder: OutputFolder

    def execute(self, **arguments: Any) -> Any:
        """Open the output."""
        writer = super().execute(**arguments)
        self.folder.settle = partial(_settle, writer)
        return writer


def _settle(writer: Any) -> None:
    """Wait for shards that are written in the background."""
    executor = getattr(writer, "_executor", None) if getattr(writer, "use_async", False) else None
    if executor is not None:
        executor.shutdown(wait=True)


def _permuted(tensor: Tensor | None, permutation: dict[int, int], size: int, axis: int) -> Tensor | None:
    return None if tensor is None else permute_rows(tensor, permutation, size, axis)


def shared_rows(own: dict[int, int], base: dict[int, int], rows: int, axis: int) -> Rows:
    """Return the rows of a re-ordered vocabulary by their owners: a model and the base, or the model alone.

    Args:
        own: New row -> old row of the model, negative where it lacks the token.
        base: New row -> old row of the base.
        rows: Number of rows; rows beyond the vocabulary are padding, which has no owner.
        axis: Axis of the vocabulary.

    Example:
        >>> shared_rows({0: 1, 1: 0, 2: -1}, {0: 0, 1: -1, 2: 1}, 4, axis=0)
        Rows(shared=tensor([0]), unbased=tensor([1, 3]), axis=0)
    """
    unbased = [row for row in range(rows) if base.get(row, -1) < 0]
    shared = [row for row in range(rows) if base.get(row, -1) >= 0 and own.get(row, -1) >= 0]
    return Rows(torch.tensor(shared, dtype=torch.int64), torch.tensor(unbased, dtype=torch.int64), axis)


def permute_rows(tensor: Tensor, permutation: dict[int, int], rows: int, axis: int) -> Tensor:
    """Re-order a tensor along the vocabulary; a row without a source is 0.

    Args:
        tensor: The tensor.
        permutation: New row -> old row, negative where the model lacks the token.
        rows: New number of rows.
        axis: Axis of the vocabulary.

    Returns:
        A new tensor with ``rows`` rows along ``axis``.
    """
    pairs = [(new, old) for new, old in permutation.items() if old >= 0]
    result = tensor.new_zeros([rows if i == axis else size for i, size in enumerate(tensor.shape)])
    if pairs:
        new, old = (torch.tensor(side, device=tensor.device) for side in zip(*pairs, strict=True))
        result.index_copy_(axis, new, tensor.index_select(axis, old))
    return result


def scheduled_names(executor: Any) -> list[str]:
    """Return the names of the tensors that our methods merge, in the order of an executor's schedule.

    Args:
        executor: mergekit's ``Executor``; one for several GPUs has no single schedule, and gets an empty list.
    """
    schedule = getattr(getattr(executor, "schedule", None), "tasks", ())
    tasks = [handle.task() for handle in schedule]
    return [task.output_weight.name for task in tasks if getattr(task, "method_name", None) in METHODS]
