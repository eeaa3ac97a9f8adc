"""Distributed checkpoint of torch (DCP): an index, ``.metadata``, and pieces of tensors in ``*.distcp``.

accelerate and the Trainer write it under FSDP with sharded states (``optimizer_0/``), torchtitan as ``step-N/``. The
optimizer's entries are nested (``optimizer.param_groups.0.betas``) or flattened
(``optimizer.param_groups.NAME.betas``). Tensors are read piece by piece, when asked for.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from squisher_mergekit.errors import CorruptFileError, NotFoundError, RefusedError, UnsupportedStateError
from squisher_mergekit.optimizers.checkpoints import safe_pickle
from squisher_mergekit.optimizers.checkpoints.dcp_pieces import Piece, Pieces, check_pieces
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.checkpoints.torch_save import without_prefix
from squisher_mergekit.optimizers.checkpoints.trainers import megatron, olmo_core

INDEX = ".metadata"
_GROUPS = ("param_groups.", "param_to_group_meta.")  # the second by Megatron's FSDP, with the settings of each name
_STATE = "state."


def find(folder: Path) -> Path | None:
    """Return the folder of a distributed checkpoint: this one, or that of the optimizer in it, as trainers name it."""
    places = (folder, *(folder / name for name in ("optimizer_0", olmo_core.FOLDER, "weights")))
    return next((path for path in places if (path / INDEX).is_file()), None)


def read(folder: Path, verify: bool) -> RawState:
    """Read the index, and return the optimizers' states in it.

    Raises:
        UnsafeFileError: The pickle of the index asks for unknown classes; nothing of it was run.
        CorruptFileError: The index is damaged, or does not fit the files.
        UnsupportedStateError: The checkpoint holds no optimizer.
    """
    folders = [folder]
    if folder.name == "optimizer_0":
        more = (path for path in folder.parent.glob("optimizer_[0-9]*") if (path / INDEX).is_file())
        folders += sorted(path for path in more if path != folder and path.name.removeprefix("optimizer_").isdigit())
    states = [state for path in folders for state in _states(path, verify)]
    if not states:
        raise UnsupportedStateError(
            f"{folder} must hold an optimizer's state, but its index names none (the weights alone?); "
            "give the checkpoint of the optimizer, or save it as well"
        )
    layout = "accelerate-fsdp" if folder.name == "optimizer_0" else "torch-distributed"
    raw = RawState(folder, tuple(states), layout=layout)
    if folder.name == olmo_core.FOLDER:
        return olmo_core.adapted(raw)
    return replace(raw, layout="megatron-core") if (folder / "metadata.json").is_file() else raw


def _states(folder: Path, verify: bool) -> Iterator[Mapping[str, Any]]:
    index = folder / INDEX
    try:
        entries = dict(_entries(safe_pickle.load_metadata(index), folder, verify))
    except RefusedError:
        raise
    except Exception as error:  # a damaged index can lack any attribute, or have any type instead
        raise CorruptFileError(
            f"{index} must be a whole index of a distributed checkpoint, but it is damaged ({error!r:.100}); copy it "
            "again"
        ) from None
    if megatron.is_megatron(entries):
        yield from megatron.states_of(entries, folder)
        return
    prefixes = {key[: key.index(word)] for key in entries for word in _GROUPS if word in key}
    for prefix in sorted(prefix for prefix in prefixes if not prefix or prefix.endswith(".")):
        state = _state(prefix, entries, index)
        yield without_prefix(state) if ".optimizers." in prefix else state  # Composer's


def _entries(metadata: Any, folder: Path, verify: bool) -> Iterator[tuple[str, Any]]:
    """Yield key -> lazy tensor, or for other values their only piece."""
    stored_pieces = defaultdict(list)
    for position, stored in metadata.storage_data.items():
        offset = getattr(position, "offset", None)
        stored_pieces[str(position.fqn)].append((None if offset is None else tuple(offset), stored))
    sizes: dict[Path, int] = {}
    notes = getattr(metadata, "mcore_data", None) or {}
    for key, described in metadata.state_dict_metadata.items():
        chunks = getattr(described, "chunks", None)
        pieces = [
            _piece(offset, stored, chunks or (), folder, sizes, key) for offset, stored in stored_pieces[str(key)]
        ]
        if chunks is None:
            yield str(key), pieces[0]
            continue
        shape, dtype = torch.Size(described.size), described.properties.state[0]
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{key} has no dtype")
        check_pieces(str(key), shape, dtype, pieces, len(chunks), folder)
        whole = Pieces(str(key), shape, dtype, tuple(pieces), verify)
        yield str(key), megatron.unflattened(whole, notes.get(key))


def _piece(
    offset: tuple[int, ...] | None, stored: Any, chunks: Sequence[Any], folder: Path, sizes: dict[Path, int], key: str
) -> Piece:
    """Return a piece, in a file inside the folder.

    Raises:
        CorruptFileError: The file is outside the folder, or too short.
        NotFoundError: The file is missing.
        UnsupportedStateError: The piece is compressed or encrypted.
    """
    relative = PurePosixPath(str(stored.relative_path))
    if relative.is_absolute() or ".." in relative.parts or "\\" in str(relative):
        raise CorruptFileError(f"{folder / INDEX} must name files in its own folder, found {relative} for {key}")
    if getattr(stored, "transform_descriptors", None):
        raise UnsupportedStateError(
            f"{key} in {folder} is compressed or encrypted; save the checkpoint without extensions"
        )
    file = folder / relative
    if file not in sizes:
        if not file.is_file():
            raise NotFoundError(f"{folder / INDEX} names {relative}, which is missing; copy the whole checkpoint")
        sizes[file] = file.stat().st_size
    start, length = int(stored.offset), int(stored.length)
    if start < 0 or length < 0 or start + length > sizes[file]:
        raise CorruptFileError(
            f"{file} must have {start + length} bytes, by its index, but has {sizes[file]}; copy the checkpoint again"
        )
    (chunk,) = [chunk for chunk in chunks if tuple(chunk.offsets) == offset] or [None]
    return Piece(offset or (), () if chunk is None else tuple(chunk.sizes), file, start, length)


class _Settings(Mapping[str, Any]):
    """Parameter group whose entries are read when asked for, as there can be a dozen per parameter."""

    def __init__(self, pieces: Mapping[str, Any], params: list[Any]) -> None:
        self._pieces = pieces
        self._read = {"params": params}

    def __getitem__(self, key: str) -> Any:
        if key not in self._read:
            self._read[key] = _value(self._pieces[key])
        return self._read[key]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._pieces, "params"]))

    def __len__(self) -> int:
        return len(self._pieces.keys() | {"params"})


def _value(entry: Any) -> Any:
    return entry.read() if isinstance(entry, Pieces) else safe_pickle.load_part(entry.file, entry.start, entry.length)


def _state(prefix: str, entries: Mapping[str, Any], index: Path) -> Mapping[str, Any]:
    """Return the entries of one optimizer in the form of ``state_dict``."""
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    state: dict[Any, dict[str, Any]] = defaultdict(dict)
    for key, entry in entries.items():
        rest = key.removeprefix(prefix)
        owner, _, field = rest.partition(".")[2].rpartition(".")
        if rest.startswith(_GROUPS) and key.startswith(prefix) and owner:
            groups[owner][field] = entry
        elif rest.startswith(_STATE) and key.startswith(prefix) and owner:
            state[owner][field] = _value(entry) if field == "step" else entry
    for owner in state.keys() & groups.keys():
        if "step" not in state[owner] and "step" in groups[owner]:
            state[owner]["step"] = _value(groups[owner]["step"])
    nested = all(re.fullmatch(r"\d+", owner) and "params" in group for owner, group in groups.items())
    settings = []
    for owner in sorted(groups, key=int) if nested else groups:
        params = _value(groups[owner]["params"]) if nested else [owner]
        if not isinstance(params, list) or not all(isinstance(name, str | int) for name in params):
            raise CorruptFileError(
                f"the params of a group in {index} must be a list of names; copy the checkpoint again"
            )
        settings.append(_Settings({key: entry for key, entry in groups[owner].items() if key != "params"}, params))
    numbers = {str(name): name for group in settings for name in group["params"]}
    return {
        "state": {numbers.get(owner, owner): entry for owner, entry in state.items()},
        "param_groups": settings,
    }
