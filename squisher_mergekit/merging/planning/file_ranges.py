"""Parts of files that the merge of a tensor reads."""

from collections.abc import Iterator

from squisher_mergekit.merging.planning.records import TensorPlan
from squisher_mergekit.tensors.read_ahead import FileRange
from squisher_mergekit.tensors.safetensors import file_ranges


def ranges_of(plan: TensorPlan) -> list[FileRange]:
    """Return the parts of safetensors files with the weights and the Fishers of a tensor, each once.

    A tensor that is built from others, or is in a pickle, has none.
    """
    return list(dict.fromkeys(_ranges(plan)))


def _ranges(plan: TensorPlan) -> Iterator[FileRange]:
    """Yield the parts of the weights, then those of the Fishers."""
    for item in plan.inputs:
        if item.stored is not None and item.model.weights.files:
            yield from file_ranges(item.model.weights.store, item.stored)
    for use in plan.uses:
        if use.opened is not None and not use.converted:
            yield from use.opened.fisher.file_ranges(use.name)
