"""nanotron's checkpoint: ``N/optimizer/optimizer_pp-P-of-PP[_dp-D-of-DD]_tp-T-of-TT[_exp-E-of-EE].pt``.

Each file names its parameters under ``names``. With ZeRO-1 each rank of data parallelism has a flat slice of some
parameters, and ``optimizer_config.json`` has the offsets and shapes. Stages of a pipeline have their own layers, and
ranks of tensor parallelism their parts of the tensors.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError, NotFoundError, UnsupportedStateError
from squisher_mergekit.optimizers.checkpoints import safe_pickle
from squisher_mergekit.optimizers.checkpoints.raw_state import OwnNames, RawState
from squisher_mergekit.optimizers.checkpoints.torch_save import is_state
from squisher_mergekit.optimizers.checkpoints.trainers.nanotron_parts import joined_parts, weight_headers
from squisher_mergekit.optimizers.checkpoints.zip_checksums import Checksums
from squisher_mergekit.tensors.input_files import read_mapping
from squisher_mergekit.tensors.lazy import MaybeLazy, Slices
from squisher_mergekit.tensors.safetensors import SafetensorsStore

NAME = re.compile(
    r"optimizer_pp-(?P<pp>\d+)-of-(?P<stages>\d+)(?:_dp-(?P<dp>\d+)-of-(?P<ranks>\d+))?"
    r"_tp-(?P<tp>\d+)-of-(?P<parts>\d+)(?:_exp-(?P<exp>\d+)-of-(?P<experts>\d+))?\.pt"
)
_SETTINGS, _ROTARY = "optimizer_config.json", "rope_interleaved"
_EARLY = {"max_position_embeddings", "pretraining_tp", "rms_norm_eps"}  # settings that nanotron always writes
_KINDS = ("pp", "tp", "dp")


@dataclass(frozen=True)
class _RankFile:
    """File of one rank.

    Attributes:
        path: The file.
        ranks: Rank and number of ranks by kind of parallelism: ``pp``, ``dp``, ``tp``, ``exp``.
    """

    path: Path
    ranks: Mapping[str, tuple[int, int]]


def find(folder: Path) -> Path | None:
    """Return the folder with the files: this folder, or ``optimizer`` in it; None if there are none."""
    places = (place for place in (folder, folder / "optimizer") if place.is_dir())
    return next((place for place in places if any(NAME.fullmatch(path.name) for path in place.iterdir())), None)


def read(folder: Path, verify: bool) -> RawState:
    """Read the files of all ranks.

    Raises:
        NotFoundError: The file of a rank is missing, or ``model_config.json``.
        UnsupportedStateError: The parameters are split by expert parallelism.
        RefusedError: A file cannot be read safely, or its slices do not fit.
    """
    checksums = Checksums(verify)
    files = _files(folder)
    loaded = [(file, _named(safe_pickle.load(file.path, checksums), file.path)) for file in files]
    offsets = _offsets(folder) if any("dp" in file.ranks for file in files) else None
    state: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for stage in sorted({file.ranks["pp"][0] for file in files}):
        of_stage = [(file, content) for file, content in loaded if file.ranks["pp"][0] == stage]
        by_part = {
            part: [(file, content) for file, content in of_stage if file.ranks["tp"][0] == part]
            for part in range(of_stage[0][0].ranks["tp"][1])
        }
        states = {
            part: _whole(one[0][1]) if offsets is None else _joined(one, offsets, folder.parent)
            for part, one in by_part.items()
        }
        joined = states[0] if len(states) == 1 else _of_parts(states, folder.parent)
        groups += _groups(of_stage[0][1], [content for _, content in of_stage], state)
        state = {**joined, **state}  # tied embeddings are in the first and in the last stage
    own, is_told = _rotary(folder.parent)
    return RawState(
        folder, ({"state": state, "param_groups": groups},), layout="nanotron", verify=checksums.verify, own=own,
        fused={} if is_told else _fused_weights(folder.parent, state),
    )  # fmt: skip


def _rotary(checkpoint: Path) -> tuple[OwnNames, bool]:
    """Return the names by the order of rotary rows, and True if nanotron's config tells it.

    Up to version 0.4 there was no setting: the rows were in pairs. A config without the other settings of these
    versions was not written by them; there the default of later versions counts. Weights go before both.

    Raises:
        NotFoundError: ``model_config.json`` is missing.
    """
    file = checkpoint / "model_config.json"
    if not file.is_file():
        raise NotFoundError(
            f"{checkpoint} must hold nanotron's model_config.json, which tells the order of rotary rows, found none; "
            "copy it as well"
        )
    found = read_mapping(file)
    is_told = _ROTARY in found or "is_qwen2_config" in found
    is_early = not is_told and set(found) >= _EARLY
    return OwnNames("nanotron with rope_interleaved" if found.get(_ROTARY, is_early) is True else "nanotron"), is_told


def _fused_weights(checkpoint: Path, names: Collection[str]) -> dict[str, MaybeLazy]:
    """Return the weights of the first fused queries, keys and values, under their name; none without their files."""
    name = next((name for name in names if name.endswith(".qkv_proj.weight")), "")
    parts = {
        rank or 0: {"weight": SafetensorsStore([header.file], str(header.file)).read("data")}
        for rank, header in (weight_headers(checkpoint, name) if name else {}).items()
        if "data" in header.infos
    }
    if not parts:
        return {}
    whole = joined_parts(name, parts, checkpoint) if len(parts) > 1 else next(iter(parts.values()))
    return {name: whole["weight"]}


def _files(folder: Path) -> list[_RankFile]:
    """Return the files of all ranks, in the order of their ranks.

    Raises:
        NotFoundError: The file of a rank is missing.
        UnsupportedStateError: The parameters are split by expert parallelism.
    """
    files = []
    for path in sorted(folder.iterdir()):
        if match := NAME.fullmatch(path.name):
            numbers = {key: int(value) for key, value in match.groupdict().items() if value is not None}
            kinds = (("pp", "stages"), ("dp", "ranks"), ("tp", "parts"), ("exp", "experts"))
            files.append(_RankFile(path, {k: (numbers[k], numbers[of]) for k, of in kinds if k in numbers}))
    if not files:
        raise NotFoundError(f"{folder} must hold nanotron's files of the optimizer, found none; give another folder")
    split = next((file for file in files if file.ranks.get("exp", (0, 1))[1] > 1), None)
    if split is not None:
        raise UnsupportedStateError(
            f"the experts in {folder} must be whole on each rank, but {split.path.name} is of expert parallelism; save "
            "it again with one such rank, or estimate a Fisher from data"
        )
    if len({tuple((kind, count) for kind, (_, count) in file.ranks.items()) for file in files}) > 1:
        raise CorruptFileError(f"{folder} must hold the files of one run, found those of several; remove the others")
    counts = {kind: files[0].ranks.get(kind, (0, 1))[1] for kind in _KINDS}
    present = {tuple(file.ranks.get(kind, (0, 1))[0] for kind in _KINDS) for file in files}
    for ranks in product(*(range(counts[kind]) for kind in _KINDS)):
        if ranks not in present:
            missing = ", ".join(
                f"{kind} {rank}" for kind, rank in zip(_KINDS, ranks, strict=True) if kind != "tp" or counts[kind] > 1
            )
            raise NotFoundError(
                f"{folder} must hold the optimizer's files of all ranks, but that of {missing} is missing; copy it as "
                "well"
            )
    return sorted(files, key=lambda file: tuple(file.ranks.get(kind, (0, 1))[0] for kind in _KINDS))


def _named(loaded: Any, path: Path) -> Mapping[str, Any]:
    """Return the content of a file, which must be a state with ``names``."""
    names = loaded.get("names") if isinstance(loaded, Mapping) else None
    if (
        not isinstance(loaded, Mapping)
        or not is_state(loaded)
        or not isinstance(names, Mapping)
        or not set(loaded["state"]) <= set(names)
    ):
        raise CorruptFileError(
            f"{path} must hold an optimizer's state_dict with the names of its parameters; copy it again"
        )
    return loaded


def _whole(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return name -> state where every rank has all of each parameter."""
    return {str(content["names"][index]): dict(entry) for index, entry in content["state"].items()}


def _of_parts(states: Mapping[int, Mapping[str, Mapping[str, Any]]], checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Join the parts of tensor parallelism: name -> state."""
    names = dict.fromkeys(name for state in states.values() for name in state)
    return {
        name: joined_parts(name, {part: state[name] for part, state in states.items() if name in state}, checkpoint)
        for name in names
    }


def _groups(
    content: Mapping[str, Any], contents: Sequence[Mapping[str, Any]], earlier: Collection[str]
) -> list[dict[str, Any]]:
    """Return the groups of a stage with names; parameters of which this rank has nothing join the first group.

    Args:
        content: Content of the first file of the stage.
        contents: Content of all files of the stage.
        earlier: Names of the parameters of earlier stages, which are left out.
    """
    names = {index: str(name) for index, name in content["names"].items() if str(name) not in earlier}
    groups = [
        {**g, "params": [names[index] for index in g["params"] if index in names]} for g in content["param_groups"]
    ]
    listed = {name for group in groups for name in group["params"]} | set(earlier)
    others = dict.fromkeys(str(name) for one in contents for name in one["names"].values())
    groups[0]["params"] += [name for name in others if name not in listed]
    return groups


@dataclass(frozen=True)
class _Offsets:
    """Slices of the parameters under ZeRO-1.

    Attributes:
        file: File of the offsets.
        slices: Name -> rank of data parallelism -> first entry and entry after the last.
        shapes: Name -> shape.
    """

    file: Path
    slices: Mapping[str, Mapping[int, tuple[int, int]]]
    shapes: Mapping[str, tuple[int, ...]]


def _offsets(folder: Path) -> _Offsets:
    """Return the slices of the parameters.

    Raises:
        CorruptFileError: The file is missing or damaged.
    """
    file = folder / _SETTINGS
    configs = read_mapping(file).get("configs") if file.is_file() else None
    try:
        ranges, shapes = configs["param_name_to_dp_rank_offsets"], configs["orig_param_shapes"]  # type: ignore[index]
        slices = {name: {int(rank): _numbers(span) for rank, span in by.items()} for name, by in ranges.items()}
        return _Offsets(
            file,
            {n: {r: (span[0], span[1]) for r, span in by.items()} for n, by in slices.items()},
            {name: _numbers(shape) for name, shape in shapes.items()},
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{file} must tell the offsets and shapes of the parameters, but {error!r:.100}; copy it as well"
        ) from None


def _numbers(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _joined(
    files: Sequence[tuple[_RankFile, Mapping[str, Any]]], offsets: _Offsets, checkpoint: Path
) -> dict[str, dict[str, Any]]:
    """Join the slices of all ranks of data parallelism: name -> state.

    Raises:
        CorruptFileError: The slices do not make up a parameter.
    """
    by_name: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for file, content in files:
        for index, entry in content["state"].items():
            by_name[str(content["names"][index])][file.ranks["dp"][0]] = entry
    part = files[0][0].ranks["tp"][0]
    return {
        name: _join(name, entries, _recorded(name, entries, offsets, part, checkpoint))
        for name, entries in by_name.items()
    }


def _recorded(
    name: str, entries: Mapping[int, Mapping[str, Any]], offsets: _Offsets, part: int, checkpoint: Path
) -> _Offsets:
    """Return the offsets of a parameter; those of later stages, which no file records, follow from the sizes."""
    headers = weight_headers(checkpoint, name) if name not in offsets.slices else {}
    header = headers.get(part, headers.get(None))
    if header is None or "data" not in header.infos:
        return offsets
    spans, begin = {}, 0
    for rank in sorted(entries):
        length = next((v.numel() for v in entries[rank].values() if isinstance(v, Tensor) and v.ndim), 0)
        spans[rank] = (begin, begin + length)
        begin += length
    return _Offsets(header.file, {name: spans}, {name: tuple(header.infos["data"].shape)})


def _join(name: str, entries: Mapping[int, Mapping[str, Any]], offsets: _Offsets) -> dict[str, Any]:
    spans = offsets.slices.get(name, {})
    order = sorted((span, rank) for rank, span in spans.items() if span[1] > span[0])
    shape = torch.Size(offsets.shapes.get(name, ()))
    ends = [0, *(stop for (_, stop), _ in order)]
    tiles = [start for (start, _), _ in order] == ends[:-1] and ends[-1] == shape.numel()
    joined: dict[str, Any] = {}
    for key, value in next(iter(entries.values())).items():
        if not isinstance(value, Tensor) or not value.ndim:
            joined[key] = value
            continue
        parts = [entries.get(rank, {}).get(key) for _, rank in order]
        fits = tiles and all(
            isinstance(part, Tensor) and part.numel() == stop - start and part.is_contiguous()
            for part, ((start, stop), _) in zip(parts, order, strict=True)
        )
        if not fits:
            raise CorruptFileError(
                f"the slices of {name} must make up its {shape.numel()} entries, by {offsets.file}, but do not; copy "
                "the files of all ranks again"
            )
        joined[key] = Slices(tuple((part.reshape(-1), 0, part.numel()) for part in parts if part is not None), shape)
    return joined
