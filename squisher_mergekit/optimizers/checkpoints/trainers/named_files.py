"""Files of ``torch.save`` under the names of other trainers: OLMo, torchtune, litgpt and nanoGPT.

Their content is that of any file of ``torch.save``. The table has where the trainer keeps the model's config.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from squisher_mergekit.optimizers.checkpoints import safe_pickle, torch_save
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.checkpoints.zip_checksums import Checksums

_EPOCH = re.compile(r"epoch_(\d+)")


_LAYOUTS = {"recipe_state.pt": "torchtune", "lit_model.pth": "litgpt", "optim.pt": "olmo", "ckpt.pt": "nanogpt"}


def _epoch(loaded: Mapping[str, Any], file: Path) -> tuple[Path, ...]:
    """Return the folder of the epoch after which torchtune saved its state."""
    run = file.parent.parent if file.parent.name == "recipe_state" else file.parent
    count = loaded.get("epochs_run")
    folder = run / f"epoch_{count - 1}" if type(count) is int else run
    return (folder,) if folder.is_dir() else ()


def find(folder: Path) -> Path | None:
    """Return the file in a folder, in ``recipe_state`` in it, or, for torchtune's last epoch, beside it."""
    return next((path for path in _places(folder) if path.is_file()), None)


def _places(folder: Path) -> Iterator[Path]:
    yield from (folder / name for name in _LAYOUTS)
    yield folder / "recipe_state" / "recipe_state.pt"
    number = _EPOCH.fullmatch(folder.name)
    later = folder.parent / f"epoch_{int(number[1]) + 1}" if number else folder
    if number and not later.exists():
        yield folder.parent / "recipe_state" / "recipe_state.pt"


NAME = re.compile("|".join(map(re.escape, _LAYOUTS)))


def read(file: Path, verify: bool) -> RawState:
    """Read the file.

    Raises:
        RefusedError: The file cannot be read safely, or holds no optimizer's state.
    """
    checksums = Checksums(verify)
    loaded = safe_pickle.load(file, checksums)
    raw = torch_save.content(loaded, file, (), checksums.verify)
    beside = _epoch(loaded, file) if isinstance(loaded, Mapping) and "epochs_run" in loaded else ()
    return replace(raw, layout=_layout(raw, file), beside=beside)


def _layout(raw: RawState, file: Path) -> str | None:
    """Return the name of the layout; None for a name that others use as well, without a sign of the trainer."""
    if file.name == "ckpt.pt" and raw.own is None:
        return None
    if file.name == "optim.pt" and not any((file.parent / name).is_file() for name in ("config.yaml", "train.pt")):
        return None
    return _LAYOUTS.get(file.name)
