"""Universal checkpoints of Megatron-DeepSpeed without ``optimizer_state.pt``, as BLOOM's: merged over all ranks.

``zero/NAME/exp_avg_sq.pt`` is whole, also where the model was split. The settings are in the arguments that the model's
files hold, and the steps are the iteration.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from squisher_mergekit.errors import CorruptFileError
from squisher_mergekit.optimizers.checkpoints import safe_pickle
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.checkpoints.zip_checksums import Checksums

_FIELDS = ("exp_avg_sq", "exp_avg")


def is_merged(folder: Path) -> bool:
    """Return True if a folder has a whole second moment of some parameter, without settings."""
    zero = folder / "zero"
    return zero.is_dir() and any((path / "exp_avg_sq.pt").is_file() for path in zero.iterdir())


def read_merged(folder: Path, verify: bool) -> RawState:
    """Read the files of each parameter.

    Raises:
        CorruptFileError: A file holds no tensor.
        RefusedError: A file cannot be read safely.
    """
    checksums = Checksums(verify)
    betas, steps = _settings(folder)
    state: dict[str, dict[str, Any]] = {}
    for place in sorted(path for path in (folder / "zero").iterdir() if (path / "exp_avg_sq.pt").is_file()):
        files = {key: place / f"{key}.pt" for key in _FIELDS if (place / f"{key}.pt").is_file()}
        state[place.name] = {key: _tensor(file, checksums) for key, file in files.items()} | {"step": steps}
    groups = [{"betas": betas, "params": list(state)}]
    return RawState(
        folder, ({"state": state, "param_groups": groups},), layout="deepspeed-universal", verify=checksums.verify
    )


def _tensor(file: Path, checksums: Checksums) -> Tensor:
    loaded = safe_pickle.load(file, checksums)
    tensor = loaded.get("param") if isinstance(loaded, Mapping) else loaded
    if not isinstance(tensor, Tensor):
        raise CorruptFileError(f"{file} must hold a tensor under param; convert the checkpoint again")
    return tensor


def _settings(folder: Path) -> tuple[tuple[float, float] | None, int | None]:
    """Return betas and steps by the file of the model's first rank; None for what it does not tell."""
    file = next(iter(sorted(folder.glob("*mp_rank_*_model_states.pt"))), None)
    model = safe_pickle.load(file) if file is not None else {}
    model = model if isinstance(model, Mapping) else {}
    args = model.get("args")
    decays = (getattr(args, "adam_beta1", None), getattr(args, "adam_beta2", None))
    betas = (decays[0], decays[1]) if isinstance(decays[0], float) and isinstance(decays[1], float) else None
    counts = [model.get("iteration"), model.get("global_steps")]
    steps = next((count for count in counts if type(count) is int and count > 0), None)
    skipped = model.get("skipped_steps", 0)
    return betas, steps - skipped if steps is not None and type(skipped) is int else steps
