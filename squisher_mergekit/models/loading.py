"""Tensors that a model of transformers loads: its keys, and the names on disk that fill each key."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from squisher_mergekit.models.checkpoint_names import model_of_config


@dataclass(frozen=True)
class FilledKeys:
    """Keys of a model that one tensor on disk fills.

    Attributes:
        keys: Names in memory; empty if the model has no place for the tensor.
        converted: True if loading converts the tensor, perhaps together with others.
    """

    keys: tuple[str, ...]
    converted: bool = False


class LoadableModel:
    """Parameters and persistent buffers of a model, by the rules of ``from_pretrained``.

    Args:
        module: A model of transformers, on any device.

    Attributes:
        module: The model.
        class_name: Name of its class.
        shapes: Key -> shape.
        buffers: Names of all buffers, computed ones too.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        state: Mapping[str, torch.Tensor] = module.state_dict(keep_vars=True)
        self.class_name = type(module).__name__
        self.shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        self.buffers = frozenset(name for name, _ in module.named_buffers(remove_duplicate=False))
        self._state = state
        owners: dict[int, str] = {}
        self._first = {key: owners.setdefault(id(tensor), key) for key, tensor in state.items()}
        declared: Mapping[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
        for key, partner in declared.items():
            if key in self._first and partner in self._first:
                self._first[key] = self._first[partner]

    def first_of_tied(self, key: str) -> str:
        """Return the first key of the tied tensors that a key belongs to; the key itself if it is not tied."""
        return self._first.get(key, key)

    def is_tied(self, name: str) -> bool:
        """Return True if the key of a tensor on disk is tied to another key, from whose tensor loading can fill it."""
        firsts = list(self._first.values())
        keys = self.fills([name])[name].keys
        return bool(keys) and all(firsts.count(self._first[key]) > 1 for key in keys)

    def is_copy(self, name: str) -> bool:
        """Return True for a tensor on disk whose key another tensor fills, as the keys are tied."""
        keys = self.fills([name])[name].keys
        return bool(keys) and all(self._first[key] != key for key in keys)

    def needed(self) -> dict[str, int]:
        """Return the keys that loading must fill, tied ones once, with the number of entries of each."""
        patterns = getattr(self.module, "_keys_to_ignore_on_load_missing", None) or ()
        found: dict[str, int] = {}
        for key, shape in self.shapes.items():
            if self._first[key] == key and not any(re.search(pattern, key) for pattern in patterns):
                found[key] = torch.Size(shape).numel()
        return found

    def is_ignored(self, name: str) -> bool:
        """Return True for a tensor on disk that loading leaves out by the rules of the model's class."""
        patterns = getattr(self.module, "_keys_to_ignore_on_load_unexpected", None) or ()
        if any(re.search(pattern, name) for pattern in patterns):
            return True
        # Older versions saved buffers that are computed now, some of them in another module.
        computed = self.buffers - self.shapes.keys()
        moved = ("position_ids", "inv_freq")
        ends = {_end(buffer, 1) for buffer in computed if buffer.endswith(moved)} | {_end(each, 2) for each in computed}
        return _end(name, 1) in ends or _end(name, 2) in ends

    def is_buffer(self, filled: FilledKeys) -> bool:
        """Return True if a tensor on disk fills buffers alone."""
        return bool(filled.keys) and all(key in self.buffers for key in filled.keys)

    def fills(self, names: Collection[str]) -> dict[str, FilledKeys]:
        """Return name on disk -> keys that loading fills from the tensor.

        Args:
            names: Names of all tensors in the files.
        """
        from transformers.core_model_loading import dot_natural_key

        return dict(self._fills(sorted(names, key=dot_natural_key)))

    def _fills(self, names: Collection[str]) -> Iterator[tuple[str, FilledKeys]]:
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping

        steps = get_model_conversion_mapping(self.module)
        renamings = [step for step in steps if isinstance(step, loading.WeightRenaming)]
        converters = [step for step in steps if isinstance(step, loading.WeightConverter)]
        targets = {source: step.target_patterns for step in converters for source in step.source_patterns}
        place = self.module.base_model_prefix, self._state
        for name in names:
            key, source = loading.rename_source_key(name, renamings, converters, *place)
            if key not in self._state and name in self._state:
                key, source = loading.rename_source_key(name, [], [], *place)
            keys = (key,) if source is None else _expanded(key, targets[source])
            yield name, FilledKeys(tuple(each for each in keys if each in self._state), source is not None)


def _end(name: str, parts: int) -> str:
    """Return the last parts of a name."""
    return ".".join(name.split(".")[-parts:])


def _expanded(key: str, targets: list[str]) -> tuple[str, ...]:
    """Return the keys that a conversion to several tensors fills; its first target is in the renamed key."""
    return tuple(dict.fromkeys([key, *(key.replace(targets[0], target) for target in targets)]))


def loadable(config: Any) -> LoadableModel | None:
    """Return the model that a configuration of transformers describes; None if its class cannot be built.

    Args:
        config: A ``PretrainedConfig``. Code that comes with a model is never run.
    """
    model: nn.Module | None
    try:
        model = model_of_config(config)
    except Exception:  # a config can make a model's constructor raise nearly anything
        return None
    return LoadableModel(model)
