"""DeepSpeed's ZeRO checkpoints: flat buffers, one part in the file of each rank, cut by ``param_shapes``.

``global_stepN/`` holds ``*_optim_states.pt`` of every rank and ``*_model_states.pt``. In stages 1 and 2 the parameters
of a group follow one another in a buffer that is cut into equal parts, one per rank. In stage 3 each parameter is cut
separately, and every rank stores its part at the same offset. The slice mappings in the checkpoint are never used: with
round-robin gradients they are wrong. Each cut is verified against the weights instead, through the float32 copies of
the weights in buffers of the same layout.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError, NotFoundError, RefusedError, UnsupportedStateError
from squisher_mergekit.optimizers.checkpoints import safe_pickle
from squisher_mergekit.optimizers.checkpoints.flat_buffers import check_lengths, cut, entries, verify_masters
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.checkpoints.run_folder import tagged
from squisher_mergekit.optimizers.checkpoints.torch_save import is_state
from squisher_mergekit.optimizers.checkpoints.trainers import neox_elastic
from squisher_mergekit.optimizers.checkpoints.trainers.pipeline import (
    LAYER,
    fused_weights,
    joined,
    joined_fused,
    layer_weights,
)
from squisher_mergekit.optimizers.checkpoints.zip_checksums import Checksums
from squisher_mergekit.tensors.input_files import reading
from squisher_mergekit.tensors.lazy import Slices

LOG = logging.getLogger("squisher_mergekit")
_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_TAG = re.compile(r"global_step(\d+)")
_UNIVERSAL = "convert the checkpoint with DeepSpeed's ds_to_universal"

Shapes = list[Mapping[str, torch.Size]]


def find(folder: Path) -> Path | None:
    """Return the folder of a step: this folder, the one that ``latest`` names, or the last ``global_stepN`` in it."""
    if _is_step(folder):
        return folder
    latest = tagged(folder, "latest")
    if latest is not None and _is_step(latest):
        return latest
    steps = {int(m[1]): path for path in folder.glob("global_step*") if (m := _TAG.fullmatch(path.name))}
    return next((steps[step] for step in sorted(steps, reverse=True) if _is_step(steps[step])), None)


def read(folder: Path, verify: bool) -> RawState:
    """Read the files of all ranks.

    Raises:
        NotFoundError: The file of a rank is missing.
        MismatchError: The float32 weights cut for a parameter are not its weights.
        RefusedError: A file cannot be read safely, or its buffers cannot be cut.
    """
    checksums = Checksums(verify)
    files = _optim_files(folder)
    if not files:  # without ZeRO the optimizer's state is in the model's file
        model = _model(model_files(folder)[0], checksums)
        return RawState(
            folder, (_without_zero(model, folder),), module_of(model), "deepspeed", known_of(model), checksums.verify
        )
    parts = [_read_rank(folder, rank, files[rank], checksums) for rank in sorted(files)]
    if len(parts) == 1:
        return parts[0]
    if any(part.masters for part in parts):
        LOG.warning("%s: the cuts of its buffers could not be verified, as it has no files of layers", folder)
    states = [part.states[0] for part in parts]
    with reading(folder, "whole states of DeepSpeed"):
        state = joined([state["state"] for state in states], folder)
    present: set[str] = set()
    groups = []
    for group in (group for one in states for group in one["param_groups"]):
        groups.append({**group, "params": [name for name in group["params"] if name not in present]})
        present.update(group["params"])
    states_of_all = ({"state": state, "param_groups": groups},)
    fused, count = joined_fused([part.fused for part in parts], folder)
    return replace(parts[0], states=states_of_all, masters={}, model=None, fused=fused, tensor_ranks=count)


def _read_rank(folder: Path, model_rank: int, files: Sequence[Path], checksums: Checksums) -> RawState:
    """Read the files of one rank of tensor parallelism; there is one such rank where the model is not split."""
    model = _model(model_files(folder, model_rank)[0], checksums)
    loaded = [safe_pickle.load(file, checksums) for file in files]
    ranks = [_optimizer(content, file) for content, file in zip(loaded, files, strict=True)]
    _check_ranks(ranks, model, folder)
    try:
        if neox_elastic.MARK in ranks[0]:
            shapes = shapes_of({"param_shapes": [loaded[0].get("param_shapes")]}, folder)[0]  # of all parameters
            state, masters = neox_elastic.cut_stage_1(ranks, shapes, model, folder)
        else:
            state, masters = (_stage_3 if "fp32_flat_groups" in ranks[0] else _stage_2)(ranks, model, folder)
    except RefusedError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(
            f"{folder} must hold whole states of DeepSpeed, but lacks or mistakes {error!s:.100}; copy it again"
        ) from None
    known, fused = known_of(model) | {"max_grad_norm": positive(ranks[0].get("clip_grad"))}, fused_weights(masters)
    module = module_of(model)
    layers = next((path.name for path in folder.iterdir() if LAYER.fullmatch(path.name)), None)
    if module is not None and layers is not None:
        raise UnsupportedStateError(_split(folder, layers))
    if module is not None:
        verify_masters(masters, module, folder)
    elif verify_masters(masters, layer_weights(folder, model_rank, checksums), folder):
        masters = {}
    return RawState(folder, (state,), module, "deepspeed", known, checksums.verify, masters, fused=fused)


def _model(file: Path, checksums: Checksums) -> Mapping[str, Any]:
    model = safe_pickle.load(file, checksums)
    if not isinstance(model, Mapping):
        raise CorruptFileError(f"{file} must hold DeepSpeed's states of a model; copy it again")
    return model


def _without_zero(model: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Return the optimizer's state saved with the model, its parameters named by ``param_shapes``.

    Raises:
        NotFoundError: The model's file holds no optimizer's state.
    """
    state = model.get("optimizer")
    if isinstance(state, Mapping) and not is_state(state):
        state = state.get("optimizer_state_dict")  # inside the state of the 16-bit wrapper
    if not is_state(state) or not isinstance(state, Mapping):
        raise NotFoundError(f"{folder} must hold *_optim_states.pt of every rank, found none; copy them as well")
    names = [list(shapes) for shapes in model.get("param_shapes") or [] if isinstance(shapes, Mapping)]
    groups = state["param_groups"]
    if [len(members) for members in names] != [len(group["params"]) for group in groups]:
        return state
    named = [{**group, "param_names": members} for group, members in zip(groups, names, strict=True)]
    return {**state, "param_groups": named}


def _is_step(folder: Path) -> bool:
    """Return True for a folder with a step's files that is no universal checkpoint (with ``zero``)."""
    return folder.is_dir() and bool(_names(folder, _OPTIM) or _names(folder, _MODEL)) and not (folder / "zero").is_dir()


def _names(folder: Path, pattern: re.Pattern[str]) -> list[str]:
    return [path.name for path in folder.iterdir() if pattern.fullmatch(path.name)]


def model_files(folder: Path, model_rank: int | None = None) -> list[Path]:
    """Return the model's files in the order of their ranks.

    Args:
        folder: The step's folder.
        model_rank: Rank of tensor parallelism; None for a model that must not be split.

    Raises:
        NotFoundError: The folder has no such file.
        UnsupportedStateError: The model was split over several GPUs in a way that is not known.
    """
    split = [path.name for path in folder.iterdir() if re.match(r"expp_rank|.*expert_\d+", path.name)]
    matches = [(int(m[1] or 0), int(m[2]), path) for path in folder.iterdir() if (m := _MODEL.fullmatch(path.name))]
    split += [path.name for _, rank, path in matches if rank and model_rank is None]
    if split:
        raise UnsupportedStateError(_split(folder, split[0]))
    found = [(rank, path) for rank, of_model, path in matches if of_model == (model_rank or 0)]
    if not found:
        raise NotFoundError(
            f"{folder} must hold *_model_states.pt, which tells how the buffers are cut, found none; copy it as well"
        )
    return [path for _, path in sorted(found)]


def _split(folder: Path, file: str) -> str:
    """Return the message that refuses a model that was split over several GPUs."""
    return (
        f"{folder} must hold a model that is whole on each rank, but {file} is of tensor, pipeline or expert "
        "parallelism, whose parts are cut in other ways; estimate a Fisher from data"
    )


def _optim_files(folder: Path) -> dict[int, list[Path]]:
    """Return rank of tensor parallelism -> the optimizer's files in the order of their ranks.

    Raises:
        NotFoundError: The file of a rank is missing.
        CorruptFileError: A rank has two files.
    """
    matches = sorted((int(m[2]), int(m[1]), path) for path in folder.iterdir() if (m := _OPTIM.fullmatch(path.name)))
    found: dict[int, list[Path]] = {}
    for model_rank in dict.fromkeys(model_rank for model_rank, _, _ in matches):
        ranks = [rank for of_model, rank, _ in matches if of_model == model_rank]
        if len(set(ranks)) < len(ranks):
            raise CorruptFileError(
                f"{folder} must hold one optimizer's file of each rank, found two of one; remove one"
            )
        _need_all(ranks, max(len(ranks), len(matches) // len({match[0] for match in matches})), folder)
        found[model_rank] = [path for of_model, _, path in matches if of_model == model_rank]
    missing = sorted(set(range(_model_ranks(folder))) - set(found))
    if found and missing:
        raise UnsupportedStateError(
            f"{folder} must hold the optimizer's files of all ranks of tensor or pipeline parallelism, but those of "
            f"mp_rank_{missing[0]:02} are missing; copy them as well"
        )
    return found


def _model_ranks(folder: Path) -> int:
    """Return the number of ranks of the model by the names of its files."""
    names = [path.name for path in folder.iterdir()]
    return 1 + max((int(m[m.lastindex]) for name in names if (m := _MODEL.fullmatch(name)) and m.lastindex), default=0)


def _need_all(ranks: Sequence[int], count: int, folder: Path) -> None:
    present = set(ranks)
    first = next(rank for rank in range(len(present) + 1) if rank not in present)
    if first < max([count, *(rank + 1 for rank in ranks)]):
        raise NotFoundError(
            f"{folder} must hold the optimizer's files of all ranks, but that of rank {first} is missing; "
            "copy it as well"
        )


def _optimizer(loaded: Any, file: Path) -> Mapping[str, Any]:
    state = loaded.get("optimizer_state_dict") if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping):
        raise CorruptFileError(f"{file} must hold an optimizer_state_dict of DeepSpeed, found none; copy it again")
    return state


def _check_ranks(ranks: Sequence[Mapping[str, Any]], model: Mapping[str, Any], folder: Path) -> None:
    """Refuse a number of files that is not the recorded number of ranks."""
    for recorded in [model.get("dp_world_size"), *(rank.get("partition_count") for rank in ranks)]:
        for count in recorded if isinstance(recorded, list) else [recorded]:
            if isinstance(count, int) and count > len(ranks):
                _need_all(range(len(ranks)), count, folder)
            if count is not None and not (isinstance(count, int) and count == len(ranks)):
                raise CorruptFileError(
                    f"{folder} must hold the optimizer's files of {count!r:.20} ranks, found {len(ranks)}; "
                    "remove those of another run"
                )


def module_of(model: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
    """Return the weights in a file of model states; None in stage 3, where they are empty."""
    module = model.get("module")
    if not isinstance(module, Mapping) or not all(isinstance(value, Tensor) for value in module.values()):
        return None
    return module if any(value.numel() for value in module.values()) else None


def known_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata in a file of model states: version, and examples per step over all ranks and accumulation."""
    steps, samples = model.get("global_steps"), model.get("global_samples")
    version = model.get("ds_version")
    known: dict[str, Any] = {}
    if isinstance(steps, int) and isinstance(samples, int) and steps > 0 and samples > 0:
        known["examples_per_step"] = samples / steps
    return known | ({"versions": {"deepspeed": version}} if isinstance(version, str) else {})


def positive(value: Any) -> float | None:
    """Return a positive number as a float; None for anything else."""
    return float(value) if isinstance(value, int | float) and 0 < value < float("inf") else None


def shapes_of(model: Mapping[str, Any], folder: Path) -> Shapes:
    """Return ``param_shapes``: name -> shape for each group, in the order of the buffers.

    Raises:
        CorruptFileError: ``param_shapes`` is missing, or is something else.
    """
    groups = model.get("param_shapes")
    sound = isinstance(groups, list) and all(
        isinstance(group, Mapping) and all(isinstance(shape, torch.Size) for shape in group.values())
        for group in groups
    )
    if not sound or not isinstance(groups, list):
        raise CorruptFileError(f"the param_shapes in {folder} must be names and shapes; copy it again")
    return groups


def _stage_2(
    ranks: Sequence[Mapping[str, Any]], model: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Any], dict[str, Slices]]:
    """Cut the buffers of stages 1 and 2: the parts of the ranks, in order, make up the buffer of a group."""
    groups, bases = shapes_of(model, folder), [rank["base_optimizer_state"] for rank in ranks]
    elastic = isinstance(bases[0], list)
    states = [dict(enumerate(base)) if elastic else base["state"] for base in bases]
    settings = _elastic_settings(model, len(groups), folder) if elastic else bases[0]["param_groups"]
    masters = [rank["single_partition_of_fp32_groups"] for rank in ranks]
    paddings = ranks[0].get("param_alignment_paddings") or [[0] * len(shapes) for shapes in groups]
    if not len(groups) == len(settings) == len(paddings) == len(masters[0]):
        raise ValueError(f"{len(groups)} groups of parameters for {len(settings)} of the optimizer")
    state: dict[str, Any] = {}
    master: dict[str, Slices] = {}
    for number, shapes in enumerate(groups):
        check_lengths([flats[number] for flats in masters], [rank[number] for rank in states])
        offset = 0
        for (name, shape), padding in zip(shapes.items(), paddings[number], strict=True):
            span = (offset, shape.numel())
            master[name] = Slices(tuple(cut([flats[number] for flats in masters], *span)), shape)
            state[name] = {
                key: Slices(tuple(cut([rank[number][key] for rank in states], *span)), shape) if flat else value
                for key, value, flat in entries(states[0][number])
            }
            offset += shape.numel() + int(padding)
    return {"state": state, "param_groups": named_groups(settings, groups)}, master


def _stage_3(
    ranks: Sequence[Mapping[str, Any]], model: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Any], dict[str, Slices]]:
    """Cut the buffers of stage 3: every rank has an equal part of each parameter, at the same offset."""
    groups, inner = shapes_of(model, folder), [rank["optimizer_state_dict"] for rank in ranks]
    states, settings = [state_dict["state"] for state_dict in inner], inner[0]["param_groups"]
    masters = [rank["fp32_flat_groups"] for rank in ranks]
    count = len(masters[0])
    if not all(len(flats) == count for flats in [*states, *masters]) or sorted(states[0]) != list(range(count)):
        raise ValueError("a sub-group of parameters")
    for rank, flats in enumerate(masters):
        for number, flat in enumerate(flats):
            check_lengths([flat, flat], [states[rank][number]] * 2)
    state: dict[str, Any] = {}
    master: dict[str, Slices] = {}
    offset = 0
    ends = [sum(flat.numel() for flat in masters[0][: k + 1]) for k in range(count)]
    for name, shape in (item for group in groups for item in group.items()):
        share = -(-shape.numel() // len(ranks))
        if offset >= ends[-1]:
            raise ValueError("buffers that end before their parameters do")
        part = next(k for k, end in enumerate(ends) if offset < end)
        master[name] = _gather(masters, offset, share, shape)
        state[name] = {
            key: _gather([[rank[k][key] for k in range(count)] for rank in states], offset, share, shape)
            if flat
            else value
            for key, value, flat in entries(states[0][part])
        }
        offset += share
    return {"state": state, "param_groups": named_groups(settings, groups)}, master


def _gather(ranks: Sequence[Sequence[Tensor]], offset: int, share: int, shape: torch.Size) -> Slices:
    """Return a parameter from the ``share`` entries that each rank has at ``offset``; the last may be padding."""
    left = shape.numel()
    slices: list[tuple[Tensor, int, int]] = []
    for buffers in ranks:
        slices += cut(buffers, offset, min(share, left))
        left -= min(share, left)
    return Slices(tuple(slices), shape)


def named_groups(settings: Sequence[Mapping[str, Any]], groups: Shapes) -> list[dict[str, Any]]:
    """Return the optimizer's groups with the names of their parameters.

    Stage 3 divides groups, and the optimizer's groups list their parts by number. Without these numbers all groups must
    have the same settings, as nothing else tells which part belongs to which group.

    Args:
        settings: The optimizer's groups.
        groups: The ``param_shapes``.

    Raises:
        UnsupportedStateError: The groups were divided, and their settings differ.
    """
    parts = [group.get("params") for group in settings]
    listed = [number for numbers in parts if isinstance(numbers, list) for number in numbers]
    if all(isinstance(number, int) for number in listed) and sorted(listed) == [*range(len(groups))]:
        return [
            {**group, "params": [name for number in numbers or () for name in groups[number]]}
            for group, numbers in zip(settings, parts, strict=True)
        ]
    if len(settings) == len(groups):
        return [{**group, "params": list(shapes)} for group, shapes in zip(settings, groups, strict=True)]
    for key in ("betas", "alpha", "rho", "decay_rate", "beta2_decay"):
        if len({str(group.get(key)) for group in settings}) > 1:
            raise UnsupportedStateError(
                f"the groups of a ZeRO-3 optimizer must share their {key} where they were divided; {_UNIVERSAL}"
            )
    return [{**settings[0], "params": [name for shapes in groups for name in shapes]}]


def _elastic_settings(model: Mapping[str, Any], count: int, folder: Path) -> list[dict[str, Any]]:
    """Return the settings of an elastic checkpoint, from DeepSpeed's configuration."""
    config = model.get("ds_config")
    optimizer = config.get("optimizer") if isinstance(config, Mapping) else None
    params = optimizer.get("params") if isinstance(optimizer, Mapping) else None
    if not isinstance(params, Mapping) or "betas" not in params:
        raise UnsupportedStateError(
            f"{folder} is an elastic checkpoint, which does not tell the optimizer's betas; train without "
            "elastic_checkpoint"
        )
    return [dict(params) for _ in range(count)]
