"""What a layout reads from a checkpoint, before anything in it has been given a meaning."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from squisher_mergekit.tensors.lazy import Slices, unverified


@dataclass(frozen=True)
class RawState:
    """The states of a checkpoint's optimizers, as ``state_dict`` gives them.

    ``place``: the file or folder, for messages; the checkpoint is its parent. ``states``: of each optimizer ``state``
    (number or name of a parameter -> key -> tensor, form of a tensor, or number) and ``param_groups``. ``model``: the
    one saved beside, name -> tensor. ``layout``: whose it is, None to go by the folder. ``known``: further facts for
    the metadata, by the keys of ``fisher_config.json``. ``verify``: holds the bytes of a mapped tensor against their
    checksum. ``masters``: of a trainer that cuts flat buffers, the float32 weights cut from theirs in the same way, to
    be held against the weights.
    """

    place: Path
    states: tuple[Mapping[str, Any], ...]
    model: Mapping[str, Tensor] | None = None
    layout: str | None = None
    known: Mapping[str, Any] = field(default_factory=dict)
    verify: Callable[[Tensor], None] = unverified
    masters: Mapping[str, Slices] = field(default_factory=dict)
