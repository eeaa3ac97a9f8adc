"""Which tensors of a model are its head, which no pre-trained model has, and which are no weights at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.models.checkpoint_names import CheckpointNames
from squisher_mergekit.models.convert import store_moments
from squisher_mergekit.models.parameters import describe, memory_names, parameters_of, unwrap_model
from squisher_mergekit.models.roles import output_parameters
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.tensors.safetensors import MemoryStore

# Where there is no config to build the model from, names must do.
_HEAD = re.compile(r"^(classifier|score|qa_outputs|head)\.")
_MEMORY = Path("memory")


@dataclass(frozen=True)
class Parts:
    """Names on disk: of the head, and of buffers, such as the running statistics of BatchNorm."""

    heads: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()


def parts_on_disk(weights: Weights) -> Parts:
    """Return head and buffers of the weights in a folder.

    The model is built from its ``config.json``, without weights, to tell them. Where that cannot be done, the head is
    what is called ``classifier``, ``score``, ``qa_outputs`` or ``head``, and buffers are not told from weights.
    """
    return parts_by_name(weights.infos) if weights.outline is None else _parts(*weights.outline, weights.infos)


def parts_by_name(names: Iterable[str]) -> Parts:
    """Return what is called as a head is.

    Example:
        >>> parts_by_name(["bert.pooler.dense.weight", "classifier.weight"]).heads
        frozenset({'classifier.weight'})
    """
    return Parts(frozenset(name for name in names if _HEAD.search(name)))


def in_memory(model: nn.Module) -> tuple[Weights, Parts]:
    """Return a live model's weights by the names that they have on disk, its head and its buffers.

    Raises:
        UnsupportedStateError: It is none that is saved whole (an adapter, FSDP1).
    """
    inner = unwrap_model(model)
    bones = describe(model).checkpoint_names
    if bones is None:
        raise UnsupportedStateError(
            f"a model must be saved whole to be chosen from, but {type(inner).__name__} is not; merge its adapter, or "
            "gather it first"
        )
    by_name = {name: parameter.detach() for name, parameter in parameters_of(inner).items()}
    stored = store_moments(str(_MEMORY), by_name, bones, ())
    tensors = {name: stored.read(name) for name in stored.infos}
    known = {name for name, _ in inner.named_parameters(remove_duplicate=False)}
    tensors |= {name: tensor.detach() for name, tensor in inner.state_dict().items() if name not in known}
    return of_tensors(tensors), _parts(inner, bones, tensors)


def of_tensors(tensors: Mapping[str, Tensor]) -> Weights:
    """Return tensors in memory as weights, without a folder."""
    return Weights(_MEMORY, store=MemoryStore(tensors))


def _parts(model: nn.Module, bones: CheckpointNames, names: Iterable[str]) -> Parts:
    heads, known = _head_parameters(model), memory_names(model)
    in_head = {known[number] for number in heads}
    stored = {name: bones.sources.get(bones.aliases.get(name, name), ()) for name in names}
    return Parts(
        frozenset(name for name, sources in stored.items() if sources and set(sources) <= in_head),
        frozenset(name for name, sources in stored.items() if not sources),
    )


def _head_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the head's parameters; a language model's output layer was pre-trained and is none."""
    last = getattr(model, "get_output_embeddings", lambda: None)()
    return set() if isinstance(last, nn.Module) else output_parameters(model)
