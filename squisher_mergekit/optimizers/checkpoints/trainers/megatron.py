"""Megatron-Core's distributed checkpoint (``torch_dist``): the field before the name, layers stacked, settings aside.

The keys are ``optimizer.state.exp_avg_sq.NAME``, perhaps with ``chained_N.`` in front where a mixture of experts has
several optimizers. Steps and betas are in ``common.pt``, or in objects of the distributed optimizer. Tensor, pipeline
and data parallelism leave no trace, but before version 0.14 the distributed optimizer stored each chunk flat.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.optimizers.checkpoints import safe_pickle
from squisher_mergekit.optimizers.checkpoints.dcp_pieces import FlatPieces, Piece, Pieces

_KEY = re.compile(r"((?:chained_\d+\.)?)optimizer\.state\.(exp_avg_sq|exp_avg)\.(.+)")
_OBJECTS = re.compile(r"((?:chained_\d+\.)?)optimizer\.distributed\.dp_group_idx_\d+\.(\w+)(?:/.*)?")
_BUCKETS = re.compile(r"bucket|gbuf|dp_reshardable")
_COMMON = "common.pt"
_ITERATION = re.compile(r"iter_0*(\d+)")
_SHAPE = "nd_reformulated_orig_global_shape"
_DEEPEST = 6  # containers around the settings of an optimizer


def is_megatron(keys: Mapping[str, Any]) -> bool:
    """Return True if an index has the keys of Megatron-Core's optimizer."""
    return any(
        _KEY.fullmatch(key) or _OBJECTS.fullmatch(key) or (key.startswith("optimizer.") and _BUCKETS.search(key))
        for key in keys
    )


def unflattened(stored: Pieces, note: Any) -> Pieces | FlatPieces:
    """Return a tensor with the shape of its parameter, where the distributed optimizer stored its chunks flat.

    Args:
        stored: The tensor as it is stored.
        note: What the index notes about it.

    Raises:
        ValueError: The shapes do not belong together.
    """
    shape = note.get(_SHAPE) if isinstance(note, Mapping) else None
    if shape is None:
        return stored
    whole, grid = torch.Size(shape), stored.shape[:-1]
    fits = len(grid) == len(whole) and all(n > 0 and size % n == 0 for size, n in zip(whole, grid, strict=True))
    if not fits or whole.numel() != stored.shape.numel() or any(set(piece.sizes[:-1]) - {1} for piece in stored.pieces):
        raise ValueError(f"{stored.name} of shape {list(stored.shape)} for {list(whole)}")
    return FlatPieces(stored, whole)


def states_of(entries: Mapping[str, Any], folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the states of the optimizers in the form of ``state_dict``.

    Args:
        entries: Key -> lazy tensor, or the piece of any other object.
        folder: The checkpoint.

    Raises:
        UnsupportedStateError: The state is in flat buckets, or no file tells its settings.
        RefusedError: ``common.pt`` cannot be read safely.
    """
    states: dict[str, dict[str, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    objects: dict[str, list[Any]] = defaultdict(list)
    for key, entry in entries.items():
        if found := _KEY.fullmatch(key):
            states[found[1].rstrip(".")][found[3]][found[2]] = entry
        elif (found := _OBJECTS.fullmatch(key)) and found[2] == "optimizer" and isinstance(entry, Piece):
            objects[found[1].rstrip(".")].append(safe_pickle.load_part(entry.file, entry.start, entry.length))
    buckets = next((key for key in entries if _BUCKETS.search(key) or (not states and _OBJECTS.fullmatch(key))), None)
    if buckets is not None:
        raise UnsupportedStateError(
            f"{folder} must store the optimizer's state by parameter, but has flat buckets ({buckets[:80]}); save it "
            "with dist_ckpt_optim_fully_reshardable"
        )
    common = _common(folder)
    for optimizer in sorted(states):
        settings, steps = _settings(common, objects[optimizer], optimizer, folder)
        state = {name: {**fields, "step": steps} for name, fields in states[optimizer].items()}
        yield {"state": state, "param_groups": [{**settings, "params": list(state)}]}


def _common(folder: Path) -> Mapping[str, Any]:
    """Return the content of ``common.pt``; empty if there is no such file."""
    file = next((path for path in (folder / _COMMON, folder.parent / _COMMON) if path.is_file()), None)
    loaded = safe_pickle.load(file) if file is not None else {}
    return loaded if isinstance(loaded, Mapping) else {}


def _settings(
    common: Mapping[str, Any], objects: Sequence[Any], optimizer: str, folder: Path
) -> tuple[dict[str, Any], int | None]:
    """Return betas and steps of one optimizer; those that no file tells are None.

    Raises:
        UnsupportedStateError: The groups of the optimizer differ in their betas or steps.
    """
    inside: Any = common.get("optimizer", {})
    if isinstance(inside, Mapping) and optimizer:  # a chain has numbers or names
        number = optimizer.rpartition("_")[2]
        inside = next((inside[key] for key in (optimizer, int(number), number) if key in inside), inside)
    found = list(_settings_in([inside, *objects], _DEEPEST))
    betas = {tuple(group["betas"]) for group in found if isinstance(group.get("betas"), list | tuple)}
    counts = [group.get(key) for group in found for key in ("step", "common_step")]
    steps = {int(count) for count in counts if count is not None}
    if len(betas) > 1 or len(steps) > 1:
        raise UnsupportedStateError(
            f"the groups in {folder / _COMMON} must share their betas and steps, found {sorted(betas)} and "
            f"{sorted(steps)}; train with equal ones"
        )
    args = common.get("args")
    if not betas and isinstance(getattr(args, "adam_beta2", None), float):
        betas = {(getattr(args, "adam_beta1", 0.9), args.adam_beta2)}  # type: ignore[union-attr]
    named = _ITERATION.fullmatch(folder.name)
    recorded = [common.get(key) for key in ("iteration", "global_step")]  # NeMo has the latter
    last = next((count for count in recorded if type(count) is int), int(named[1]) if named else None)
    return {"betas": next(iter(betas), None)}, next(iter(steps), last)


def _settings_in(value: Any, deepest: int) -> Iterator[Mapping[str, Any]]:
    """Yield the groups of parameters in nested containers, and the states that have the steps of all parameters."""
    members: list[Any] = []
    if isinstance(value, Mapping):
        groups = value.get("param_groups")
        yield from (group for group in groups if isinstance(group, Mapping)) if isinstance(groups, list) else ()
        if value.get("common_step") is not None:
            yield value
        members = list(value.values())
    elif isinstance(value, list | tuple):
        members = list(value)
    for member in members if deepest else ():
        yield from _settings_in(member, deepest - 1)
