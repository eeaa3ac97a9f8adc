"""Slots of an optimizer's state: one for each parameter given to the optimizer."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError, NothingKeptError, UnsafeFileError, UnsupportedStateError
from squisher_mergekit.models.parameters import unwrapped
from squisher_mergekit.models.roles import is_running_statistic
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.checkpoints.stand_ins import QuantizedStandIn, replaced_in
from squisher_mergekit.optimizers.encodings import BLOCKS, Blockwise, Packed, RowsAndColumns
from squisher_mergekit.optimizers.preconditioners.recognise import preconditioned
from squisher_mergekit.optimizers.preconditioners.sums import Preconditioned
from squisher_mergekit.optimizers.second_moments import Moment, ivon, moment_of, nothing_kept, unwrapped_state
from squisher_mergekit.tensors.lazy import MaybeLazy, parts, read

Shape = tuple[int, ...]
Group = tuple["OptimizerSlot", ...]


@dataclass(frozen=True)
class OptimizerSlot:
    """State of one parameter in an optimizer.

    Attributes:
        index: Number or name of the parameter in the file.
        name: Name that the file gives the parameter; None if it gives none.
        moment: Kind of the second moment; None if there is none.
        tensor: The second moment; None if there is none.
        steps: Number of steps; None if unknown.
        shape: Shape of the parameter; None if unknown.
        lacking: Reason why the optimizer keeps no second moment of this parameter; None otherwise.
        flat: Second moments of the whole group in one flat tensor, cut once the shapes are known (IVON).
        momentum: Mean gradient; None unless it is stored unfactored.
        factors: Factors over the rows and over the columns (Shampoo, SOAP); None for a side without.
        initial: Multiple of the identity that the factors began with.
        of_factors: Kind of the factors; None if it is that of the second moment.
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
    factors: tuple[MaybeLazy | None, MaybeLazy | None] = (None, None)
    initial: float = 0.0
    of_factors: Moment | None = None


@dataclass(frozen=True)
class OptimizerState:
    """Slots of all optimizers of a checkpoint.

    Attributes:
        raw: The states that the slots were parsed from.
        optimizers: The groups of each optimizer.
        groups: The groups of all optimizers.
    """

    raw: RawState
    optimizers: tuple[tuple[Group, ...], ...]
    groups: tuple[Group, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(group for groups in self.optimizers for group in groups))

    @property
    def location(self) -> Path:
        """File or folder of the state, for messages."""
        return self.raw.location

    @property
    def slots(self) -> Iterator[OptimizerSlot]:
        """All slots, group by group."""
        for group in self.groups:
            yield from group

    @property
    def named(self) -> bool:
        """True if the file names every parameter."""
        return all(slot.name is not None for slot in self.slots)


_MOVING_AVERAGES = frozenset({"exp_avg_sq"})  # 0 before the first step


def parse(raw: RawState) -> OptimizerState:
    """Parse optimizer states into slots.

    Args:
        raw: The states to parse.

    Raises:
        UnsupportedStateError: No optimizer has a second moment.
        CorruptFileError: Groups and states contradict each other.
    """
    optimizers = []
    for loaded in raw.states:
        groups = tuple(tuple(_slots(group, loaded["state"], raw.location)) for group in loaded["param_groups"])
        _check_indices(groups, loaded, raw.location)
        optimizers.append(groups)
    state = OptimizerState(raw, tuple(optimizers))
    _check_kinds(state)
    return state


def parameters_of(model: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Return name -> shape of a saved model's parameters in order: no second names of tied tensors, no known buffers.

    Float buffers other than a batch norm's stay, as nothing distinguishes them from parameters.
    """
    seen, shapes = set(), {}
    for name, tensor in model.items():
        memory = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        buffer = not tensor.is_floating_point() or is_running_statistic(name)
        if not buffer and (memory not in seen or tensor.numel() == 0):
            seen.add(memory)
            shapes[name] = tuple(tensor.shape)
    return shapes


def _slots(group: Mapping[str, Any], state: Mapping[Any, Any], file: Path) -> Iterator[OptimizerSlot]:
    """Yield the slots of one parameter group."""
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
        if _is_plain(flat) and flat.ndim == 1 and flat.is_floating_point() and "hess_init" in group:
            yield OptimizerSlot(index, name, ivon(group), flat=flat)
        else:
            yield _slot(index, name, state.get(index), group, file)


def _slot(index: int | str, name: str | None, state: Any, group: Mapping[str, Any], file: Path) -> OptimizerSlot:
    if not isinstance(state, Mapping) or not state:
        return OptimizerSlot(index, name)
    location = f"{file} (parameter {index})"
    unknown = replaced_in(state)
    if unknown is not None:
        raise UnsafeFileError(
            f"the state of {location} must hold tensors and numbers only, but its pickle asks for {unknown}; nothing "
            "of it was run. Train with an optimizer whose state is plain, such as AdamW"
        )
    state = unwrapped_state(state)
    try:
        coupled = preconditioned(state, group, location)
        if coupled is not None:
            return _preconditioned_slot(index, name, coupled, state, group, location)
        moment = moment_of(state, group, location)
    except NothingKeptError as error:
        shapes = [tuple(value.shape) for value in state.values() if isinstance(value, Tensor) and value.ndim]
        return OptimizerSlot(index, name, shape=shapes[0] if shapes else None, lacking=str(error))
    except (UnsupportedStateError, CorruptFileError):
        raise
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CorruptFileError(
            f"the settings of {location} must be numbers, but {error!s:.80}; save it again"
        ) from None
    tensor = _second_moment(state, moment, f"parameter {index} in {file}")
    steps = _steps(state.get("step", group.get("step", group.get("k"))), location)
    if steps == 0:
        # Adagrad makes its accumulators before the first step; a trained moving average was stepped without a count.
        if moment.key not in _MOVING_AVERAGES or not bool(read(tensor).any()):
            return OptimizerSlot(index, name)
        steps = None
    momentum = state.get("exp_avg")
    kept = _is_float(momentum) and tuple(momentum.shape) == tuple(tensor.shape)
    return OptimizerSlot(index, name, moment, tensor, steps, tuple(tensor.shape), momentum=momentum if kept else None)


def _preconditioned_slot(
    index: int | str,
    name: str | None,
    found: Preconditioned,
    state: Mapping[str, Any],
    group: Mapping[str, Any],
    location: str,
) -> OptimizerSlot:
    """Return the slot of Shampoo or SOAP; one without a second moment where only the eigenbasis has it."""
    if found.tensor is None:
        why = (
            f"a Fisher needs the mean squared gradient of each weight, but {found.lacking} ({location}, shape "
            f"{list(found.shape)}); take AdamW for it"
        )
        return OptimizerSlot(index, name, shape=found.shape, lacking=why)
    recorded = _steps(state.get("step", group.get("step")), location)
    steps = None if recorded is None else recorded + found.steps_before
    if steps is not None and steps <= 0:
        return OptimizerSlot(index, name)
    return OptimizerSlot(
        index,
        name,
        found.moment,
        found.tensor,
        steps,
        found.shape,
        factors=found.factors,
        initial=found.initial,
        of_factors=found.of_factors,
    )


def _steps(value: Any, location: str) -> int | None:
    """Return the number of steps; None if unknown.

    Raises:
        CorruptFileError: The value is no whole number.
    """
    if value is None:
        return None
    try:
        if isinstance(value, bool | str):
            raise TypeError
        steps = float(value.reshape(()) if isinstance(value, Tensor) else value)
        if not (steps >= 0 and steps == int(steps)):
            raise ValueError
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise CorruptFileError(
            f"the step of {location} must be a whole number, found {value!r:.50}; save it again"
        ) from None
    return int(steps)


def _second_moment(state: Mapping[str, Any], moment: Moment, location: str) -> MaybeLazy:
    """Return the second moment: a plain tensor, or a lazy one over its encoding."""
    if moment.key == "state2":
        _refuse_other_order(state["state2"], location)
    if moment.key == "state2" and "qmap2" in state:
        found = [state[key] for key in ("state2", "qmap2", "absmax2") if _is_plain(state.get(key))]
        candidates = [replace(Blockwise(*found), block=size) for size in BLOCKS] if len(found) == 3 else []
        blocks = next((each for each in candidates if each.fits()), None)
        if blocks is None:
            raise CorruptFileError(
                f"state2 of {location} must be 8-bit codes with 256 levels and one scale for each 256 or 2048 entries, "
                "but its parts do not belong together; save it again"
            )
        return _dense_only(blocks, location)
    stored = state[moment.key]
    if hasattr(stored, "codes") and hasattr(stored, "scale"):  # torchao's tensor, or the stand-in for it
        return _dense_only(_quantized(stored, f"{moment.key} of {location}"), location)
    for key in (moment.key, moment.columns):
        tensor = None if key is None else state[key]
        # A subclass of Tensor may hold codes, or a shard; only plain tensors hold the second moment itself.
        if key is not None and not _is_float(tensor):
            raise UnsupportedStateError(
                f"{key} of {location} must be a plain tensor of floats, found {type(tensor).__name__}; "
                "train with optim adamw_torch"
            )
    if moment.columns is None:
        return _dense_only(stored, location)
    rows, columns = read(stored), read(state[moment.columns])
    if moment.key == "row_var" and min(rows.ndim, columns.ndim) >= 2 and rows.shape[-1] == columns.shape[-2] == 1:
        rows, columns = rows.squeeze(-1), columns.squeeze(-2)
    if not rows.ndim or rows.shape[:-1] != columns.shape[:-1] or rows.dtype != columns.dtype:
        raise CorruptFileError(
            f"the row and column means of {location} must belong together, found shapes {list(rows.shape)} and "
            f"{list(columns.shape)}; save it again"
        )
    return _dense_only(RowsAndColumns(rows, columns), location)


def _refuse_other_order(codes: Any, location: str) -> None:
    """Refuse a state of bitsandbytes for a weight that was not contiguous.

    The strides are the weight's at the first step. Newer versions then make the weight contiguous, and update both in
    the order of memory, so that the axes of the state mean nothing. No file tells the version.

    Raises:
        UnsupportedStateError: The state is not contiguous.
    """
    if _is_plain(codes) and not codes.is_contiguous():
        raise UnsupportedStateError(
            f"state2 of {location} must be contiguous, as bitsandbytes fills it in the order of memory, found strides "
            f"{list(codes.stride())} for shape {list(codes.shape)}; train with weights in torch.contiguous_format, or "
            "estimate a Fisher from data"
        )


def _is_plain(value: Any) -> TypeGuard[Tensor]:
    return type(value) is Tensor


def _is_float(value: Any) -> bool:
    """Return True for a plain or lazy tensor of floats."""
    if isinstance(value, Tensor):
        return type(value) is Tensor and value.is_floating_point() and value.layout is torch.strided
    return hasattr(value, "read") and value.dtype.is_floating_point


def _quantized(tensor: Any, location: str) -> Blockwise | Packed:
    """Return a lazy tensor over the codes of a torchao tensor.

    Raises:
        CorruptFileError: The sizes or dtypes of codes, scales and levels contradict each other.
    """
    codes, scales, levels = tensor.codes, tensor.scale, getattr(tensor, "qmap", None)
    if _is_plain(codes) and _is_plain(scales) and (levels is None or _is_plain(levels)) and scales.numel():
        encoded: Blockwise | Packed
        if levels is not None and levels.numel() == 16:
            shape = torch.Size(getattr(tensor, "_shape", ()))
            encoded = Packed(codes, levels, scales, shape, 2 * codes.numel() // scales.numel())
        else:
            encoded = Blockwise(codes, levels, scales, codes.numel() // scales.numel())
        if encoded.fits() and (not isinstance(tensor, QuantizedStandIn) or tensor.shape == encoded.shape):
            return encoded
    raise CorruptFileError(f"the codes, scales and levels of {location} must belong together; save it again")


def _dense_only(stored: MaybeLazy, location: str) -> MaybeLazy:
    """Return a tensor, but refuse one that claims entries for which its file has no bytes, as with a stride of 0.

    Raises:
        CorruptFileError: The tensor has fewer bytes than entries.
    """
    for part in parts(stored):
        if part.numel() * part.itemsize > part.untyped_storage().nbytes() or not _is_dense(part):
            raise CorruptFileError(
                f"the second moment of {location} must have bytes of its own for each of its {part.numel()} entries, "
                f"found strides {list(part.stride())} over {part.untyped_storage().nbytes()} bytes; copy the file again"
            )
    return stored


def _is_dense(tensor: Tensor) -> bool:
    """Return True if the entries are contiguous in memory, in any order of the axes."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _check_indices(groups: tuple[Group, ...], loaded: Mapping[str, Any], file: Path) -> None:
    """Refuse a state whose parameters are not those of its groups."""
    slots = [slot for group in groups for slot in group]
    twice = [index for index, count in Counter(slot.index for slot in slots).items() if count > 1]
    # Some optimizers keep settings beside the states of the parameters.
    strays = {key for key, value in loaded["state"].items() if isinstance(value, Mapping)} - {s.index for s in slots}
    if twice or strays:
        found = f"{twice[0]} twice" if twice else f"state of {sorted(map(str, strays))[0]}, which is in no group"
        raise CorruptFileError(f"each parameter of {file} must be in one group, found {found}; save it again")


def _check_kinds(state: OptimizerState) -> None:
    """Refuse a state without second moments, or with second moments of several kinds."""
    slots, file = list(state.slots), state.location
    doubled = [name for name, count in Counter(slot.name for slot in slots if slot.name).items() if count > 1]
    if doubled:
        raise CorruptFileError(f"each parameter of {file} must have its own name, found {doubled[0]} twice")
    kinds = {slot.moment.statistic for slot in slots if slot.moment}
    if not kinds:
        lacking = next((slot.lacking for slot in slots if slot.lacking), None)
        settings = [group for loaded in state.raw.states for group in loaded["param_groups"]]
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
