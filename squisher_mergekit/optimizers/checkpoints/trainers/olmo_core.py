"""OLMo-core's checkpoint: a distributed checkpoint in ``stepN/model_and_optim``, beside the config of the experiment.

``SkipStepAdamW`` of versions 1.8 to 2.1 never counted its steps, so that trained second moments have step 0. The steps
are then those of ``train/rank0.pt`` or of the folder's name.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from squisher_mergekit.errors import RefusedError
from squisher_mergekit.optimizers.checkpoints import safe_pickle
from squisher_mergekit.optimizers.checkpoints.raw_state import OwnNames, RawState
from squisher_mergekit.tensors.input_files import read_mapping

LOG = logging.getLogger("squisher_mergekit")
FOLDER = "model_and_optim"
_STEP = re.compile(r"step(\d+)")


def adapted(raw: RawState) -> RawState:
    """Return a distributed checkpoint with the steps and the place of the norms that OLMo-core's other files tell."""
    checkpoint = raw.location.parent
    entries = [entry for state in raw.states for entry in state["state"].values()]
    states = raw.states
    if entries and not any(float(entry.get("step", 1)) for entry in entries):
        steps = _recorded_steps(checkpoint)
        LOG.warning(
            "%s: its optimizer did not count its steps; taking %s",
            raw.location,
            f"step {steps}, that of {checkpoint.name}" if steps else "their number as unknown (give --steps)",
        )
        states = tuple(_with_steps(state, steps) for state in raw.states)
    return replace(raw, states=states, layout="olmo-core", own=OwnNames(reordered_norm=_reordered(checkpoint)))


def _with_steps(state: Mapping[str, Any], steps: int | None) -> Mapping[str, Any]:
    return {**state, "state": {name: {**entry, "step": steps} for name, entry in state["state"].items()}}


def _recorded_steps(checkpoint: Path) -> int | None:
    """Return the step of ``train/rank0.pt``, else that of the folder's name; None if neither tells it."""
    file = checkpoint / "train" / "rank0.pt"
    try:
        loaded = safe_pickle.load(file) if file.is_file() else {}
    except RefusedError:
        loaded = {}
    steps = loaded.get("global_step") if isinstance(loaded, Mapping) else None
    named = _STEP.fullmatch(checkpoint.name)
    found = steps if type(steps) is int else int(named[1]) if named else None
    return found if found and found > 0 else None


def _reordered(checkpoint: Path) -> bool | None:
    """Return the place of the norms by the experiment's config; None if it does not tell."""
    file = checkpoint / "config.json"
    model: Any = read_mapping(file).get("model") if file.is_file() else None
    block = model.get("block") if isinstance(model, Mapping) else None
    name = block.get("name") if isinstance(block, Mapping) else None
    return "reordered_norm" in name if isinstance(name, str) else None
