"""Whether a parameter moved the way that its optimizer's state says; what does not is perhaps named wrongly."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from squisher_mergekit.models.checkpoint_names import CheckpointNames
from squisher_mergekit.optimizers.slots import Slot
from squisher_mergekit.tensors.lazy import read
from squisher_mergekit.tensors.safetensors import SafetensorsStore, safetensors_files

# Entries compared of each parameter: some blocks of neighbours, so that few pages of a mapped file are touched.
_BLOCKS, _BLOCK = 64, 256


def doubtful(
    slots: Mapping[str, Slot], tuned: Path, before: Path, checkpoint_names: CheckpointNames | None
) -> dict[str, str]:
    """Find parameters whose change fits the state of another one of the same shape better than their own.

    The change ``theta - theta_before`` of a parameter correlates with ``-m / sqrt(v)`` of its own state, as that is the
    direction of Adam's last steps, and hardly with another's. It is a hint and no proof: after long runs little is left
    of it, and small tensors can agree by chance.

    Args:
        slots: Name in memory -> slot.
        tuned: Folder of the trained weights.
        before: Folder of the weights at an earlier time.
        checkpoint_names: The model; None if the names are those on disk.

    Returns:
        Name -> the name whose state fits better.
    """
    stores = [SafetensorsStore(safetensors_files(folder, "model"), str(folder)) for folder in (tuned, before)]
    groups: dict[tuple[int, ...], list[tuple[str, str]]] = defaultdict(list)
    for name, stored in _stored_alone(slots, checkpoint_names):
        shape = slots[name].shape
        if shape is not None and all(stored in store.infos and store.infos[stored].shape == shape for store in stores):
            groups[shape].append((name, stored))
    found: dict[str, str] = {}
    for members in groups.values():
        if len(members) > 1:
            changes = [_sample(stores[0].read(on_disk)) - _sample(stores[1].read(on_disk)) for _, on_disk in members]
            fit = _correlations(torch.stack(changes), torch.stack([_direction(slots[name]) for name, _ in members]))
            found.update(_better([name for name, _ in members], fit, changes[0].numel()))
    return found


def _stored_alone(slots: Mapping[str, Slot], checkpoint_names: CheckpointNames | None) -> Iterator[tuple[str, str]]:
    """Yield name in memory and on disk of the parameters that are stored as they are, with momentum kept."""
    usable = {name for name, slot in slots.items() if slot.tensor is not None and slot.momentum is not None}
    if checkpoint_names is None:
        yield from ((name, name) for name in slots if name in usable)
        return
    for stored, sources in checkpoint_names.sources.items():
        if len(sources) == 1 and sources[0] in usable and checkpoint_names.shapes[stored] == slots[sources[0]].shape:
            yield sources[0], stored


def _sample(tensor: Tensor) -> Tensor:
    """Return some entries, the same ones of every tensor of a shape."""
    flat = tensor.reshape(-1)
    if flat.numel() <= _BLOCKS * _BLOCK:
        return flat.double()
    step = flat.numel() // _BLOCKS
    return torch.cat([flat[number * step : number * step + _BLOCK] for number in range(_BLOCKS)]).double()


def _direction(slot: Slot) -> Tensor:
    if slot.tensor is None or slot.momentum is None:
        raise TypeError(f"parameter {slot.index} was never stepped")
    return -_sample(read(slot.momentum)) / (_sample(read(slot.tensor)).sqrt() + 1e-12)


def _correlations(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation of each row of ``a`` with each of ``b``; 0 for constant rows."""
    a, b = ((x - x.mean(1, keepdim=True)) for x in (a, b))
    a, b = (torch.nan_to_num(x / x.norm(dim=1, keepdim=True)) for x in (a, b))
    return a @ b.T


def _better(names: list[str], fit: Tensor, entries: int) -> Iterator[tuple[str, str]]:
    """Yield each name whose change fits another's state better than chance alone would let it."""
    chance = 0.05 + 6 / entries**0.5
    for row, name in enumerate(names):
        best = int(fit[row].argmax())
        if fit[row, best] > max(fit[row, row].item(), 0.0) + chance:
            yield name, names[best]
