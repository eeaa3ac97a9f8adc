"""Conversion of a Fisher from checkpoint names to the parameter names of a model in memory."""

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.fisher.config import Scaling
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.names import CheckpointNames
from squisher_mergekit.models.parameters import describe, parameters_of, unwrap_model
from squisher_mergekit.tensors.safetensors import check_shape

Read = Callable[[str], Tensor]


def by_parameter(model: nn.Module, fisher: Mapping[str, Tensor], scaling: Scaling = "debiased") -> dict[str, Tensor]:
    """Return the tensors of a Fisher by parameter name in memory, each shaped like its parameter.

    Args:
        model: The model, of transformers, peft or plain torch; wrapped or not.
        fisher: A :class:`Fisher` with checkpoint names, or a mapping with names in memory, which is taken unscaled.
        scaling: The scale of a :class:`Fisher`'s tensors (see :meth:`~squisher_mergekit.Fisher.scaled`).

    Returns:
        Parameter name in memory -> tensor. Parameters without a Fisher are absent.

    Raises:
        MismatchError: A name in the Fisher is not in the model, or a shape differs.
        ConfigError: The scaling needs a number that the metadata lack.

    Example:
        >>> by_parameter(nn.Linear(2, 1), {"weight": torch.tensor([[1.0, 4.0]])})
        {'weight': tensor([[1., 4.]])}
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters_of(model).items()}
    if isinstance(fisher, Fisher):
        location, known = fisher.location, set()

        def scaled(name: str) -> Tensor:
            known.add(fisher.resolve(name) or name)
            return fisher.scaled(name, scaling)

        tensors, _ = in_memory(model, fisher, scaled)
    else:
        location, known, tensors = "memory", set(shapes), dict(fisher)
    unknown = next((name for name in fisher if name not in known), None)
    if unknown is not None:
        raise MismatchError(
            f"the names of a Fisher must be those of the model's parameters, but {unknown} in {location} is none of "
            f"{type(unwrap_model(model)).__name__}'s; give the Fisher of this model"
        )
    for name, tensor in tensors.items():
        check_shape(name, tuple(tensor.shape), shapes[name], location)
    return tensors


def in_memory(model: nn.Module, fisher: Fisher, read: Read | None = None) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the tensors of a Fisher and their numbers of steps, both by parameter name in memory.

    Args:
        model: The model.
        fisher: The Fisher, with checkpoint names.
        read: Function from checkpoint name to tensor; by default it returns the raw tensor.
    """
    described = describe(model, set(fisher))
    names: Mapping[str, str] = described.adapter or {name: name for name in described.names.values()}
    read = read or fisher.__getitem__
    if described.checkpoint_names is not None:
        return _restored(fisher, described.checkpoint_names, read)
    found = {name: key for name, key in names.items() if key in fisher}
    tensors = {name: read(key) for name, key in found.items()}
    return tensors, {name: fisher.config.steps_of(key) or 0 for name, key in found.items()}


def _restored(
    fisher: Fisher, checkpoint_names: CheckpointNames, read: Read
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Invert the conversion to checkpoint tensors, by converting the index of each entry in place of its value."""
    keys: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key, sources in checkpoint_names.sources.items():
        keys[sources].append(key)
    shapes = {parameter.name: parameter.shape for parameter in checkpoint_names.parameters}
    tensors, steps = {}, {}
    for sources, stored in keys.items():
        if not all(_found(fisher, key, checkpoint_names) for key in stored):
            continue
        sizes = [torch.Size(shapes[source]).numel() for source in sources]
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        indices = checkpoint_names.convert(
            {
                source: torch.arange(start, start + size, device="cpu").reshape(shapes[source])
                for source, start, size in zip(sources, starts, sizes, strict=True)
            }
        )
        names = {key: _found(fisher, key, checkpoint_names) or key for key in stored}
        parts = {key: read(name) for key, name in names.items()}
        first = parts[stored[0]]  # of a Fisher in memory it can be on a GPU
        dtype = torch.promote_types(first.dtype, torch.float32)
        whole = torch.empty(sum(sizes), dtype=dtype, device=first.device)
        for key, part in parts.items():
            check_shape(key, tuple(part.shape), tuple(indices[key].shape), fisher.location)
            whole[indices[key].reshape(-1).to(whole.device)] = part.reshape(-1).to(whole)
        for source, start, size in zip(sources, starts, sizes, strict=True):
            tensors[source] = whole[start : start + size].reshape(shapes[source])
            steps[source] = min(fisher.config.steps_of(name) or 0 for name in names.values())
    return tensors, steps


def _found(fisher: Fisher, key: str, checkpoint_names: CheckpointNames) -> str | None:
    """Return the name of a checkpoint tensor in a Fisher, which may be the name of a tied tensor."""
    tied = (key, *(alias for alias, kept in checkpoint_names.aliases.items() if kept == key))
    return next((name for name in tied if name in fisher), None)
