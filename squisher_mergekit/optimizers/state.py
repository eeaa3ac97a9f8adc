"""The slots of an optimizer's state: one for each parameter it was given."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.optimizers.moments import Moment, moment_of

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Slot:
    """One parameter as the optimizer knows it.

    ``index``: its number in the file, or its name. ``name``: the name the file gives it, if any. ``moment``: None if
    the optimizer never stepped it; then ``tensor`` and ``steps`` are None too.
    """

    index: int | str
    name: str | None
    moment: Moment | None = None
    tensor: Tensor | None = None
    steps: int | None = None


@dataclass(frozen=True)
class OptimizerState:
    """The slots, group by group as the file has them, and the model saved in the same file, if any."""

    file: Path
    groups: tuple[tuple[Slot, ...], ...]
    model: Mapping[str, Tensor] | None

    @property
    def slots(self) -> Iterator[Slot]:
        """All slots in the order of their indices."""
        for group in self.groups:
            yield from group


def parse(loaded: Any, file: Path) -> OptimizerState:
    """Find the optimizer's state in what ``torch.load`` gave, and its slots.

    Accepts an optimizer's ``state_dict`` and a bundle that holds one beside a model.

    Args:
        loaded: Content of the file.
        file: For messages.

    Returns:
        The slots.

    Raises:
        UnsupportedStateError: There is no optimizer state in it, or several, or none with a second moment.
    """
    state = _find_state(loaded, file)
    groups = []
    for group in state["param_groups"]:
        names: list[str | None] = [unwrapped(name) for name in group.get("param_names", [])]
        names = names or [None] * len(group["params"])
        groups.append(
            tuple(
                _slot(index, name, state["state"].get(index), group, file)
                for index, name in zip(group["params"], names, strict=True)
            )
        )
    if not any(slot.moment for group in groups for slot in group):
        raise UnsupportedStateError(
            f"{file} must come from an optimizer that has stepped, but its state is empty; "
            "take a checkpoint saved after training has begun, by an optimizer such as AdamW (plain SGD keeps nothing)"
        )
    return OptimizerState(file, tuple(groups), None if state is loaded else _find_model(loaded))


def unwrapped(name: str) -> str:
    """Strip what DDP, torch.compile, FSDP and activation checkpointing put into a name.

    Example:
        >>> unwrapped("module._orig_mod.encoder._checkpoint_wrapped_module.weight")
        'encoder.weight'
    """
    for wrapper in _WRAPPERS[1:]:
        name = name.replace(wrapper, "")
    while name.startswith(_WRAPPERS[0]):
        name = name.removeprefix(_WRAPPERS[0])
    return name


def _slot(index: int | str, name: str | None, state: Any, group: Mapping[str, Any], file: Path) -> Slot:
    name = unwrapped(index) if isinstance(index, str) else name
    if not state:
        return Slot(index, name)
    moment = moment_of(state, group, f"{file} (parameter {index})")
    tensor = state[moment.key]
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise UnsupportedStateError(f"{moment.key} of parameter {index} in {file} must be a tensor of floats")
    step = state.get("step")
    return Slot(index, name, moment, tensor, None if step is None else int(step))


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("state"), Mapping)
        and isinstance(value.get("param_groups"), list)
        and all(isinstance(group, Mapping) and "params" in group for group in value["param_groups"])
    )


def _find_state(loaded: Any, file: Path) -> Any:
    if _is_state(loaded):
        return loaded
    found = []
    for value in loaded.values() if isinstance(loaded, Mapping) else [loaded]:
        inner = value if isinstance(value, list) else list(value.values()) if isinstance(value, Mapping) else []
        found += [value] if _is_state(value) else [item for item in inner if _is_state(item)]
    if len(found) != 1:
        what = "none" if not found else f"{len(found)} of them"
        raise UnsupportedStateError(
            f"{file} must hold one optimizer's state_dict (state and param_groups), found {what}; "
            "save optimizer.state_dict() to a file of its own"
        )
    return found[0]


def _find_model(loaded: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
    for value in loaded.values():
        if isinstance(value, Mapping) and value and all(isinstance(item, Tensor) for item in value.values()):
            return {unwrapped(name): tensor for name, tensor in value.items()}
    return None


def parameters_of(model: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return name -> shape of a saved model in its order, without integer buffers and second names of tied tensors."""
    seen, kept = set(), {}
    for name, tensor in model.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if tensor.is_floating_point() and (place not in seen or tensor.numel() == 0):
            seen.add(place)
            kept[name] = tensor.shape
    return kept
