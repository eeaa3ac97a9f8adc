"""Whose checkpoint a folder is: each layout's file knows its own; here they are asked in turn."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from squisher_mergekit.errors import NamingError
from squisher_mergekit.optimizers.checkpoints import dcp, deepspeed, deepspeed_universal, fsdp_ranks, torch_save
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState


@dataclass(frozen=True)
class Layout:
    """How one kind of checkpoint is recognised and read.

    ``find``: a folder -> the file or folder in it that holds the optimizer's state, None if there is none. ``read``:
    that file or folder -> its content; the flag asks for checksums to be verified. ``files``: names of its files.
    """

    name: str
    find: Callable[[Path], Path | None]
    read: Callable[[Path, bool], RawState]
    files: re.Pattern[str]


_LAST = Layout("a file of torch.save", torch_save.find, torch_save.read, re.compile(".*"))
LAYOUTS = (
    Layout("FSDP's files of each rank", fsdp_ranks.find, fsdp_ranks.read, fsdp_ranks.NAME),
    Layout("a distributed checkpoint", dcp.find, dcp.read, re.compile(r"\.metadata|.*\.distcp")),
    Layout("DeepSpeed's", deepspeed.find, deepspeed.read, re.compile(r".*_(?:optim|model)_states\.pt")),
    Layout("DeepSpeed's universal", deepspeed_universal.find, deepspeed_universal.read, re.compile("latest_universal")),
    _LAST,
)


def find(folder: Path) -> tuple[Layout, Path] | None:
    """Return the layout of a checkpoint and its optimizer's file or folder; None if there is none.

    Raises:
        NamingError: There are two, and no telling which one is meant.
    """
    found = [(layout, place) for layout in LAYOUTS if (place := layout.find(folder)) is not None]
    # A universal checkpoint is made from the other, which lies beside it still.
    if len(found) == 2 and [layout.name for layout, _ in found] == ["DeepSpeed's", "DeepSpeed's universal"]:
        found.pop()
    if len(found) > 1:
        listed = " and ".join(f"{place.name} ({layout.name})" for layout, place in found)
        raise NamingError(f"{folder} must hold the state of one optimizer, found {listed}; give the one to read")
    return found[0] if found else None


def of(file: Path) -> tuple[Layout, Path]:
    """Return the layout of a file, and the file or folder to be read, if it is one of several."""
    for layout in LAYOUTS:
        place = layout.find(file.parent) if layout is not _LAST and layout.files.fullmatch(file.name) else None
        if place is not None:
            return layout, place
    return _LAST, file
