"""Input axis of each weight: the axis along which n:m sparsity patterns run."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from squisher_mergekit.models.names import CheckpointNames
from squisher_mergekit.models.parameters import memory_name
from squisher_mergekit.models.weights import Weights

Shapes = Mapping[str, tuple[int, ...]]
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def input_axes(model: nn.Module, checkpoint_names: CheckpointNames, shapes: Shapes) -> dict[str, int | None]:
    """Return the input axis of each weight, by the class of the module that owns the weight.

    Weights of linear layers are [out, in], of GPT-2's Conv1D [in, out], of convolutions [out, in, ...], of transposed
    convolutions [in, out, ...]. Packed experts have an attribute ``is_transposed``.

    Args:
        model: The model, unwrapped.
        checkpoint_names: The model's names in memory and on disk.
        shapes: Name on disk -> shape.

    Returns:
        Name on disk -> axis; None where the axis is not known.
    """
    owners = _owners(model)
    axes = {}
    for name, shape in shapes.items():
        sources = checkpoint_names.sources.get(checkpoint_names.aliases.get(name, name), ())
        axes[name] = _of_module(owners.get(sources[0]) if sources else None, shape)
    return axes


def axes_in_memory(model: nn.Module, shapes: Shapes) -> dict[str, int | None]:
    """Return the input axis of parameters, see :func:`input_axes`.

    Args:
        model: The model, unwrapped.
        shapes: Name in memory -> shape of the parameters asked for.

    Example:
        >>> axes_in_memory(nn.Linear(2, 3), {"weight": (3, 2)})
        {'weight': 1}
    """
    owners = _owners(model)
    return {name: _of_module(owners.get(name), shape) for name, shape in shapes.items()}


def axes_on_disk(weights: Weights, shapes: Shapes) -> dict[str, int | None]:
    """Return the input axis of each weight in a folder; without a ``config.json`` matrices count as [out, in].

    Args:
        weights: The weights.
        shapes: Name on disk -> shape of the tensors asked for.
    """
    if weights.outline is None:
        return {name: _by_shape(shape) for name, shape in shapes.items()}
    return input_axes(*weights.outline, shapes)


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    """Return name in memory -> module that owns the parameter."""
    return {
        memory_name(f"{path}.{name}" if path else name): module
        for path, module in model.named_modules()
        for name in module._parameters
    }


def _of_module(module: nn.Module | None, shape: tuple[int, ...]) -> int | None:
    if len(shape) < 2:
        return None
    if type(module).__name__ == "Conv1D" or isinstance(module, _TRANSPOSED):
        return 0
    if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        return 1
    transposed = getattr(module, "is_transposed", None)
    if len(shape) == 3 and isinstance(transposed, bool):
        return 1 if transposed else 2
    return _by_shape(shape)


def _by_shape(shape: tuple[int, ...]) -> int | None:
    # A tensor with three axes can hold experts of either orientation.
    return 1 if len(shape) in (2, 4, 5) else None
