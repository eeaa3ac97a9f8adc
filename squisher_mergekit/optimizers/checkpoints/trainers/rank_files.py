"""States of ``optimizer.state_dict()`` of each rank under FSDP: ``optim_world_size_W_rank_R.pt``, as verl writes them.

The parameters are numbered in the model's order. Under FSDP2 each tensor is a ``DTensor``. Under FSDP1 each rank has a
flat part of a whole module, or with original parameters of one parameter, of which a rank may have nothing. On a single
rank, FSDP1 leaves original parameters whole.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError, NotFoundError
from squisher_mergekit.optimizers.checkpoints.fsdp_ranks import joined, load_ranks, without_codes
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.checkpoints.zip_checksums import Checksums
from squisher_mergekit.tensors.lazy import Slices

NAME = re.compile(r"optim_world_size_(\d+)_rank_(\d+)\.pt")
_CONFIG = "huggingface"


def find(folder: Path) -> Path | None:
    """Return the file of the lowest rank in a folder, or in ``actor`` in it; None if there is none."""
    for place in (folder, folder / "actor"):
        files = _files(place) if place.is_dir() else {}
        if files:
            return files[min(files)]
    return None


def read(file: Path, verify: bool) -> RawState:
    """Read the files of all ranks.

    Args:
        file: The file of any rank; the others are beside it.
        verify: Verify checksums.

    Raises:
        NotFoundError: The file of a rank is missing.
        RefusedError: A file cannot be read safely, or the parts do not fit each other.
    """
    folder, checksums = file.parent, Checksums(verify)
    files = _files(folder)
    world = max((int(match[1]) for path in files.values() if (match := NAME.fullmatch(path.name))), default=0)
    missing = sorted(set(range(world)) - set(files))
    if missing or not files:
        raise NotFoundError(
            f"{folder} must hold the optimizer's files of {world or 'all'} ranks, but that of rank "
            f"{missing[0] if missing else 0} is missing; copy it as well"
        )
    loaded = load_ranks(files, checksums)
    entries = [entry for state in loaded.values() for entry in state["state"].values() if isinstance(entry, Mapping)]
    sharded = any(hasattr(value, "placements") for entry in entries for value in entry.values())
    whole = sharded or (
        world == 1 and any(getattr(value, "ndim", 0) > 1 for entry in entries for value in entry.values())
    )
    state = joined(loaded, file) if whole else _flat(loaded, file)
    beside = tuple(place for place in (folder / _CONFIG,) if place.is_dir())
    return RawState(file, (state,), layout="verl", verify=checksums.verify, beside=beside, ranks=0 if whole else world)


def _files(folder: Path) -> dict[int, Path]:
    """Return rank -> file."""
    matches = [(match, path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    worlds = {int(match[1]) for match, _ in matches}
    if len(worlds) > 1:
        raise CorruptFileError(
            f"{folder} must hold the files of one run, found those of {sorted(worlds)} ranks; remove those of the other"
        )
    return {int(match[2]): path for match, path in matches}


def _flat(loaded: Mapping[int, Mapping[str, Any]], file: Path) -> Mapping[str, Any]:
    """Join the flat parts of all ranks; a rank without an entry has nothing of the parameter."""
    ranks = [without_codes(one["state"], file) for one in loaded.values()]
    state = {}
    for number in dict.fromkeys(number for rank in ranks for number in rank):
        entries = [rank[number] for rank in ranks if number in rank]
        keys = dict.fromkeys(key for entry in entries for key in entry)
        state[number] = {key: _joined_parts([e[key] for e in entries if key in e], number, file) for key in keys}
    return {"state": state, "param_groups": loaded[min(loaded)]["param_groups"]}


def _joined_parts(values: Sequence[Any], number: int, file: Path) -> Any:
    first = values[0]
    if not isinstance(first, Tensor) or not first.ndim:
        return first
    if any(not isinstance(v, Tensor) or v.ndim != 1 or v.dtype != first.dtype for v in values):
        raise CorruptFileError(
            f"parameter {number} in {file} must be flat on every rank, as FSDP1 keeps it, found shape "
            f"{list(first.shape)}; save with a full state dict"
        )
    total = sum(value.numel() for value in values)
    return Slices(tuple((value, 0, value.numel()) for value in values), torch.Size([total]))
