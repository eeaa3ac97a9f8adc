"""Parts of nanotron's tensor parallelism, joined by the headers of the weights' files.

``model/**/model_weight_pp-rank-P-of-PP_tp-rank-T-of-TT.safetensors`` tells the regions of the whole tensor that the
part of one rank has: ``local_global_slices_pairs`` and ``unsharded_shape``. A parameter without ranks in its file's
name, such as a norm, is whole on each rank.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from squisher_mergekit.errors import CorruptFileError, NotFoundError
from squisher_mergekit.tensors.lazy import Assembled, MaybeLazy, Region
from squisher_mergekit.tensors.safetensors import SafetensorsHeader, read_header

_RANKS = re.compile(r".*_tp-rank-(\d+)-of-(\d+).*\.safetensors")
_NUMBER = re.compile(r"\d+")
_NUMPY_NUMBER = re.compile(r"np\.\w+\((\d+)\)")  # NumPy 2 writes the sizes of a shape as np.int64(64)


def weight_headers(checkpoint: Path, name: str) -> dict[int | None, SafetensorsHeader]:
    """Return rank of tensor parallelism -> header of the file of a weight; the rank of a whole weight is None.

    Args:
        checkpoint: The step's folder.
        name: Name of the parameter.
    """
    module, _, kind = name.rpartition(".")
    folder = checkpoint.joinpath("model", *module.split("."))
    headers: dict[int | None, SafetensorsHeader] = {}
    for file in sorted(folder.glob(f"model_{kind}*.safetensors")):
        ranks = _RANKS.fullmatch(file.name)
        headers.setdefault(int(ranks[1]) if ranks else None, read_header(file))
    return headers


def joined_parts(name: str, states: Mapping[int, Mapping[str, Any]], checkpoint: Path) -> dict[str, Any]:
    """Join the states of a parameter on the ranks of tensor parallelism.

    Args:
        name: Name of the parameter.
        states: Rank -> state.
        checkpoint: The step's folder.

    Raises:
        NotFoundError: No file tells how the parameter was split.
        CorruptFileError: The parts do not make up the parameter.
    """
    headers = weight_headers(checkpoint, name)
    if not headers:
        raise NotFoundError(
            f"{checkpoint} must hold the file of {name} in model/, whose header tells how tensor parallelism splits "
            "it, but has none; copy model/ as well"
        )
    first = states[min(states)]
    if None in headers:
        return dict(first)
    split = {rank: header for rank, header in headers.items() if rank is not None}
    missing = sorted(set(split) - set(states))
    if missing:
        raise CorruptFileError(
            f"the state of {name} in {checkpoint} must have a part of each rank of tensor parallelism, but that of "
            f"rank {missing[0]} is missing; copy the files again"
        )
    regions = {rank: _regions(header, checkpoint) for rank, header in split.items()}
    return {key: _assembled(name, key, states, regions, checkpoint) for key in first}


Regions = tuple[torch.Size, tuple[tuple[Region, Region], ...]]  # shape of the whole, and regions of part and whole


def _regions(header: SafetensorsHeader, checkpoint: Path) -> Regions:
    """Return the regions of a part, by the header of its file.

    Raises:
        CorruptFileError: The header does not tell them.
    """
    try:
        texts, sizes = header.metadata["local_global_slices_pairs"], header.metadata["unsharded_shape"]
        shape = torch.Size(int(size) for size in _NUMBER.findall(_NUMPY_NUMBER.sub(r"\1", sizes)))
        local = torch.Size(header.infos["data"].shape)
        pairs = [text.split("#") for text in texts.split(";")]
        return shape, tuple((_region(part, local), _region(whole, shape)) for part, whole in pairs)
    except (KeyError, ValueError) as error:
        raise CorruptFileError(
            f"{header.file} must tell the regions of its part of a tensor (local_global_slices_pairs, "
            f"unsharded_shape), but {error!r:.100}; copy model/ in {checkpoint} again"
        ) from None


def _region(text: str, shape: torch.Size) -> Region:
    """Return the region that a text such as ``0,10,None|None,None,None`` describes in a tensor.

    Raises:
        ValueError: The region has other axes, is outside of the tensor, or has steps.
    """
    ranges = []
    for axis, size in zip(text.split("|"), shape, strict=True):
        start, stop, step = (None if number == "None" else int(number) for number in axis.split(","))
        begin, end = start or 0, size if stop is None else stop
        if step not in (None, 1) or not 0 <= begin <= end <= size:
            raise ValueError(f"{text} in shape {list(shape)}")
        ranges.append((begin, end))
    return tuple(ranges)


def _assembled(
    name: str, key: str, states: Mapping[int, Mapping[str, Any]], regions: Mapping[int, Regions], checkpoint: Path
) -> Any:
    value = states[min(states)][key]
    if not hasattr(value, "shape") or not len(value.shape):
        return value
    shape = regions[min(regions)][0]
    parts: list[MaybeLazy] = []
    pairs: list[tuple[Region, Region]] = []
    try:
        for rank in sorted(regions):
            parts += [states[rank][key]] * len(regions[rank][1])
            pairs += regions[rank][1]
        if any(whole != shape for whole, _ in regions.values()):
            raise ValueError("whole tensors of several shapes")
        return Assembled.checked(tuple(parts), tuple(pairs), shape)
    except (KeyError, ValueError) as error:
        raise CorruptFileError(
            f"the parts of {name} must make up its {list(shape)} entries, by the headers in {checkpoint / 'model'}, "
            f"but {error!s:.100}; copy the files of all ranks again"
        ) from None
