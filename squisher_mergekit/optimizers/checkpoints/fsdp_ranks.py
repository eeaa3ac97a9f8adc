"""FSDP's sharded state without a distributed checkpoint: ``optimizer_0_rankR.bin``, one file per rank.

accelerate writes it with ``use_dcp=False``. Each tensor is FSDP2's ``DTensor``, with this rank's shard and the
placements, or FSDP1's ``ShardedTensor``, with the offsets of every shard.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError, NotFoundError, UnsupportedStateError
from squisher_mergekit.optimizers.checkpoints import safe_pickle
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.checkpoints.stand_ins import ShardedStandIn
from squisher_mergekit.optimizers.checkpoints.torch_save import is_state
from squisher_mergekit.optimizers.checkpoints.zip_checksums import Checksums
from squisher_mergekit.optimizers.second_moments import unwrapped_state
from squisher_mergekit.tensors.lazy import Joined, MaybeLazy

NAME = re.compile(r"optimizer_(\d+)_rank(\d+)\.bin")


def find(folder: Path) -> Path | None:
    """Return the file of the lowest rank; None if there is none."""
    files = _files(folder, 0)
    return files[min(files)] if files else None


def read(file: Path, verify: bool) -> RawState:
    """Read the files of all ranks.

    Args:
        file: The file of any rank; the others are beside it.
        verify: Verify checksums.

    Raises:
        NotFoundError: The file of a rank is missing.
        RefusedError: A file cannot be read safely, or the shards do not fit each other.
    """
    folder, checksums = file.parent, Checksums(verify)
    states: list[Mapping[str, Any]] = []
    while files := _files(folder, len(states)):
        states.append(joined(load_ranks(files, checksums), files[min(files)]))
    if not states:
        raise NotFoundError(f"{folder} must hold the files of each rank, but has none; give another folder")
    return RawState(file, tuple(states), layout="accelerate-fsdp", verify=checksums.verify)


def _files(folder: Path, number: int) -> dict[int, Path]:
    """Return rank -> file of one optimizer."""
    matches = [(match, path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return {int(match[2]): path for match, path in matches if int(match[1]) == number}


def load_ranks(files: Mapping[int, Path], checksums: Checksums) -> dict[int, Mapping[str, Any]]:
    """Load the optimizer's state_dict of every rank.

    Raises:
        CorruptFileError: A file holds something else.
        RefusedError: A file cannot be read safely.
    """
    with shards_allowed():
        loaded = {rank: safe_pickle.load(path, checksums) for rank, path in sorted(files.items())}
    for rank, state in loaded.items():
        if not is_state(state):
            raise CorruptFileError(f"{files[rank]} must hold an optimizer's state_dict, found none; copy it again")
    if len(loaded) == 1:
        return loaded
    return {rank: {**state, "state": without_codes(state["state"], files[rank])} for rank, state in loaded.items()}


def without_codes(state: Mapping[Any, Any], file: Path) -> dict[Any, Any]:
    """Return the states of a rank's parameters, out of the wrapper of bitsandbytes.

    Args:
        state: Name or number -> state.
        file: The rank's file, for messages.

    Raises:
        UnsupportedStateError: A second moment is in 8-bit codes.
    """
    plain = {name: unwrapped_state(entry) if isinstance(entry, Mapping) else entry for name, entry in state.items()}
    for name, entry in plain.items():
        for key, value in entry.items() if isinstance(entry, Mapping) else ():
            local = getattr(value, "_local_tensor", value)
            if hasattr(local, "codes") or key in ("qmap2", "absmax2"):
                raise UnsupportedStateError(
                    f"the state of {name} in {file} must be in floats to be joined and cut, but it is "
                    "in 8-bit or 4-bit codes, of blocks of each rank's own; train with adamw_torch"
                )
    return plain


@contextmanager
def shards_allowed() -> Iterator[None]:
    """Allow torch's sharded tensors in ``weights_only``, and silence its warning about a missing process group."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, _dtensor_spec, placement_types

    # torch registers these classes at import, but loses them if the import happens within another safe_globals.
    named = dict.fromkeys(("DTensorSpec", "TensorMeta", "ShardOrderEntry"), _dtensor_spec)
    named |= dict.fromkeys(("Shard", "Replicate", "Partial", "_StridedShard"), placement_types)
    known = [getattr(home, name) for name, home in named.items() if hasattr(home, name)]
    logger = logging.getLogger("torch.distributed.device_mesh")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.serialization.safe_globals([DeviceMesh, DTensor, *known]):
            yield
    finally:
        logger.setLevel(before)


def joined(loaded: Mapping[int, Mapping[str, Any]], file: Path) -> Mapping[str, Any]:
    """Join the shards of every tensor in the states of all ranks."""
    first = loaded[min(loaded)]
    state: dict[Any, dict[str, Any]] = {}
    for name, entry in first["state"].items():
        if not isinstance(entry, Mapping):
            raise CorruptFileError(f"the state of {name} in {file} must be a mapping; copy it again")
        state[name] = {}
        for key, value in entry.items():
            entries = {rank: state_dict["state"].get(name) for rank, state_dict in loaded.items()}
            shards = {rank: kept.get(key) if isinstance(kept, Mapping) else None for rank, kept in entries.items()}
            state[name][key] = _join(shards, value, f"{key} of {name} in {file}")
    return {"state": state, "param_groups": first["param_groups"]}


def _join(shards: Mapping[int, Any], value: Any, location: str) -> Any:
    """Join the shards of a tensor sharded by FSDP2 or FSDP1; return any other value as it is."""
    if hasattr(value, "placements"):
        return _join_mesh(shards, location)
    if isinstance(value, ShardedStandIn):
        return _join_shards(shards, location)
    if isinstance(value, Tensor) and value.ndim:
        others = [shard for shard in shards.values() if shard is not value]
        if not all(isinstance(other, Tensor) and torch.equal(other, value) for other in others):
            raise CorruptFileError(
                f"{location} must be a sharded tensor, or whole on every rank, but the ranks have different plain "
                f"tensors, here of shape {list(value.shape)}; save with state_dict_type FULL_STATE_DICT"
            )
    return value


def _join_shards(shards: Mapping[int, Any], location: str) -> MaybeLazy:
    """Join FSDP1's shards of one tensor, each of which records the offsets of all shards.

    Raises:
        NotFoundError: The shard of a rank is missing.
        CorruptFileError: The shards do not add up to the tensor.
    """
    try:
        found = {
            tuple(shard.metadata.shard_offsets): shard.tensor
            for stand_in in shards.values()
            if isinstance(stand_in, ShardedStandIn)
            for shard in stand_in.state[0]
        }
        metadata = shards[min(shards)].state[1]
        wanted = {tuple(shard.shard_offsets): tuple(shard.shard_sizes) for shard in metadata.shards_metadata}
        shape = tuple(metadata.size)
    except (AttributeError, IndexError, TypeError) as error:
        raise CorruptFileError(
            f"{location} must tell where its shards belong, but {error!s:.80}; copy it again"
        ) from None
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise NotFoundError(
            f"{location} is in {len(wanted)} shards, but that from row {missing[0][0] if missing[0] else 0} on is in "
            "no file; copy the files of all ranks"
        )
    order = sorted(found)
    tensors = tuple(found[offset] for offset in order)
    fits = all(isinstance(t, Tensor) and tuple(t.shape) == wanted.get(o) for o, t in zip(order, tensors, strict=True))
    row = 0
    for offset, tensor in zip(order, tensors, strict=True):
        fits = fits and (not offset or (offset[0] == row and not any(offset[1:])))
        row += tensor.shape[0] if fits and tensor.ndim else 0
    if not fits or _joined_shape(tensors, 0) != shape:
        raise CorruptFileError(f"the shards of {location} must add up to the shape {list(shape)}; copy the files again")
    return Joined(tensors, 0) if len(tensors) > 1 else tensors[0]


def _join_mesh(shards: Mapping[int, Any], location: str) -> MaybeLazy:
    """Join FSDP2's shards of one tensor in the order of the mesh.

    Raises:
        NotFoundError: The shard of a rank is missing.
        CorruptFileError: The shards do not add up to the tensor.
        UnsupportedStateError: The tensor is sharded along several axes.
    """
    first = shards[min(shards)]
    mesh, placements, shape = first.device_mesh.mesh, first.placements, tuple(first.shape)
    missing = sorted(set(mesh.flatten().tolist()) - {rank for rank, shard in shards.items() if shard is not None})
    if missing:
        raise NotFoundError(
            f"{location} is spread over {mesh.numel()} ranks, but the file of rank {missing[0]} is missing or lacks "
            "it; copy the files of all ranks"
        )
    cut = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    if len(cut) > 1 or any(type(placements[axis]).__name__ != "Shard" for axis in cut) or len(placements) != mesh.ndim:
        raise UnsupportedStateError(
            f"{location} must be cut along one axis, found {placements}; save with state_dict_type FULL_STATE_DICT"
        )
    ranks: Sequence[int] = [int(mesh.flatten()[0])]
    if cut:
        ranks = mesh.movedim(cut[0], 0).reshape(mesh.shape[cut[0]], -1)[:, 0].tolist()
    locals_ = [getattr(shards[rank], "_local_tensor", None) for rank in ranks]
    along = placements[cut[0]].dim if cut else 0
    tensors = tuple(local for local in locals_ if isinstance(local, Tensor))
    fits = len(tensors) == len(ranks) and all(local.ndim == len(shape) for local in tensors)
    if not fits or (cut and not 0 <= along < len(shape)) or _joined_shape(tensors, along) != shape:
        raise CorruptFileError(f"the shards of {location} must add up to the shape {list(shape)}; copy the files again")
    full = tuple(local for local in tensors if local.numel()) or tensors[:1]
    return Joined(full, along) if len(full) > 1 else full[0]


def _joined_shape(shards: Sequence[Tensor], axis: int) -> tuple[int, ...] | None:
    """Return the shape of the joined tensor; None if the shards differ along another axis."""
    if not shards[0].ndim:
        return ()
    rest = {(*shard.shape[:axis], *shard.shape[axis + 1 :]) for shard in shards}
    if len(rest) > 1:
        return None
    return (*shards[0].shape[:axis], sum(shard.shape[axis] for shard in shards), *shards[0].shape[axis + 1 :])
