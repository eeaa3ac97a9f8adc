"""A Fisher, which has the names of files, under the names that a live model's parameters have in memory."""

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.fisher.config import Scaling
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.checkpoint_names import CheckpointNames
from squisher_mergekit.models.parameters import describe, parameters_of, unwrap_model
from squisher_mergekit.tensors.safetensors import check_shape

Read = Callable[[str], Tensor]


def by_parameter(model: nn.Module, fisher: Mapping[str, Tensor], scaling: Scaling = "debiased") -> dict[str, Tensor]:
    """Return a Fisher by the names that a model's parameters have in memory, each shaped like its parameter.

    Args:
        model: Of transformers or peft, or any other; wrapped or not.
        fisher: A Fisher, whose names are those of the files; or a mapping by the names in memory, taken as it is.
        scaling: Of a Fisher's tensors (see :meth:`~squisher_mergekit.Fisher.scaled`).

    Returns:
        Name -> tensor, of the parameters that have one.

    Raises:
        MismatchError: A name of the Fisher is none of the model's, or a shape differs.
        ConfigError: A number that the scaling needs is not recorded.

    Example:
        >>> by_parameter(nn.Linear(2, 1), {"weight": torch.tensor([[1.0, 4.0]])})
        {'weight': tensor([[1., 4.]])}
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters_of(model).items()}
    place = fisher.location if isinstance(fisher, Fisher) else "memory"
    found, known = dict(fisher) if not isinstance(fisher, Fisher) else {}, set(shapes)
    if isinstance(fisher, Fisher):
        read: set[str] = set()

        def scaled(name: str) -> Tensor:
            read.add(fisher.resolve(name) or name)
            return fisher.scaled(name, scaling)

        found, _ = in_memory(model, fisher, scaled)
        known = read
    strange = next((name for name in fisher if name not in known), None)
    if strange is not None:
        raise MismatchError(
            f"the names of a Fisher must be those of the model's parameters, but {strange} in {place} is none of "
            f"{type(unwrap_model(model)).__name__}'s; give the Fisher of this model"
        )
    for name, tensor in found.items():
        check_shape(name, tuple(tensor.shape), shapes[name], place)
    return found


def in_memory(model: nn.Module, fisher: Fisher, read: Read | None = None) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return a Fisher's tensors, and the steps behind them, by the names that a model's parameters have in memory.

    Args:
        model: The model.
        fisher: By the names on disk.
        read: Returns a tensor by its name on disk; by default the raw one.
    """
    described = describe(model, set(fisher))
    names: Mapping[str, str] = described.adapter or {name: name for name in described.names.values()}
    read = read or fisher.__getitem__
    if described.checkpoint_names is not None:
        return _undone(fisher, described.checkpoint_names, read)
    found = {name: key for name, key in names.items() if key in fisher}
    tensors = {name: read(key) for name, key in found.items()}
    return tensors, {name: fisher.config.steps_of(key) or 0 for name, key in found.items()}


def _undone(fisher: Fisher, checkpoint_names: CheckpointNames, read: Read) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Undo the way to disk: what is sent through it are the places of the entries, which tell where each one went."""
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
        places = checkpoint_names.convert(
            {
                source: torch.arange(start, start + size).reshape(shapes[source])
                for source, start, size in zip(sources, starts, sizes, strict=True)
            }
        )
        names = {key: _found(fisher, key, checkpoint_names) or key for key in stored}
        parts = {key: read(name) for key, name in names.items()}
        whole = torch.empty(sum(sizes), dtype=torch.promote_types(parts[stored[0]].dtype, torch.float32))
        for key, part in parts.items():
            check_shape(key, tuple(part.shape), tuple(places[key].shape), fisher.location)
            whole[places[key].reshape(-1)] = part.reshape(-1).to(whole.dtype)
        for source, start, size in zip(sources, starts, sizes, strict=True):
            tensors[source] = whole[start : start + size].reshape(shapes[source])
            steps[source] = min(fisher.config.steps_of(name) or 0 for name in names.values())
    return tensors, steps


def _found(fisher: Fisher, key: str, checkpoint_names: CheckpointNames) -> str | None:
    """Return the name that a Fisher has for a stored tensor, perhaps that of one tied to it."""
    same = (key, *(alias for alias, kept in checkpoint_names.aliases.items() if kept == key))
    return next((name for name in same if name in fisher), None)
