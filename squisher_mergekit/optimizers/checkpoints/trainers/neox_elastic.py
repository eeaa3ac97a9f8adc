"""ZeRO-1 of DeepSpeed 0.3, by which the original Pythia was trained with GPT-NeoX: sub-partitions of flat buffers.

The shapes are in the optimizer's files. The buffer of a group is cut into equal sub-partitions, one per rank and
interval of communication, interval by interval. An elastic checkpoint has neither steps nor settings: the steps are
those of the model's file, and the betas are in the YAML of the run.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import RefusedError
from squisher_mergekit.optimizers.checkpoints.flat_buffers import cut
from squisher_mergekit.tensors.input_files import parse_yaml, read_text
from squisher_mergekit.tensors.lazy import Slices

MARK = "num_comm_intervals_per_group"
_MASTERS = "local_sub_partitions_of_fp32_groups"
_BETAS = re.compile(r"""["']?betas["']?\s*:\s*\[""")


def cut_stage_1(
    ranks: Sequence[Mapping[str, Any]], shapes: Mapping[str, torch.Size], model: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Any], dict[str, Slices]]:
    """Cut the buffers of all ranks: name -> state of a parameter, and name -> float32 weights.

    Args:
        ranks: The ``optimizer_state_dict`` of each rank.
        shapes: Name -> shape of all parameters, in the model's order.
        model: Content of the model's file.
        folder: The step's folder, in or above which the YAML of the run is.

    Raises:
        ValueError: The buffers do not hold these parameters.
    """
    masters = [_interleaved([rank[_MASTERS][group] for rank in ranks]) for group in range(len(ranks[0][_MASTERS]))]
    groups = _groups(shapes, [sum(flat.numel() for flat in flats) for flats in masters])
    state: dict[str, Any] = {}
    master: dict[str, Slices] = {}
    settings = []
    for number, (names, flats) in enumerate(zip(groups, masters, strict=True)):
        parts = [_sub_states(rank["base_optimizer_state"], number) for rank in ranks]
        subs = _interleaved(parts)
        fields = [key for key in ("exp_avg", "exp_avg_sq") if all(key in sub for sub in subs)]
        buffers = {key: [sub[key] for sub in subs] for key in fields}
        _check_rest(buffers["exp_avg_sq"], flats, sum(shapes[name].numel() for name in names))
        own = _own_settings(ranks[0]["base_optimizer_state"], number)
        step = next((sub["step"] for sub in subs if "step" in sub), _steps(model))
        offset = 0
        for name in names:
            span = (offset, shapes[name].numel())
            master[name] = Slices(tuple(cut(flats, *span)), shapes[name])
            state[name] = {key: Slices(tuple(cut(flat, *span)), shapes[name]) for key, flat in buffers.items()}
            state[name]["step"] = step
            offset += span[1]
        settings.append({"betas": _betas(model, folder), **own, "params": names})
    return {"state": state, "param_groups": settings}, master


def _interleaved(ranks: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the sub-partitions in the order of the buffer: interval by interval, and within one rank by rank."""
    if len({len(rank) for rank in ranks}) > 1:
        raise ValueError("the number of sub-partitions")
    return [rank[interval] for interval in range(len(ranks[0])) for rank in ranks]


def _sub_states(base: Any, group: int) -> list[Mapping[str, Any]]:
    """Return the states of a rank's sub-partitions, of an elastic or an ordinary ``base_optimizer_state``."""
    if isinstance(base, Mapping):
        return [base["state"][index] for index in base["param_groups"][group]["params"]]
    return list(base[group])


def _own_settings(base: Any, group: int) -> dict[str, Any]:
    if not isinstance(base, Mapping):
        return {}
    return {key: value for key, value in base["param_groups"][group].items() if key != "params"}


def _groups(shapes: Mapping[str, torch.Size], sizes: Sequence[int]) -> list[list[str]]:
    """Return the names of each group: with decay, then without (vectors), or all in one."""
    if len(sizes) == 1:
        return [list(shapes)]
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    vectors = [name for name, shape in shapes.items() if len(shape) <= 1]
    found = [matrices, vectors]
    counts = [sum(shapes[name].numel() for name in names) for names in found]
    if len(sizes) != 2 or any(size < count for size, count in zip(sizes, counts, strict=True)):
        raise ValueError(f"groups of {list(sizes)} entries for matrices and vectors of {counts}")
    return found


def _check_rest(seconds: Sequence[Tensor], masters: Sequence[Tensor], count: int) -> None:
    """Refuse buffers of another length than their parameters, except for padding, which is 0.

    Raises:
        ValueError: The length differs.
    """
    if [flat.numel() for flat in seconds] != [flat.numel() for flat in masters]:
        raise ValueError("the length of exp_avg_sq")
    rest = sum(flat.numel() for flat in seconds) - count
    widest = max(flat.numel() for flat in seconds)
    if rest < 0 or rest > widest:
        raise ValueError(f"buffers with {rest} entries more than their parameters")
    if rest and any(bool(flat[start : start + length].any()) for flat, start, length in cut(seconds, count, rest)):
        raise ValueError("padding that is not 0")


def _steps(model: Mapping[str, Any]) -> int | None:
    """Return the number of steps in which float16 did not overflow."""
    counts = [model.get("global_steps"), model.get("skipped_steps", 0)]
    return counts[0] - counts[1] if all(type(count) is int for count in counts) else None


def _betas(model: Mapping[str, Any], folder: Path) -> Any:
    """Return the betas of the run's settings, in the model's file or in a YAML file; None if there are none."""
    for settings in (model.get("args"), model.get("ds_config"), *_yaml_files(folder)):
        optimizer = settings.get("optimizer") if isinstance(settings, Mapping) else None
        params = optimizer.get("params") if isinstance(optimizer, Mapping) else None
        betas = params.get("betas") if isinstance(params, Mapping) else None
        if isinstance(betas, list | tuple) and len(betas) == 2:
            return tuple(betas)
    return None


def _yaml_files(folder: Path) -> Iterator[Any]:
    """Yield the content of the YAML files of a run that set betas; those that cannot be parsed are skipped."""
    for place in (folder / "configs", folder, folder.parent / "configs", folder.parent):
        for file in sorted([*place.glob("*.yml"), *place.glob("*.yaml")]):
            try:
                text = read_text(file)
                if _BETAS.search(text):
                    yield parse_yaml(text, str(file))
            except RefusedError:
                continue
