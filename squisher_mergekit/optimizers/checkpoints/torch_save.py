"""File of ``torch.save``: an optimizer's ``state_dict``, or a bundle of one or several, perhaps with a model.

Writers of this layout: the Hugging Face Trainer (``optimizer.pt``), accelerate (``optimizer.bin``, and
``optimizer_1.bin`` for a second optimizer; with FSDP and the full state dict the same file, keyed by names), Lightning
and Fabric (``*.ckpt``), and scripts that call ``torch.save``.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from squisher_mergekit.errors import NamingError, UnsupportedStateError
from squisher_mergekit.models.diffusers_names import model_folders
from squisher_mergekit.models.parameters import unwrapped
from squisher_mergekit.optimizers.checkpoints import safe_pickle
from squisher_mergekit.optimizers.checkpoints.raw_state import OwnNames, RawState
from squisher_mergekit.optimizers.checkpoints.zip_checksums import Checksums
from squisher_mergekit.tensors.lazy import unverified

LOG = logging.getLogger("squisher_mergekit")
NAMES = ("optimizer.pt", "optimizer.bin")
# Other files in a checkpoint, which hold no optimizer's state.
_OTHERS = re.compile(
    r"training_args|rng_state|random_states|scheduler|scaler|sampler|pytorch_model|adapter_model|custom_checkpoint|"
    r".*(?:model_states|optim_states)|optimizer_\d+(?:_rank\d+)?\.bin"
)
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")  # timm writes last.pth.tar
_LIGHTNING = "pytorch-lightning_version"
_ATTRIBUTE = "model."
_MODEL_KEYS = ("model", "model_state_dict", "state_dict", "module")


def find(folder: Path) -> Path | None:
    """Return the optimizer's file in a folder, by the names that trainers use.

    Raises:
        NamingError: Both names exist, and no Trainer wrote the folder.
    """
    found = [folder / name for name in NAMES if (folder / name).is_file()]
    if len(found) > 1:
        if not (folder / "trainer_state.json").is_file():
            raise NamingError(
                f"{folder} must hold the state of one optimizer, found {' and '.join(NAMES)}; give the file to read"
            )
        _warn_of_both(folder)
    return found[0] if found else None


@lru_cache(maxsize=256)
def _warn_of_both(folder: Path) -> None:
    """Warn, once per folder, of an optimizer's state under two names."""
    LOG.warning(
        "%s holds both %s; %s is read, as the Trainer does. Give the file to read another",
        folder,
        " and ".join(NAMES),
        NAMES[0],
    )


def others(folder: Path) -> list[Path]:
    """Return the files in a folder that may hold an optimizer's state under another name."""
    return sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES and not _OTHERS.match(file.name))


_LAST = re.compile(r"(?:last|latest)\b.*")
_STEP_OF_FILE = re.compile(r".*?(?:step|global_step|checkpoint|ckpt|ba|iter|epoch)[=_-]?(\d+)(?:-rank0)?(?:\.\w+)+")


def newest(files: Sequence[Path]) -> Path | None:
    """Return the newest of several files by their names: the last one, or that of the highest step; None if unclear.

    Args:
        files: Files of one folder.

    Example:
        >>> newest([Path("epoch=0-step=9.ckpt"), Path("epoch=1-step=10.ckpt")]).name, newest([Path("a"), Path("b")])
        ('epoch=1-step=10.ckpt', None)
    """
    last = [file for file in files if _LAST.fullmatch(file.name)]
    if last:
        return last[0] if len(last) == 1 else None
    steps = {file: match for file in files if (match := _STEP_OF_FILE.fullmatch(file.name))}
    numbers = {int(match[1]): file for file, match in steps.items()}
    return numbers[max(numbers)] if files and len(numbers) == len(files) else None


def read(file: Path, verify: bool) -> RawState:
    """Read an optimizer's file, and those of accelerate's further optimizers beside it.

    Raises:
        RefusedError: A file cannot be read safely, or the file holds no optimizer's state.
    """
    checksums = Checksums(verify)
    more = []
    if file.name == "optimizer.bin":
        paths = [path for path in file.parent.iterdir() if re.fullmatch(r"optimizer_\d+\.bin", path.name)]
        more = [
            safe_pickle.load(path, checksums) for path in sorted(paths, key=lambda path: (len(path.name), path.name))
        ]
    raw = content(safe_pickle.load(file, checksums), file, more, checksums.verify)
    has_config = (file.parent / "config.json").is_file()
    return raw if has_config or raw.model is not None else replace(raw, beside=tuple(model_folders(file.parent)))


def content(
    loaded: Any, file: Path, more: Sequence[Any] = (), verify: Callable[[Tensor], Tensor] = unverified
) -> RawState:
    """Find the optimizers' states and the model in loaded objects.

    Args:
        loaded: Content of the file.
        file: The file, for messages.
        more: Content of the files of further optimizers of the same model.
        verify: Function that returns a mapped tensor in memory, with its checksum verified.

    Raises:
        UnsupportedStateError: The objects hold no optimizer's state.
    """
    _refuse_part(loaded, file)
    states = [state for content in (loaded, *more) for state in states_in(content)]
    if not states:
        raise UnsupportedStateError(
            f"{file} must hold an optimizer's state_dict (state and param_groups), found none; "
            "save optimizer.state_dict() to a file of its own"
        )
    model = None if is_state(loaded) else find_model(loaded)
    layout = None
    if _is_composer(loaded):
        layout, states = "composer", [without_prefix(state) for state in states]
    if isinstance(loaded, Mapping) and (_LIGHTNING in loaded or _is_composer(loaded)):
        states = [without_prefix(state, _attribute(model)) for state in states] if layout is None else states
        layout, model = layout or "lightning", None if model is None else _without_attribute(model)
    return RawState(file, tuple(states), model, layout, verify=verify, own=_own_names(loaded, states))


# Keys of a file -> trainer, whose names or order are not those of Hugging Face although they look alike.
_KEYS_OF_TRAINERS = (
    (frozenset({"optimizer", "epochs_run"}), "torchtune"),
    (frozenset({"optimizer", "model_args", "iter_num"}), "nanoGPT"),
)


def _own_names(loaded: Any, states: Sequence[Mapping[str, Any]]) -> OwnNames | None:
    """Return the trainer that the keys of a file tell; None for others, and for torchtune's states with names."""
    keys = set(loaded) if isinstance(loaded, Mapping) else set()
    family = next((family for marks, family in _KEYS_OF_TRAINERS if marks <= keys), None)
    named = any(isinstance(index, str) for state in states for g in state["param_groups"] for index in g["params"])
    return None if family is None or named else OwnNames(family)


# Keys of DeepSpeed's ZeRO in the file of one rank, whose state is part of a flat buffer.
_ZERO_KEYS = {
    "zero_stage",
    "partition_count",
    "single_partition_of_fp32_groups",
    "fp32_flat_groups",
    "base_optimizer_state",
}


def _refuse_part(loaded: Any, file: Path) -> None:
    """Refuse one rank's part of a sharded state, given without the other ranks' files."""
    for value in (loaded, *_members(loaded)):
        if isinstance(value, Mapping) and value.keys() & _ZERO_KEYS:
            raise UnsupportedStateError(
                f"{file} must hold a whole optimizer's state, but is one rank's part of DeepSpeed's; give the folder "
                "with the files of all ranks, under the names that DeepSpeed gave them"
            )


def is_state(value: Any) -> bool:
    """Return True for the ``state_dict`` of an optimizer."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("state"), Mapping)
        and isinstance(value.get("param_groups"), list)
        and all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in value["param_groups"])
    )


def states_in(loaded: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the optimizers' states in a loaded object, within at most three containers (Composer's)."""
    level = [loaded]
    for _ in range(4):
        yield from (value for value in level if is_state(value))
        level = [inner for value in level if not is_state(value) for inner in _members(value)]


def _members(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else []


def _is_composer(loaded: Any) -> bool:
    """Return True for a file of Composer, which holds the model and the optimizers under ``state``."""
    inner = loaded.get("state") if isinstance(loaded, Mapping) else None
    return isinstance(inner, Mapping) and isinstance(inner.get("optimizers"), Mapping)


def without_prefix(state: Mapping[str, Any], prefix: str = _ATTRIBUTE) -> Mapping[str, Any]:
    """Strip the attribute in which a wrapper keeps a model, if all names have it.

    Args:
        state: An optimizer's ``state_dict``.
        prefix: The attribute, with a dot; the default is that of Composer.
    """
    names = [name for group in state["param_groups"] for name in group["params"]]
    if not prefix or not all(isinstance(name, str) and name.startswith(prefix) for name in names):
        return state
    groups = [{**g, "params": [n.removeprefix(prefix) for n in g["params"]]} for g in state["param_groups"]]
    entries = {str(name).removeprefix(prefix): entry for name, entry in state["state"].items()}
    return {**state, "state": entries, "param_groups": groups}


def find_model(loaded: Any) -> Mapping[str, Tensor] | None:
    """Return the model saved with the optimizer; None where there is none, or several that cannot be distinguished.

    A mapping of whole numbers alone, such as the states of random generators, is no model.
    """
    if not isinstance(loaded, Mapping):
        return None
    loaded = loaded["state"] if _is_composer(loaded) else loaded
    found = {
        key: value
        for key, value in loaded.items()
        if isinstance(value, Mapping)
        and all(isinstance(item, Tensor) for item in value.values())
        and any(item.is_floating_point() for item in value.values())
    }
    usual = [key for key in _MODEL_KEYS if key in found]
    if not usual and len(found) != 1:
        return None
    return {unwrapped(str(name)): tensor for name, tensor in found[usual[0] if usual else next(iter(found))].items()}


def _attribute(model: Mapping[str, Tensor] | None) -> str:
    """Return the attribute under which a LightningModule stores its model, with a dot; empty if it stores more."""
    attributes = {name.partition(".")[0] for name in model or ()}
    return f"{attributes.pop()}." if len(attributes) == 1 and all("." in name for name in model or ()) else ""


def _without_attribute(model: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Strip the attribute under which a LightningModule stores its model, if it stores nothing else."""
    attribute = _attribute(model)
    return {name.removeprefix(attribute): tensor for name, tensor in model.items()}
