"""Head and buffers of a model: tensors without a pre-trained value, and tensors that are no weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.models.convert import store_moments
from squisher_mergekit.models.names import CheckpointNames
from squisher_mergekit.models.parameters import describe, memory_name, memory_names, parameters_of, unwrap_model
from squisher_mergekit.models.roles import output_parameters
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.tensors.safetensors import MemoryStore

# Names of heads, for folders without a config to build the model from.
_HEAD = re.compile(r"^(classifier|score|qa_outputs|head)\.")
_MEMORY = Path("memory")


@dataclass(frozen=True)
class ModelParts:
    """Names on disk of special tensors.

    Attributes:
        heads: Tensors of the head.
        buffers: Buffers, such as the running statistics of BatchNorm.
    """

    heads: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()


def parts_on_disk(weights: Weights) -> ModelParts:
    """Return the head and the buffers of the weights in a folder.

    The model that ``config.json`` describes tells them. If that model cannot be built, the head is ``classifier``,
    ``score``, ``qa_outputs`` or ``head``, and buffers count as weights.
    """
    return parts_by_name(weights.infos) if weights.outline is None else _parts(*weights.outline, weights.infos)


def parts_by_name(names: Iterable[str]) -> ModelParts:
    """Return the tensors with the name of a head.

    Example:
        >>> parts_by_name(["bert.pooler.dense.weight", "classifier.weight"]).heads
        frozenset({'classifier.weight'})
    """
    return ModelParts(frozenset(name for name in names if _HEAD.search(name)))


def in_memory(model: nn.Module) -> tuple[Weights, ModelParts]:
    """Return the weights of a model in memory by their names on disk, and its head and buffers.

    Raises:
        UnsupportedStateError: The model is not saved whole (an adapter, FSDP1).
    """
    inner = unwrap_model(model)
    checkpoint_names = describe(model).checkpoint_names
    if checkpoint_names is None:
        raise UnsupportedStateError(
            f"a model must be saved whole to be chosen from, but {type(inner).__name__} is not; merge its adapter, or "
            "gather it first"
        )
    by_name = {name: parameter.detach() for name, parameter in parameters_of(inner).items()}
    stored = store_moments(str(_MEMORY), by_name, checkpoint_names, ())
    tensors = {name: stored.read(name) for name in stored.infos}
    known = {name for name, _ in inner.named_parameters(remove_duplicate=False)}
    tensors |= {memory_name(name): tensor.detach() for name, tensor in inner.state_dict().items() if name not in known}
    return weights_in_memory(tensors), _parts(inner, checkpoint_names, tensors)


def weights_in_memory(tensors: Mapping[str, Tensor]) -> Weights:
    """Return tensors as weights without a folder."""
    return Weights(_MEMORY, store=MemoryStore(tensors))


def _parts(model: nn.Module, checkpoint_names: CheckpointNames, names: Iterable[str]) -> ModelParts:
    heads, known = _head_parameters(model), memory_names(model)
    in_head = {known[number] for number in heads}
    stored = {name: checkpoint_names.sources.get(checkpoint_names.aliases.get(name, name), ()) for name in names}
    return ModelParts(
        frozenset(name for name, sources in stored.items() if sources and set(sources) <= in_head),
        frozenset(name for name, sources in stored.items() if not sources),
    )


def _head_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the head's parameters; the output layer of a language model is pre-trained, so no head."""
    last = getattr(model, "get_output_embeddings", lambda: None)()
    return set() if isinstance(last, nn.Module) else output_parameters(model)
