"""Whose checkpoint a folder is: each layout's file knows its own; here they are asked in turn."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from squisher_mergekit.errors import NamingError, NotFoundError
from squisher_mergekit.optimizers import deepspeed, distributed, rank_files, torch_file, universal
from squisher_mergekit.optimizers.saved import Saved


@dataclass(frozen=True)
class Layout:
    """How one kind of checkpoint is recognised and read.

    ``find``: a folder -> the file or folder in it that holds the optimizer's state, None if there is none. ``read``:
    that file or folder -> its content; the flag asks for checksums to be verified.
    """

    name: str
    find: Callable[[Path], Path | None]
    read: Callable[[Path, bool], Saved]


LAYOUTS = (
    Layout("a file of torch.save", torch_file.find, torch_file.read),
    Layout("FSDP's files of each rank", rank_files.find, rank_files.read),
    Layout("a distributed checkpoint", distributed.find, distributed.read),
    Layout("DeepSpeed's", deepspeed.find, deepspeed.read),
    Layout("DeepSpeed's universal", universal.find, universal.read),
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


def of(path: Path) -> tuple[Layout, Path]:
    """Return the layout of a file or of a folder that itself is an optimizer's state."""
    if path.is_file():
        for layout in LAYOUTS[1:]:
            place = layout.find(path.parent)
            if place is not None and place in (path, path.parent):
                return layout, place
        return LAYOUTS[0], path
    found = find(path)
    if found is None:
        raise NotFoundError(f"no optimizer state in {path}")
    return found
