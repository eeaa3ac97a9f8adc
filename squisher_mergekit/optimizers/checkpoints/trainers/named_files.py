"""Files of ``torch.save`` under the names of other trainers: OLMo, torchtune, litgpt and nanoGPT.

Their content is that of any file of ``torch.save``. The table has where the trainer keeps the model's config.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from squisher_mergekit.optimizers.checkpoints import safe_pickle, torch_save
from squisher_mergekit.optimizers.checkpoints.raw_state import OwnNames, RawState
from squisher_mergekit.optimizers.checkpoints.zip_checksums import Checksums

_EPOCH = re.compile(r"epoch_(\d+)")


@dataclass(frozen=True)
class _Trainer:
    """Trainer that writes an optimizer's state under a name of its own.

    Attributes:
        layout: Name for the metadata.
        keys: Keys of which the file has all; empty if the name alone tells the trainer.
        family: Name of the trainer in the table of names; None where the names tell it.
        beside: Function from content and file to further folders with the config or the weights.
    """

    layout: str
    keys: frozenset[str] = frozenset()
    family: str | None = None
    beside: Callable[[Mapping[str, Any], Path], tuple[Path, ...]] = lambda loaded, file: ()


def _epoch(loaded: Mapping[str, Any], file: Path) -> tuple[Path, ...]:
    """Return the folder of the epoch after which torchtune saved its state."""
    run = file.parent.parent if file.parent.name == "recipe_state" else file.parent
    count = loaded.get("epochs_run")
    folder = run / f"epoch_{count - 1}" if type(count) is int else run
    return (folder,) if folder.is_dir() else ()


_TRAINERS = {
    "recipe_state.pt": _Trainer("torchtune", frozenset({"optimizer", "epochs_run"}), "torchtune", _epoch),
    "lit_model.pth": _Trainer("litgpt"),
    "optim.pt": _Trainer("olmo"),
    "ckpt.pt": _Trainer("nanogpt", frozenset({"optimizer", "model_args", "iter_num"}), "nanoGPT"),
}


def find(folder: Path) -> Path | None:
    """Return the file in a folder, in ``recipe_state`` in it, or, for torchtune's last epoch, beside it."""
    return next((path for path in _places(folder) if path.is_file()), None)


def _places(folder: Path) -> Iterator[Path]:
    yield from (folder / name for name in _TRAINERS)
    yield folder / "recipe_state" / "recipe_state.pt"
    number = _EPOCH.fullmatch(folder.name)
    later = folder.parent / f"epoch_{int(number[1]) + 1}" if number else folder
    if number and not later.exists():
        yield folder.parent / "recipe_state" / "recipe_state.pt"


NAME = re.compile("|".join(map(re.escape, _TRAINERS)))


def read(file: Path, verify: bool) -> RawState:
    """Read the file.

    Raises:
        RefusedError: The file cannot be read safely, or holds no optimizer's state.
    """
    checksums = Checksums(verify)
    loaded = safe_pickle.load(file, checksums)
    raw = torch_save.content(loaded, file, (), checksums.verify)
    trainer = _TRAINERS.get(file.name)
    if trainer is None or not isinstance(loaded, Mapping) or not trainer.keys <= loaded.keys():
        return raw
    own = OwnNames(trainer.family) if trainer.family is not None else None
    if own is not None and raw.states and _is_named(raw.states[0]) and trainer.layout == "torchtune":
        own = None  # the distributed recipes save names, by which the trainer is recognised
    return replace(raw, layout=trainer.layout, own=own, beside=trainer.beside(loaded, file))


def _is_named(state: Mapping[str, Any]) -> bool:
    return any(isinstance(index, str) for group in state["param_groups"] for index in group["params"])
