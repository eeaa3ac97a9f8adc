"""Optimizer states as a layout stores them, not yet interpreted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from squisher_mergekit.tensors.lazy import MaybeLazy, Slices, unverified


@dataclass(frozen=True)
class OwnNames:
    """Facts about the names in a state that its trainer's own files tell.

    Attributes:
        family: Name of the trainer in the table of names; None where the names themselves tell it.
        reordered_norm: True if norms follow attention and MLP, False if they precede them; None if unknown.
    """

    family: str | None = None
    reordered_norm: bool | None = None


@dataclass(frozen=True)
class RawState:
    """States of a checkpoint's optimizers, in the form of ``state_dict``.

    Attributes:
        location: File or folder of the state; its parent is the checkpoint.
        states: One mapping per optimizer: ``state`` (number or name of a parameter -> key -> tensor, lazy tensor or
            number) and ``param_groups``.
        model: Model saved with the state: name -> tensor; None if there is none.
        layout: Name of the layout for the metadata; None where the folder tells it.
        known: Further metadata, by the keys of ``fisher_config.json``.
        verify: Function that returns a mapped tensor in memory, with its checksum verified.
        masters: Float32 weights cut from the trainer's flat buffers: the cuts are verified against the weights.
        own: Facts about the trainer's names; None if the names are those of a Hugging Face model, or tell the trainer.
        beside: Further folders in which the trainer keeps the weights or their config, the first one first.
        fused: Own weights of fused queries, keys and values, by which the order of their rows is told.
        tensor_ranks: Number of ranks of tensor parallelism, each of which fuses its own rows.
        ranks: Number of ranks over which parameters were flattened by FSDP1, so that shapes are lost; 0 otherwise.
    """

    location: Path
    states: tuple[Mapping[str, Any], ...]
    model: Mapping[str, Tensor] | None = None
    layout: str | None = None
    known: Mapping[str, Any] = field(default_factory=dict)
    verify: Callable[[Tensor], Tensor] = unverified
    masters: Mapping[str, Slices] = field(default_factory=dict)
    own: OwnNames | None = None
    beside: tuple[Path, ...] = ()
    fused: Mapping[str, MaybeLazy] = field(default_factory=dict)
    tensor_ranks: int = 1
    ranks: int = 0
