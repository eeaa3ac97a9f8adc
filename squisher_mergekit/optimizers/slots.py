"""The slots of an optimizer's state: one for each parameter it was given."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError, NothingKeptError, UnsupportedStateError
from squisher_mergekit.models.parameters import unwrapped
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.checkpoints.safe_pickle import Quantized
from squisher_mergekit.optimizers.encodings import Blockwise, Packed, RowsAndColumns
from squisher_mergekit.optimizers.second_moments import Moment, ivon, moment_of, nothing_kept, unwrapped_state
from squisher_mergekit.tensors.lazy import MaybeLazy, parts, read

Shape = tuple[int, ...]
Group = tuple["Slot", ...]


@dataclass(frozen=True)
class Slot:
    """One parameter as the optimizer knows it.

    ``index``: its number in the file, or its name. ``name``: the name the file gives it, if any. ``moment``: None if
    the optimizer never stepped it, or keeps none for it; then ``tensor`` and ``steps`` are None too. ``shape``: of the
    parameter, None if nothing tells. ``lacking``: why there is no second moment, where the optimizer is one without.
    ``flat``: the second moments of its whole group, to be cut once the shapes are known (IVON's). ``momentum``: the
    mean gradient, where it is kept in full.
    """

    index: int | str
    name: str | None
    moment: Moment | None = None
    tensor: MaybeLazy | None = None
    steps: int | None = None
    shape: Shape | None = None
    lacking: str | None = None
    flat: Tensor | None = None
    momentum: MaybeLazy | None = None


@dataclass(frozen=True)
class OptimizerState:
    """The slots, by optimizer and group as the files have them.

    ``saved``: where they are from. ``optimizers``: of each optimizer its groups of slots.
    """

    saved: RawState
    optimizers: tuple[tuple[Group, ...], ...]
    groups: tuple[Group, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(group for groups in self.optimizers for group in groups))

    @property
    def file(self) -> Path:
        """The file or folder, for messages."""
        return self.saved.place

    @property
    def slots(self) -> Iterator[Slot]:
        """All slots in the order of their indices."""
        for group in self.groups:
            yield from group

    @property
    def named(self) -> bool:
        """Whether the file itself names every parameter."""
        return all(slot.name is not None for slot in self.slots)


def parse(saved: RawState) -> OptimizerState:
    """Find the slots in what a layout has read.

    Args:
        saved: It.

    Returns:
        The slots.

    Raises:
        UnsupportedStateError: No optimizer has a second moment.
        CorruptFileError: Groups and states contradict each other.
    """
    optimizers = []
    for one in saved.states:
        groups = tuple(tuple(_slots(group, one["state"], saved.place)) for group in one["param_groups"])
        _check_indices(groups, one, saved.place)
        optimizers.append(groups)
    state = OptimizerState(saved, tuple(optimizers))
    _check_kinds(state)
    return state


def parameters_of(model: Mapping[str, Tensor]) -> dict[str, Shape]:
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
    indices, names = group["params"], group.get("param_names")
    if names is None:
        names = [None] * len(indices)
    if not isinstance(names, list) or len(names) != len(indices):
        found = len(names) if isinstance(names, list) else f"{names!r:.40}"
        raise CorruptFileError(
            f"a group in {file} must have one of param_names for each of its {len(indices)} parameters, "
            f"found {found}; save it again"
        )
    flat = group.get("hess")
    for index, given in zip(indices, names, strict=True):
        if not isinstance(index, int | str):
            raise CorruptFileError(f"the parameters of a group in {file} must be numbers or names, found {index!r:.50}")
        name = index if isinstance(index, str) else given
        name = None if name is None else unwrapped(str(name))
        if _plain(flat) and flat.ndim == 1 and flat.is_floating_point() and "hess_init" in group:
            yield Slot(index, name, ivon(group), flat=flat)
        else:
            yield _slot(index, name, state.get(index), group, file)


def _slot(index: int | str, name: str | None, state: Any, group: Mapping[str, Any], file: Path) -> Slot:
    if not isinstance(state, Mapping) or not state:
        return Slot(index, name)
    place = f"{file} (parameter {index})"
    state = unwrapped_state(state)
    try:
        moment = moment_of(state, group, place)
    except NothingKeptError as error:
        shapes = [tuple(value.shape) for value in state.values() if isinstance(value, Tensor) and value.ndim]
        return Slot(index, name, shape=shapes[0] if shapes else None, lacking=str(error))
    except UnsupportedStateError:
        raise
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CorruptFileError(f"the settings of {place} must be numbers, but {error!s:.80}; save it again") from None
    tensor = _stored(state, moment, f"parameter {index} in {file}")
    steps = _steps(state.get("step", group.get("step", group.get("k"))), place)
    if steps == 0:  # Adagrad makes its accumulators before the first step
        return Slot(index, name)
    momentum = state.get("exp_avg")
    kept = _floats(momentum) and tuple(momentum.shape) == tuple(tensor.shape)
    return Slot(index, name, moment, tensor, steps, tuple(tensor.shape), momentum=momentum if kept else None)


def _steps(value: Any, place: str) -> int | None:
    """Return how many steps were made, None if nothing tells.

    Raises:
        CorruptFileError: It is no such number.
    """
    if value is None:
        return None
    try:
        steps = float(value.reshape(()) if isinstance(value, Tensor) else value)
        if not (steps >= 0 and steps == int(steps)):
            raise ValueError
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise CorruptFileError(
            f"the step of {place} must be a whole number, found {value!r:.50}; save it again"
        ) from None
    return int(steps)


def _stored(state: Mapping[str, Any], moment: Moment, place: str) -> MaybeLazy:
    """Return the second moment as it is kept."""
    if moment.key == "state2" and "qmap2" in state:
        found = [state[key] for key in ("state2", "qmap2", "absmax2") if _plain(state.get(key))]
        blocks = Blockwise(*found) if len(found) == 3 else None
        if blocks is None or not blocks.fits():
            raise CorruptFileError(
                f"state2 of {place} must be 8-bit codes with 256 levels and one scale for each 256 entries, but its "
                "parts do not belong together; save it again"
            )
        return _within(blocks, place)
    stored = state[moment.key]
    if hasattr(stored, "codes") and hasattr(stored, "scale"):  # torchao's tensor, or the stand-in for it
        return _within(_quantized(stored, f"{moment.key} of {place}"), place)
    for key in (moment.key, moment.columns):
        tensor = None if key is None else state[key]
        # A subclass may hold codes, or a part of the tensor; of tensors, plain ones alone are what they seem.
        if key is not None and not _floats(tensor):
            raise UnsupportedStateError(
                f"{key} of {place} must be a plain tensor of floats, found {type(tensor).__name__}; "
                "train with optim adamw_torch"
            )
    if moment.columns is None:
        return _within(stored, place)
    rows, columns = read(stored), read(state[moment.columns])
    if moment.key == "row_var" and min(rows.ndim, columns.ndim) >= 2 and rows.shape[-1] == columns.shape[-2] == 1:
        rows, columns = rows.squeeze(-1), columns.squeeze(-2)
    if not rows.ndim or rows.shape[:-1] != columns.shape[:-1] or rows.dtype != columns.dtype:
        raise CorruptFileError(
            f"the row and column means of {place} must belong together, found shapes {list(rows.shape)} and "
            f"{list(columns.shape)}; save it again"
        )
    return _within(RowsAndColumns(rows, columns), place)


def _plain(value: Any) -> TypeGuard[Tensor]:
    return type(value) is Tensor


def _floats(value: Any) -> bool:
    """Return whether this is a tensor of floats, or a form of one."""
    if isinstance(value, Tensor):
        return type(value) is Tensor and value.is_floating_point() and value.layout is torch.strided
    return hasattr(value, "read") and value.dtype.is_floating_point


def _quantized(tensor: Any, place: str) -> Blockwise | Packed:
    """Return the form of a tensor of torchao's.

    Raises:
        CorruptFileError: Its parts do not belong together.
    """
    codes, scales, levels = tensor.codes, tensor.scale, getattr(tensor, "qmap", None)
    if _plain(codes) and _plain(scales) and (levels is None or _plain(levels)) and scales.numel():
        form: Blockwise | Packed
        if levels is not None and levels.numel() == 16:
            shape = torch.Size(getattr(tensor, "_shape", ()))
            form = Packed(codes, levels, scales, shape, 2 * codes.numel() // scales.numel())
        else:
            form = Blockwise(codes, levels, scales, codes.numel() // scales.numel())
        if form.fits() and (not isinstance(tensor, Quantized) or tensor.shape == form.shape):
            return form
    raise CorruptFileError(f"the codes, scales and levels of {place} must belong together; save it again")


def _within(stored: MaybeLazy, place: str) -> MaybeLazy:
    """Refuse tensors that claim entries for which their file has no bytes, as with a stride of 0.

    Raises:
        CorruptFileError: One does.
    """
    for part in parts(stored):
        if part.numel() * part.itemsize > part.untyped_storage().nbytes() or not _dense(part):
            raise CorruptFileError(
                f"the second moment of {place} must have bytes of its own for each of its {part.numel()} entries, "
                f"found strides {list(part.stride())} over {part.untyped_storage().nbytes()} bytes; copy the file again"
            )
    return stored


def _dense(tensor: Tensor) -> bool:
    """Return whether the entries lie side by side, in whatever order of the axes."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _check_indices(groups: tuple[Group, ...], loaded: Mapping[str, Any], file: Path) -> None:
    """Refuse state that is at odds with its own groups."""
    slots = [slot for group in groups for slot in group]
    twice = [index for index, count in Counter(slot.index for slot in slots).items() if count > 1]
    # Some optimizers keep settings of their own beside the parameters' state.
    strays = {key for key, value in loaded["state"].items() if isinstance(value, Mapping)} - {s.index for s in slots}
    if twice or strays:
        found = f"{twice[0]} twice" if twice else f"state of {sorted(map(str, strays))[0]}, which is in no group"
        raise CorruptFileError(f"each parameter of {file} must be in one group, found {found}; save it again")


def _check_kinds(state: OptimizerState) -> None:
    """Refuse state that is empty or of several kinds."""
    slots, file = list(state.slots), state.file
    doubled = [name for name, count in Counter(slot.name for slot in slots if slot.name).items() if count > 1]
    if doubled:
        raise CorruptFileError(f"each parameter of {file} must have its own name, found {doubled[0]} twice")
    kinds = {slot.moment.statistic for slot in slots if slot.moment}
    if not kinds:
        lacking = next((slot.lacking for slot in slots if slot.lacking), None)
        settings = [group for one in state.saved.states for group in one["param_groups"]]
        raise UnsupportedStateError(lacking or nothing_kept(settings, str(file)))
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
