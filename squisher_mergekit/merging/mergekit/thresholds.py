"""First pass of a merge with ``density_scope: model``: the thresholds of whole models, read tensor by tensor."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.merge_methods.base import TensorGroup
from mergekit.tokenizer import BuildTokenizer
from pydantic import ConfigDict
from torch import Tensor

from squisher_mergekit.merging.density import Trim
from squisher_mergekit.merging.mergekit.inputs import from_memory, is_origin_only, trim_of
from squisher_mergekit.merging.read import LoadedFisher
from squisher_mergekit.merging.run import Run
from squisher_mergekit.merging.votes.options import VoteOptions
from squisher_mergekit.merging.votes.threshold import Choice, model_choices
from squisher_mergekit.tensors.freed_memory import give_back, keep_blocks

_GIVE_BACK = 1 << 24  # entries of tensors that are read before their memory is given back
Cuts: TypeAlias = Mapping[Any, Mapping[str, Choice]]


@dataclass(frozen=True)
class TrimmedTensor:
    """One output tensor with models that are trimmed.

    Attributes:
        name: Name of the tensor.
        models: The trimmed models.
        entries: Number of entries, for the choice of a sample.
        trims: Function that returns the choice of each trimmed model.
    """

    name: str
    models: frozenset[Any]
    entries: int
    trims: Callable[[], Mapping[Any, Trim]]


def find_choices(tensors: Sequence[TrimmedTensor], densities: Mapping[Any, float]) -> Cuts:
    """Find the thresholds of whole models; one output tensor is in memory at a time.

    Args:
        tensors: The output tensors with trimmed models, in their order.
        densities: Model -> share of its entries that is kept.
    """

    def read(wanted: frozenset[Any] | None) -> Iterator[tuple[Any, str, Callable[[int], Iterator[Tensor]]]]:
        passed = 0
        for tensor in tensors:
            if wanted is None or wanted & tensor.models:
                for model, trim in tensor.trims().items():
                    if wanted is None or model in wanted:
                        yield model, tensor.name, trim.blocks
                # The few scores that stay lie between the blocks of tensors that are freed.
                passed += tensor.entries
                if passed > _GIVE_BACK:
                    passed = 0
                    give_back()

    keep_blocks()
    entries = {model: sum(each.entries for each in tensors if model in each.models) for model in densities}
    with torch.no_grad():
        return model_choices(read, densities, entries)


class ThresholdTask(Task[Cuts]):  # type: ignore[misc]
    """Thresholds of the models of a merge, found before its first tensor is merged.

    Attributes:
        run: The merge, with the tasks of its tensors.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    run: Run

    def arguments(self) -> dict[str, Task[Any]]:
        """Return no tasks: tensors are read one after the other."""
        return {}

    def main_thread_only(self) -> bool:
        """Return True: the task comes before those that several accelerators share."""
        return True

    def priority(self) -> int:
        """Return a high priority: no tensor can be merged before."""
        return 10000

    def execute(self, **_: Any) -> Cuts:
        """Find the thresholds.

        Raises:
            RefusedError: A tensor cannot be read.
        """
        known: dict[Task[Any], Any] = {}
        tensors = [
            TrimmedTensor(name, models, entries, lambda task=task: _trims(task, known))  # type: ignore[misc]
            for name, models, entries, task in self.run.trimmed
        ]
        found = find_choices(tensors, self.run.densities)
        give_back()
        self.run.record_choices({str(model): choices for model, choices in found.items()})
        return found


def _trims(task: Any, known: dict[Task[Any], Any]) -> dict[ModelReference, Trim]:
    """Return the choice of each trimmed model of a task, on the CPU."""
    arguments = {key: _value_of(part, known) for key, part in task.inputs().items()}
    tensors = {model: tensor.cpu() for model, tensor in arguments.pop("tensors").items()}
    vocabularies = arguments.pop("tokenizer_info", None)
    loaded = task.load(vocabularies, {key: origin.cpu() for key, origin in arguments.items()}, tensors)
    options = VoteOptions.of(dict(task.parameters.items()))
    present = [model for model in task.model_order if model in tensors]
    base = tensors.get(task.base_model)
    found = {}
    for place, model in enumerate(present):
        trim = None
        if model != task.base_model and task.input_parameters[model]["weight"] > 0:
            trim = trim_of(tensors[model], task.output_weight.name, loaded[model], base, options, place)
        if trim is not None:
            found[model] = trim
    return found


def _value_of(task: Task[Any], known: dict[Task[Any], Any]) -> Any:
    """Run a task and those that it needs; the tokenizers are built once."""
    if task in known:
        return known[task]
    value = task.execute(**{key: _value_of(part, known) for key, part in task.arguments().items()})
    if isinstance(task, BuildTokenizer):
        known[task] = value
    return value


def choices_in_memory(
    groups: Sequence[TensorGroup], parameters: Sequence[Mapping[str, Any]], method: str
) -> dict[Any, dict[str, Choice]]:
    """Find the thresholds of models whose tensors are in memory.

    Args:
        groups: The tensors, one group an output.
        parameters: Parameters of each group.
        method: Name of the merge method.

    Returns:
        Input -> name of the tensor -> choice.
    """
    tensors, densities = [], dict[Any, float]()
    for group, given in zip(groups, parameters, strict=True):
        trimmed = [
            entry
            for entry in group.entries
            if given["density"][entry.id] < 1 and given["weight"][entry.id] > 0 and not entry.is_base
        ]
        densities |= {entry.id: given["density"][entry.id] for entry in trimmed}
        name, models = group.metadata.name or "the tensor", frozenset(entry.id for entry in trimmed)
        if trimmed and group.entries[0].tensor.is_floating_point():
            size = group.entries[0].tensor.numel()
            trims = _trims_in_memory(group, name, given, method)
            tensors.append(TrimmedTensor(name, models, size, trims))
    return {model: dict(found) for model, found in find_choices(tensors, densities).items()} if tensors else {}


def _trims_in_memory(
    group: TensorGroup, name: str, given: Mapping[str, Any], method: str
) -> Callable[[], dict[Any, Trim]]:
    def trims() -> dict[Any, Trim]:
        options, start = VoteOptions.of(given), None if group.base is None else group.base.tensor
        summed = replace(group, entries=[entry for entry in group.entries if not is_origin_only(entry, given, method)])
        loaded: dict[Any, LoadedFisher] = from_memory(summed, name, given, method)
        found = {}
        for place, entry in enumerate(summed.entries):
            if not entry.is_base and given["weight"][entry.id] > 0 and entry.id in loaded:
                trim = trim_of(entry.tensor, name, loaded[entry.id], start, options, place)
                if trim is not None:
                    found[entry.id] = trim
        return found

    return trims
