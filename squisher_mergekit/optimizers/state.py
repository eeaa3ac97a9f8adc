"""The slots of an optimizer's state: one for each parameter it was given."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from squisher_mergekit.errors import CorruptFileError, UnsupportedStateError
from squisher_mergekit.optimizers.moments import Moment, moment_of, nothing_kept, unwrapped_state
from squisher_mergekit.optimizers.values import Blockwise, RowsAndColumns, Stored

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_LIGHTNING = "pytorch-lightning_version"
_MODEL_KEYS = ("model", "model_state_dict", "state_dict", "module")


@dataclass(frozen=True)
class Slot:
    """One parameter as the optimizer knows it.

    ``index``: its number in the file, or its name. ``name``: the name the file gives it, if any. ``moment``: None if
    the optimizer never stepped it; then ``tensor`` and ``steps`` are None too.
    """

    index: int | str
    name: str | None
    moment: Moment | None = None
    tensor: Stored | None = None
    steps: int | None = None


@dataclass(frozen=True)
class OptimizerState:
    """The slots, group by group as the file has them, and the model saved in the same file, if any.

    ``layout``: whose file it is, where its content tells.
    """

    file: Path
    groups: tuple[tuple[Slot, ...], ...]
    model: Mapping[str, Tensor] | None = None
    layout: str | None = None

    @property
    def slots(self) -> Iterator[Slot]:
        """All slots in the order of their indices."""
        for group in self.groups:
            yield from group

    @property
    def named(self) -> bool:
        """Whether the file itself names every parameter."""
        return all(slot.name is not None for slot in self.slots)


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
        CorruptFileError: Its groups and its state contradict each other.
    """
    state = _find_state(loaded, file)
    groups = tuple(tuple(_slots(group, state["state"], file)) for group in state["param_groups"])
    _check(groups, state, file)
    model = None if state is loaded else _find_model(loaded)
    if isinstance(loaded, Mapping) and _LIGHTNING in loaded:
        return OptimizerState(file, groups, None if model is None else _without_attribute(model), "lightning")
    return OptimizerState(file, groups, model)


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


def _without_attribute(model: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Strip the attribute under which a LightningModule holds its model, if it holds nothing else."""
    attributes = {name.partition(".")[0] for name in model}
    nested = len(attributes) == 1 and all("." in name for name in model)
    return {name.partition(".")[2] if nested else name: tensor for name, tensor in model.items()}


def parameters_of(model: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of a saved model in its order, without second names of tied tensors and known buffers.

    Buffers of floats other than a batch norm's stay: there is no telling them from parameters here.
    """
    seen, kept = set(), {}
    for name, tensor in model.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        buffer = not tensor.is_floating_point() or name.endswith(("running_mean", "running_var"))
        if not buffer and (place not in seen or tensor.numel() == 0):
            seen.add(place)
            kept[name] = tuple(tensor.shape)
    return kept


def _slots(group: Mapping[str, Any], state: Mapping[Any, Any], file: Path) -> Iterator[Slot]:
    indices, names = group["params"], group.get("param_names") or [None] * len(group["params"])
    if len(names) != len(indices):
        raise CorruptFileError(
            f"a group in {file} must have one of param_names for each of its {len(indices)} parameters, "
            f"found {len(names)}; save it again"
        )
    for index, given in zip(indices, names, strict=True):
        name = index if isinstance(index, str) else given
        yield _slot(index, None if name is None else unwrapped(str(name)), state.get(index), group, file)


def _slot(index: int | str, name: str | None, state: Any, group: Mapping[str, Any], file: Path) -> Slot:
    if not isinstance(state, Mapping) or not state:
        return Slot(index, name)
    state = unwrapped_state(state)
    moment = moment_of(state, group, f"{file} (parameter {index})")
    tensor = _stored(state, moment, f"parameter {index} in {file}")
    step = state.get("step", group.get("step"))
    if step is not None and int(step) == 0:  # Adagrad makes its accumulators before the first step
        return Slot(index, name)
    return Slot(index, name, moment, tensor, None if step is None else int(step))


def _stored(state: Mapping[str, Any], moment: Moment, place: str) -> Stored:
    """Return the second moment as it is kept."""
    if moment.key == "state2" and "qmap2" in state:
        parts = [state[key] for key in ("state2", "qmap2", "absmax2") if isinstance(state.get(key), Tensor)]
        blocks = Blockwise(*parts) if len(parts) == 3 else None
        if blocks is None or not blocks.fits():
            raise CorruptFileError(
                f"state2 of {place} must be 8-bit codes with 256 levels and one scale for each 256 entries, but its "
                "parts do not belong together; save it again"
            )
        return blocks
    for key in (moment.key, moment.columns):
        tensor = None if key is None else state[key]
        # A subclass may hold codes, or a part of the tensor; this version reads plain tensors alone.
        if key is not None and (type(tensor) is not Tensor or not tensor.is_floating_point()):
            raise UnsupportedStateError(
                f"{key} of {place} must be a plain tensor of floats, found {type(tensor).__name__}; "
                "train with optim adamw_torch"
            )
    stored: Tensor = state[moment.key]
    if moment.columns is None:
        return stored
    rows, columns = stored, state[moment.columns]
    if moment.key == "row_var" and rows.ndim >= 2 and rows.shape[-1] == columns.shape[-2] == 1:
        rows, columns = rows.squeeze(-1), columns.squeeze(-2)
    if not rows.ndim or rows.shape[:-1] != columns.shape[:-1] or rows.dtype != columns.dtype:
        raise CorruptFileError(
            f"the row and column means of {place} must belong together, found shapes {list(rows.shape)} and "
            f"{list(columns.shape)}; save it again"
        )
    return RowsAndColumns(rows, columns)


def _check(groups: tuple[tuple[Slot, ...], ...], loaded: Mapping[str, Any], file: Path) -> None:
    """Refuse state that is empty, of several kinds, or at odds with its own groups."""
    state, settings = loaded["state"], loaded["param_groups"]
    slots = [slot for group in groups for slot in group]
    twice = [index for index, count in Counter(slot.index for slot in slots).items() if count > 1]
    strays = set(state) - {slot.index for slot in slots}
    if twice or strays:
        found = f"{twice[0]} twice" if twice else f"state of {sorted(map(str, strays))[0]}, which is in no group"
        raise CorruptFileError(f"each parameter of {file} must be in one group, found {found}; save it again")
    doubled = [name for name, count in Counter(slot.name for slot in slots if slot.name).items() if count > 1]
    if doubled:
        raise CorruptFileError(f"each parameter of {file} must have its own name, found {doubled[0]} twice")
    kinds = {slot.moment.statistic for slot in slots if slot.moment}
    if not kinds:
        raise UnsupportedStateError(nothing_kept(settings, str(file)))
    starts = {slot.moment.start for slot in slots if slot.moment}
    corrected = {slot.moment.corrected for slot in slots if slot.moment}
    if len(corrected) > 1:
        raise UnsupportedStateError(
            f"the second moments in {file} must all be of one kind, found some that need a bias correction and some "
            "that do not; train with one optimizer"
        )
    if len(kinds) > 1 or len(starts) > 1:
        raise UnsupportedStateError(
            f"the second moments in {file} must all be of one kind, found both "
            f"{' and '.join(sorted(kinds) if len(kinds) > 1 else map(str, sorted(starts)))}; train with one optimizer"
        )


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("state"), Mapping)
        and isinstance(value.get("param_groups"), list)
        and all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in value["param_groups"])
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


def _find_model(loaded: Any) -> Mapping[str, Tensor] | None:
    """Return the one model beside the optimizer; None where there is none, or no telling which of several."""
    if not isinstance(loaded, Mapping):
        return None
    found = {
        key: value
        for key, value in loaded.items()
        if isinstance(value, Mapping) and value and all(isinstance(item, Tensor) for item in value.values())
    }
    usual = [key for key in _MODEL_KEYS if key in found]
    if not usual and len(found) != 1:
        return None
    return {unwrapped(str(name)): tensor for name, tensor in found[usual[0] if usual else next(iter(found))].items()}
