"""Registry of the layouts: finds the layout of a checkpoint, which then reads it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from squisher_mergekit.errors import NamingError
from squisher_mergekit.optimizers.checkpoints import dcp, deepspeed, deepspeed_universal, fsdp_ranks, torch_save
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.checkpoints.trainers import named_files, nanotron, olmo_safetensors, rank_files
from squisher_mergekit.tensors.input_files import reading


@dataclass(frozen=True)
class Layout:
    """On-disk layout of optimizer states.

    Attributes:
        name: Name for messages.
        find: Function from a checkpoint's folder to the file or folder of the state in it; None if there is none.
        read: Function that reads this file or folder; its flag asks for checksums to be verified.
        files: Pattern of the names of the layout's files.
    """

    name: str
    find: Callable[[Path], Path | None]
    read: Callable[[Path, bool], RawState]
    files: re.Pattern[str]

    def load(self, location: Path, verify: bool) -> RawState:
        """Read the state; an error of another library becomes one of this package.

        Raises:
            RefusedError: The state cannot be read safely, or is damaged.
        """
        with reading(location, "a whole optimizer state"):
            return self.read(location, verify)


_LAST = Layout("a file of torch.save", torch_save.find, torch_save.read, re.compile(".*"))
LAYOUTS = (
    Layout("FSDP's files of each rank", fsdp_ranks.find, fsdp_ranks.read, fsdp_ranks.NAME),
    Layout("a distributed checkpoint", dcp.find, dcp.read, re.compile(r"\.metadata|.*\.distcp")),
    Layout("DeepSpeed's", deepspeed.find, deepspeed.read, re.compile(r".*_(?:optim|model)_states\.pt")),
    Layout("DeepSpeed's universal", deepspeed_universal.find, deepspeed_universal.read, re.compile("latest_universal")),
    Layout("the optimizer's file of each rank", rank_files.find, rank_files.read, rank_files.NAME),
    Layout("nanotron's", nanotron.find, nanotron.read, nanotron.NAME),
    Layout("OLMo's", olmo_safetensors.find, olmo_safetensors.read, re.compile(re.escape(olmo_safetensors.FILE))),
    Layout("the file of another trainer", named_files.find, named_files.read, named_files.NAME),
    _LAST,
)


def find(folder: Path) -> tuple[Layout, Path] | None:
    """Return the layout of a checkpoint and the file or folder of its state; None if there is no state.

    Raises:
        NamingError: The folder holds states in two layouts.
    """
    found = [(layout, location) for layout in LAYOUTS if (location := layout.find(folder)) is not None]
    # DeepSpeed's converter leaves the original checkpoint beside the universal one.
    if len(found) == 2 and [layout.name for layout, _ in found] == ["DeepSpeed's", "DeepSpeed's universal"]:
        found.pop()
    if len(found) > 1:
        listed = " and ".join(f"{location.name} ({layout.name})" for layout, location in found)
        raise NamingError(f"{folder} must hold the state of one optimizer, found {listed}; give the one to read")
    return found[0] if found else None


def claims(file: Path) -> bool:
    """Return True if a layout other than that of ``torch.save`` has files of this name."""
    return of(file)[0] is not _LAST


def of(file: Path) -> tuple[Layout, Path]:
    """Return the layout of a file, and the file or folder to read where the file is one of several."""
    for layout in LAYOUTS:
        location = layout.find(file.parent) if layout is not _LAST and layout.files.fullmatch(file.name) else None
        if location is not None:
            return layout, location
    return _LAST, file
