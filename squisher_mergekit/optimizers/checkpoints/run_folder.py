"""Folders of a training run: the checkpoints by their step, and where a checkpoint's weights and config are."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from squisher_mergekit.errors import CorruptFileError, MismatchError
from squisher_mergekit.models.adapters import ADAPTER_CONFIG
from squisher_mergekit.models.weights import Weights

# checkpoint-500, step-500, global_step500, epoch_3, step500-unsharded, ep1-ba500
STEP = re.compile(
    r"(?:[\w.-]*[_-])?(?:checkpoint|step|global_?step|epoch|iter|ckpt|ba)[_-]?(\d+)(?:[_-](?:universal|unsharded))?"
)


@dataclass(frozen=True)
class Folders:
    """Folders that the names and the metadata of a Fisher come from.

    Attributes:
        location: File or folder of the optimizer's state.
        beside: Weights in the folder of the state, perhaps none.
        config: Folder of the ``config.json`` that records the version of transformers.
        weights: The trained weights, perhaps none.
        given: The model that the user names; None if the user names none.
        base: The model before training; None if the user names none.
        adapter: Folder of the adapter's config; None for a full model.
    """

    location: Path
    beside: Weights
    config: Weights
    weights: Weights
    given: Weights | None
    base: Weights | None
    adapter: Path | None


def find_folders(location: Path, model: Weights | None, base: Weights | None, beside: Sequence[Path] = ()) -> Folders:
    """Find the weights, the config and the adapter of an optimizer's state.

    Weights in the folder of the state come before those of ``model``: the optimizer trained them.

    Args:
        location: File or folder of the state.
        model: The model that the user names, or a folder with its config alone.
        base: The model before training.
        beside: Further folders in which the trainer keeps the weights or their config.

    Raises:
        MismatchError: The state is a LoRA's, and ``model`` holds full weights.
    """
    # The folder of a sharded state is inside the checkpoint, or is the checkpoint.
    own = [*beside, location.parent, *([location] if location.is_dir() else [])]
    folders = [*([] if model is None else [model.folder]), *own]
    adapter = next((folder for folder in folders if (folder / ADAPTER_CONFIG).is_file()), None)
    if model is not None and adapter not in (None, model.folder) and model.infos:
        raise MismatchError(
            f"{model.folder} holds full weights, but {location} is the state of a LoRA; in a merge, write model: "
            "BASE+ADAPTER, or extract a Fisher of the merged weights by --base BASE --lift"
        )
    basename = "model" if adapter is None else "adapter_model"
    known = {w.folder.absolute(): w for w in (base, model) if w is not None and w.basename == basename}

    def weights_in(folder: Path) -> Weights:
        return known.setdefault(folder.absolute(), Weights(folder, basename))

    described = next((folder for folder in folders if (folder / "config.json").is_file()), location.parent)
    return Folders(
        location,
        weights_in(location.parent),
        weights_in(adapter or described),
        next((w for w in map(weights_in, reversed(folders)) if w.infos), weights_in(location.parent)),
        None if model is None else weights_in(model.folder),
        base,
        adapter,
    )


def tagged(folder: Path, file: str) -> Path | None:
    """Return the folder that a tag file such as ``latest`` names; None if it names no folder beside it."""
    path = folder / file
    if not path.is_file() or path.stat().st_size > 255:
        return None
    tag = path.read_text(encoding="utf-8", errors="replace").strip()
    return folder / tag if Path(tag).name == tag and (folder / tag).is_dir() else None


def steps_in(run: Path) -> dict[int, Path]:
    """Return step -> folder of the checkpoints in a run's folder, the last first."""
    steps: dict[int, Path] = {}
    numbered = (run / "latest.txt").is_file()  # nanotron's run, with a folder N for each step
    for path in sorted(run.iterdir()):
        match = STEP.fullmatch(path.name) or (re.fullmatch(r"(\d+)", path.name) if numbered else None)
        if match and path.is_dir():
            steps.setdefault(int(match[1]), path)
    return dict(sorted(steps.items(), reverse=True))


def previous_weights(folder: Path) -> Weights | None:
    """Return the weights of the run's checkpoint before this one; None if there are none."""
    steps = steps_in(folder.parent) if STEP.fullmatch(folder.name) else {}
    number = next((step for step, path in steps.items() if path == folder), None)
    before = [path for step, path in steps.items() if number is not None and step < number]
    try:
        return next((weights for weights in map(Weights, before) if weights.infos), None)
    except CorruptFileError:  # damage in another checkpoint does not concern this one
        return None
