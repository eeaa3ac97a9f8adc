"""Checks of an optimizer's state against the change of the weights: exchanged names, the state of another run."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from squisher_mergekit.models.names import CheckpointNames
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.optimizers.slots import OptimizerSlot
from squisher_mergekit.tensors.lazy import read

# Entries compared per parameter: blocks of neighbours, so that few pages of a mapped file are touched.
_BLOCKS, _BLOCK = 64, 256
# After more steps than this, the momentum of the last few no longer predicts the direction of the whole change.
_TELLING_STEPS = 50
_LEAST_FIT = 0.05  # correlation of a change over that many steps with the state, were it of the same run
_LEAST_ENTRIES = 1000


def swapped_names(
    slots: Mapping[str, OptimizerSlot], tuned: Weights, before: Weights, checkpoint_names: CheckpointNames | None
) -> dict[str, str]:
    """Find parameters whose change fits the state of another parameter of the same shape better than their own.

    The change ``theta - theta_before`` of a parameter correlates with ``-m / sqrt(v)`` of its own state, as that is the
    direction of Adam's last steps, and hardly with another's. The result is a hint and no proof: the correlation fades
    in long runs, and small tensors can agree by chance.

    Args:
        slots: Name in memory -> slot.
        tuned: The trained weights.
        before: The weights at an earlier step.
        checkpoint_names: The model's names; None if the names are those on disk.

    Returns:
        Name -> the name whose state fits better.
    """
    groups: dict[tuple[int, ...], list[tuple[str, str]]] = defaultdict(list)
    for name, stored in _stored_alone(slots, checkpoint_names):
        shape = slots[name].shape
        if shape is not None and all(stored in w.infos and w.infos[stored].shape == shape for w in (tuned, before)):
            groups[shape].append((name, stored))
    found: dict[str, str] = {}
    for members in groups.values():
        if len(members) > 1:
            changes = [_sample(tuned.read(on_disk)) - _sample(before.read(on_disk)) for _, on_disk in members]
            fit = _correlations(torch.stack(changes), torch.stack([_direction(slots[name]) for name, _ in members]))
            found.update(_better([name for name, _ in members], fit, changes[0].numel()))
    return found


def of_another_run(
    slots: Mapping[str, OptimizerSlot],
    tuned: Weights,
    before: Weights,
    checkpoint_names: CheckpointNames | None,
    steps: int,
    *,
    same_run: bool,
) -> str | None:
    """Return the reason why an optimizer's state cannot be of the run that changed the weights; None if nothing tells.

    Two properties tell. The change over few steps correlates with ``-m / sqrt(v)``. And an entry with ``v = 0`` never
    had a gradient, so that it changes by weight decay alone, in proportion to its value.

    Args:
        slots: Name in memory -> slot.
        tuned: The trained weights.
        before: The weights at an earlier step.
        checkpoint_names: The model's names; None if the names are those on disk.
        steps: Number of steps between ``before`` and ``tuned``; 0 if unknown.
        same_run: True if ``before`` is an earlier checkpoint of the run; the second property needs it.
    """
    moved = entries = 0
    fit = 0.0
    for name, stored in _stored_alone(slots, checkpoint_names):
        shape = slots[name].shape
        if any(stored not in w.infos or w.infos[stored].shape != shape for w in (tuned, before)):
            continue
        old, new = _sample(before.read(stored)), _sample(tuned.read(stored))
        if same_run and tuned.infos[stored].dtype == before.infos[stored].dtype:
            moved += _moved_without_gradient(slots[name], old, new)
        direction = _direction(slots[name])
        if bool((new != old).any()) and bool(direction.any()):
            fit += float(_correlations((new - old)[None], direction[None])) * old.numel()
            entries += old.numel()
    if moved > _LEAST_ENTRIES // 10:
        return f"{moved} weights changed that never had a gradient by this state"
    if 0 < steps <= _TELLING_STEPS and entries > _LEAST_ENTRIES and fit / entries < _LEAST_FIT:
        return f"the weights did not change in the direction of this state (correlation {fit / entries:.2f})"
    return None


def _moved_without_gradient(slot: OptimizerSlot, old: Tensor, new: Tensor) -> int:
    """Return the number of sampled entries with a second moment of 0 that changed otherwise than by weight decay."""
    if not isinstance(slot.tensor, Tensor) or slot.tensor.itemsize < 4:  # codes of few bits round to 0
        return 0
    unseen = (_sample(slot.tensor) == 0) & (old != 0)
    if not bool(unseen.any()):
        return 0
    ratio = new[unseen] / old[unseen]
    return int(((ratio - ratio.median()).abs() > 0.01).sum())


def _stored_alone(
    slots: Mapping[str, OptimizerSlot], checkpoint_names: CheckpointNames | None
) -> Iterator[tuple[str, str]]:
    """Yield name in memory and name on disk of the parameters with momentum that are stored unconverted."""
    usable = {name for name, slot in slots.items() if slot.tensor is not None and slot.momentum is not None}
    if checkpoint_names is None:
        yield from ((name, name) for name in slots if name in usable)
        return
    for stored, sources in checkpoint_names.sources.items():
        if len(sources) == 1 and sources[0] in usable and checkpoint_names.shapes[stored] == slots[sources[0]].shape:
            yield sources[0], stored


def _sample(tensor: Tensor) -> Tensor:
    """Return a sample of the entries, at the same positions in every tensor of a shape."""
    flat = tensor.reshape(-1)
    if flat.numel() <= _BLOCKS * _BLOCK:
        return flat.double()
    step = flat.numel() // _BLOCKS
    return torch.cat([flat[number * step : number * step + _BLOCK] for number in range(_BLOCKS)]).double()


def _direction(slot: OptimizerSlot) -> Tensor:
    if slot.tensor is None or slot.momentum is None:
        raise TypeError(f"parameter {slot.index} was never stepped")
    return -_sample(read(slot.momentum)) / (_sample(read(slot.tensor)).sqrt() + 1e-12)


def _correlations(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation of each row of ``a`` with each of ``b``; 0 for constant rows."""
    a, b = ((x - x.mean(1, keepdim=True)) for x in (a, b))
    a, b = (torch.nan_to_num(x / x.norm(dim=1, keepdim=True)) for x in (a, b))
    return a @ b.T


def _better(names: list[str], fit: Tensor, entries: int) -> Iterator[tuple[str, str]]:
    """Yield each name whose change fits another's state by more than chance explains."""
    chance = 0.05 + 6 / entries**0.5
    for row, name in enumerate(names):
        best = int(fit[row].argmax())
        if fit[row, best] > max(fit[row, row].item(), 0.0) + chance:
            yield name, names[best]
