"""Smaller networks, without their pruned units."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from squisher_mergekit.applications.pruning.modules import unmasked
from squisher_mergekit.applications.pruning.structured import UnitChoice, UnitSlice, unit_masks
from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.models.parameters import memory_name, unwrap_model

# Keys of the width of a feed-forward part in the configs of transformers.
_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim")


def shrink(model: nn.Module, choice: UnitChoice) -> nn.Module:
    """Return a copy of a model without its pruned units; its outputs are those of the model with these units at 0.

    A chain loses rows of the weights that make a unit and columns of those that read it; BatchNorm's statistics follow.
    A model of transformers is built from its config with fewer neurons or heads, the same number in every layer (choose
    with ``scope="layer"``), so that it can be saved and loaded.

    Args:
        model: The model, masked or not; it is not changed.
        choice: The units to keep.

    Returns:
        A new model, on the same device, in the same mode.

    Raises:
        MismatchError: The choice was made for another model.
        UnsupportedStateError: The architecture cannot be made smaller: its config has no key for the width, layers
            would differ, or units have no reader. :func:`~.structured.mask_units` sets such units to 0.

    Example:
        >>> from squisher_mergekit.applications.pruning.units import chain_units
        >>> model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> choice = UnitChoice(chain_units(model), {"0": torch.tensor([True, False, True])})
        >>> shrink(model, choice)
        Sequential(
          (0): Linear(in_features=5, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    inner: Any = unwrap_model(model)
    unit_masks(inner, choice)  # raises for a choice of another model
    unread = next((layer.name for layer in choice.units if not layer.read), None)
    if unread is not None:
        raise UnsupportedStateError(
            f"the reader of a unit must be known for a network to be made smaller, but that of {unread} is unknown; "
            "mask_units makes the units 0"
        )
    small = _plain_copy(inner)
    if hasattr(inner, "config") and hasattr(inner, "save_pretrained"):
        return _of_transformers(small, choice)
    cut = _cut(_state(small), choice)
    for name in _touched(choice):
        path, _, attribute = name.rpartition(".")
        module: Any = small.get_submodule(path)
        if attribute in module._parameters:
            old = module._parameters[attribute]
            module._parameters[attribute] = nn.Parameter(cut[name], requires_grad=old.requires_grad)
        else:
            module._buffers[attribute] = cut[name]
    for path in {name.rpartition(".")[0] for name in _touched(choice)}:
        _note_sizes(small.get_submodule(path))
    return small


def _slices(choice: UnitChoice) -> list[tuple[UnitSlice, Tensor]]:
    """Return every slice with the mask of its units."""
    return [
        (part, choice.kept[layer.name]) for layer in choice.units for part in (*layer.made, *layer.read, *layer.buffers)
    ]


def _touched(choice: UnitChoice) -> list[str]:
    """Return the names of the tensors that lose entries."""
    return list(dict.fromkeys(part.tensor for part, _ in _slices(choice)))


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, without the wrappers of inner modules."""
    return {memory_name(name): tensor for name, tensor in model.state_dict().items()}


def _cut(tensors: Mapping[str, Tensor], choice: UnitChoice) -> dict[str, Tensor]:
    """Return the tensors without the entries of pruned units."""
    masks: dict[tuple[str, int], Tensor] = {}
    for part, kept in _slices(choice):
        size = tensors[part.tensor].shape[part.axis]
        # Several slices of one axis (queries, keys and values in one layer) are cut together.
        earlier = masks.get((part.tensor, part.axis), torch.ones(size, dtype=torch.bool, device="cpu"))
        masks[part.tensor, part.axis] = earlier & part.axis_mask(kept, size)
    cut = dict(tensors)
    for (name, axis), kept in masks.items():
        cut[name] = cut[name].index_select(axis, kept.nonzero()[:, 0].to(cut[name].device))
    return cut


def _note_sizes(module: Any) -> None:
    """Set the size attributes of a layer to those of its weights."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif hasattr(module, "num_features"):
        module.num_features = len(module.weight)


def _plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy in which the masks of ``torch.nn.utils.prune`` are permanent."""
    with unmasked(model):
        copied = copy.deepcopy(model)
    for module in copied.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, BasePruningMethod):
                name = hook._tensor_name
                parameter: Any = module._parameters[name]
                parameter.data.mul_(module._buffers.pop(f"{name}_mask"))
                del module._forward_pre_hooks[key]
    return copied


def _of_transformers(model: Any, choice: UnitChoice) -> nn.Module:
    """Return a model from a config with fewer units, with the remaining weights."""
    widths = set(choice.widths.values())
    counts = {layer.count for layer in choice.units}
    if len(widths) > 1 or len(counts) > 1:
        raise UnsupportedStateError(
            f"the config of {type(model).__name__} has one width for all layers, but between {min(widths)} and "
            f'{max(widths)} units would be left; choose with scope="layer", or set them to 0 by mask_units'
        )
    state = _cut(_state(model), choice)
    config = _config_of(model, {name: tensor.shape for name, tensor in state.items()}, counts.pop(), widths.pop())
    small: Any = type(model)._from_config(config, dtype=model.dtype)
    small.load_state_dict(state)
    for (_, new), (_, old) in zip(small.named_parameters(), model.named_parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    if getattr(model, "generation_config", None) is not None:
        small.generation_config = copy.deepcopy(model.generation_config)
    return small.to(model.device).train(model.training)  # type: ignore[no-any-return]


def _config_of(model: Any, shapes: Mapping[str, torch.Size], count: int, kept: int) -> Any:
    """Return the config of a model with weights of these shapes, by trial of candidates.

    Raises:
        UnsupportedStateError: No candidate fits, or transformers refuses to load it.
    """
    why = "it has no key for the width; heads need an own head_dim"
    for values in _changes(model.config, count, kept):
        config = copy.deepcopy(model.config)
        try:
            for key, value in values.items():
                setattr(config, key, value)
            config = type(config).from_dict(config.to_dict())  # from_pretrained does the same, with its checks
            with torch.device("meta"):
                sketch = type(model)(config)
        except Exception as error:  # configs and constructors raise errors of any class
            why = f"{values} is refused: {str(error).splitlines()[-1].strip()}"
            continue
        if {name: tensor.shape for name, tensor in sketch.state_dict().items()} == shapes:
            return config
    raise UnsupportedStateError(
        f"the config of {type(model).__name__} must describe the smaller model, so that it can be saved, but {why}; "
        "keep another number of units, or mask_units makes the units 0"
    )


def _changes(config: Any, count: int, kept: int) -> list[dict[str, int]]:
    """Return candidate changes of a config for the smaller model."""
    keys = [key for key in _WIDTHS if hasattr(config, key) and getattr(config, key) in (count, None)]
    found = [{key: kept} for key in keys]
    if len(keys) > 1:
        found.append(dict.fromkeys(keys, kept))
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads and groups == count and hasattr(config, "head_dim"):
        width = config.head_dim or config.hidden_size // heads
        found.append({"num_attention_heads": heads // count * kept, "num_key_value_heads": kept, "head_dim": width})
    return found
