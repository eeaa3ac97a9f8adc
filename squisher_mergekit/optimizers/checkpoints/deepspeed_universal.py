"""DeepSpeed's universal checkpoints: a folder for each parameter, ``zero/NAME/exp_avg_sq.pt``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from squisher_mergekit.errors import CorruptFileError, NotFoundError
from squisher_mergekit.optimizers.checkpoints import safe_pickle
from squisher_mergekit.optimizers.checkpoints.deepspeed import (
    known_of,
    model_files,
    module_of,
    named_groups,
    positive,
    shapes_of,
)
from squisher_mergekit.optimizers.checkpoints.flat_buffers import verify_masters
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.checkpoints.run_folder import tagged
from squisher_mergekit.optimizers.checkpoints.trainers.merged_universal import is_merged, read_merged
from squisher_mergekit.optimizers.checkpoints.zip_checksums import Checksums
from squisher_mergekit.tensors.lazy import Slices

_SETTINGS = "optimizer_state.pt"
_MASTER = "fp32"


def find(folder: Path) -> Path | None:
    """Return the folder with ``zero``: this folder, the one that ``latest_universal`` names, or the last one in it."""
    if _is_universal(folder):
        return folder
    latest = tagged(folder, "latest_universal")
    if latest is not None and _is_universal(latest):
        return latest
    found = sorted((path for path in folder.glob("*_universal") if _is_universal(path)), key=lambda p: (len(p.name), p))
    return found[-1] if found else None


def read(folder: Path, verify: bool) -> RawState:
    """Read the files of each parameter.

    Raises:
        MismatchError: The float32 weights saved with a second moment are not those of the model.
        RefusedError: A file cannot be read safely, or is missing.
    """
    if not (folder / "zero" / _SETTINGS).is_file():
        return read_merged(folder, verify)
    checksums = Checksums(verify)
    model_file = model_files(folder)[0]
    model = safe_pickle.load(model_file, checksums)
    loaded = safe_pickle.load(folder / "zero" / _SETTINGS, checksums)
    if not isinstance(model, Mapping) or not isinstance(loaded, Mapping):
        raise CorruptFileError(f"{model_file.name} and {_SETTINGS} in {folder} must hold mappings; copy them again")
    module, groups = module_of(model) or {}, shapes_of(model, folder)
    settings = loaded.get("param_groups")
    if not isinstance(settings, list) or not all(isinstance(group, Mapping) for group in settings):
        raise CorruptFileError(f"{_SETTINGS} in {folder} must have the settings of the optimizer; convert it again")
    state: dict[str, Any] = {}
    masters: dict[str, Slices] = {}
    for name, shape in (item for group in groups for item in group.items()):
        state[name] = _entries(folder / "zero" / name, checksums, folder)
        master = state[name].pop(_MASTER, None)
        if state[name]:
            state[name].setdefault("step", _steps(model))
        for key, value in state[name].items():
            if isinstance(value, Tensor) and value.ndim == 1 and value.numel() == shape.numel():
                state[name][key] = value.reshape(shape)  # flat in checkpoints converted from stage 3
        if any(isinstance(value, Tensor) and value.ndim and value.shape != shape for value in state[name].values()):
            raise CorruptFileError(
                f"the tensors of {name} in {folder} must have the shape {list(shape)}; convert it again"
            )
        if isinstance(master, Tensor) and master.numel() == shape.numel():
            masters[name] = Slices(((master.reshape(-1), 0, master.numel()),), shape)
    if module:
        verify_masters(masters, module, folder)
    known = known_of(model) | {"max_grad_norm": positive(loaded.get("clip_grad"))}
    return RawState(
        folder,
        ({"state": state, "param_groups": named_groups(settings, groups)},),
        module or None,
        "deepspeed-universal",
        known,
        checksums.verify,
        masters,
    )


def _steps(model: Mapping[str, Any]) -> int | None:
    """Return the number of optimizer steps, as parameters of stage 3 have no count of their own."""
    counts = [model.get("global_steps"), model.get("skipped_steps", 0)]
    return counts[0] - counts[1] if all(isinstance(count, int) for count in counts) else None


def _is_universal(folder: Path) -> bool:
    return (folder / "zero" / _SETTINGS).is_file() or is_merged(folder)


def _entries(folder: Path, checksums: Checksums, checkpoint: Path) -> dict[str, Any]:
    """Return key -> tensor of one parameter; empty if it was never stepped."""
    if folder.parent != checkpoint / "zero" or not folder.is_dir():
        raise NotFoundError(
            f"{checkpoint / 'zero'} must have a folder for each parameter, but {folder.name} is missing"
        )
    entries: dict[str, Any] = {}
    for file in sorted(folder.glob("*.pt")):
        loaded = safe_pickle.load(file, checksums)
        entries[file.stem] = loaded.get("param") if isinstance(loaded, Mapping) else loaded
    return entries
