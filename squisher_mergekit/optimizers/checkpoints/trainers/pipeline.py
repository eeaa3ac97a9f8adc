"""Weights of DeepSpeed's pipelines, one file for each layer, and the joining of parts of tensor parallelism.

GPT-NeoX and Megatron-DeepSpeed write ``layer_02-model_00-model_states.pt`` even where the model was not split. With
tensor parallelism each rank of the model has its own buffers, which hold its parts of the parameters.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from squisher_mergekit.errors import CorruptFileError, UnsupportedStateError
from squisher_mergekit.optimizers.checkpoints import safe_pickle
from squisher_mergekit.optimizers.checkpoints.zip_checksums import Checksums
from squisher_mergekit.tensors.lazy import MaybeLazy, Slices, concatenated

_TIED, _FUSED = "tied_modules.", "attention.query_key_value.weight"
LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_ACROSS_ROWS = re.compile(
    r".*\b(?:query_key_value|dense_h_to_4h|linear1|w1|w3)\.(?:weight|bias)|.*\b(?:word_embeddings|final_linear)\.weight"
)
_ACROSS_COLUMNS = re.compile(
    r".*\b(?:attention|self_attention)\.dense\.weight|.*\b(?:dense_4h_to_h|linear2|w2)\.weight"
)
# A bias that is added after the sum over the ranks has the gradient of the sum on every rank, as a norm has.
_WHOLE = re.compile(
    r".*\b(?:input_layernorm|post_attention_layernorm|norm)\.(?:weight|bias|scale)|\d+\.(?:weight|bias)|"
    r".*\b(?:dense|dense_4h_to_h|linear2)\.bias"
)


def layer_weights(folder: Path, model_rank: int, checksums: Checksums) -> dict[str, Tensor]:
    """Return the weights in the files of the layers, named as in the buffers; empty if there are no such files.

    Args:
        folder: The step's folder.
        model_rank: Rank of the model: those of tensor parallelism, stage by stage of the pipeline.
        checksums: Verifier of the files.

    Raises:
        CorruptFileError: A file holds no mapping of tensors.
    """
    model_rank %= tensor_ranks(folder) or 1
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.iterdir()):
        match = LAYER.fullmatch(file.name)
        if match is None or int(match[2] or 0) != model_rank:
            continue
        loaded = safe_pickle.load(file, checksums)
        if not isinstance(loaded, Mapping):
            raise CorruptFileError(f"{file} must hold the weights of a layer; copy it again")
        tensors = {name: tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}
        weights |= {f"{int(match[1])}.{name}": tensor for name, tensor in tensors.items()}
        if int(match[1]) == 0:
            weights |= {f"{_TIED}embed.{name}": tensor for name, tensor in tensors.items()}
    return weights


def tensor_ranks(folder: Path) -> int:
    """Return the number of ranks of tensor parallelism by the files of the layers; 0 without such files."""
    matches = (LAYER.fullmatch(path.name) for path in folder.iterdir())
    return max((int(match[2] or 0) + 1 for match in matches if match), default=0)


def fused_weights(masters: Mapping[str, Slices]) -> dict[str, MaybeLazy]:
    """Return the float32 weights of fused queries, keys and values."""
    return {name: master for name, master in masters.items() if name.endswith(_FUSED)}


def joined_fused(ranks: Sequence[Mapping[str, MaybeLazy]], folder: Path) -> tuple[dict[str, MaybeLazy], int]:
    """Join the fused weights of all ranks of the model; return them, and the number of ranks that share one.

    Args:
        ranks: Name -> float32 weight on each rank.
        folder: The step's folder, for messages.
    """
    whole = joined([{name: {"weight": weight} for name, weight in rank.items()} for rank in ranks], folder)
    counts = [sum(name in rank for rank in ranks) for name in whole]
    return {name: entry["weight"] for name, entry in whole.items()}, max(counts, default=1)


def joined(ranks: Sequence[Mapping[str, Mapping[str, Any]]], folder: Path) -> dict[str, dict[str, Any]]:
    """Join the states of all ranks of the model: name -> key -> tensor.

    A parameter that one rank alone has is of a stage of a pipeline; tied embeddings are in the first and the last.

    Args:
        ranks: The state of each rank.
        folder: The step's folder, for messages.

    Raises:
        UnsupportedStateError: It is not known how a parameter was split.
        CorruptFileError: The parts do not fit each other.
    """
    state: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        entries = [rank[name] for rank in ranks if name in rank]
        if name.startswith(_TIED):  # the last stage of a pipeline has a copy
            entries = entries[: tensor_ranks(folder) or len(entries)]
        if len(entries) == 1:
            state[name] = dict(entries[0])
        else:
            state[name] = {key: _join([entry[key] for entry in entries], name, folder) for key in entries[0]}
    return state


def _join(values: Sequence[Any], name: str, folder: Path) -> Any:
    first = values[0]
    if not hasattr(first, "shape") or not len(first.shape):
        return first
    tensors: list[MaybeLazy] = list(values)
    if _WHOLE.fullmatch(name):
        if len({tuple(tensor.shape) for tensor in tensors}) > 1:
            raise CorruptFileError(f"{name} in {folder} must have one shape on all ranks; copy the files again")
        return first
    axis = 0 if _ACROSS_ROWS.fullmatch(name) else 1 if _ACROSS_COLUMNS.fullmatch(name) else None
    if axis is None:
        raise UnsupportedStateError(
            f"{name} in {folder} is split over {len(values)} ranks of tensor parallelism in a way that is not known; "
            "convert the checkpoint to one rank, or estimate a Fisher from data"
        )
    return concatenated(tensors, axis)
