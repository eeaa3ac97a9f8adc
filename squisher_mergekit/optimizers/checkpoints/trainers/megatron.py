"""Megatron-Core's distributed checkpoint (``torch_dist``): the field before the name, layers stacked, settings aside.

The keys are ``optimizer.state.exp_avg_sq.NAME``, perhaps with ``chained_N.`` in front where a mixture of experts has
several optimizers. Steps and betas are in ``common.pt``. Tensor, pipeline and data parallelism leave no trace.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.optimizers.checkpoints import safe_pickle

_KEY = re.compile(r"((?:chained_\d+\.)?)optimizer\.state\.(exp_avg_sq|exp_avg)\.(.+)")
_BUCKETS = re.compile(r"bucket|gbuf|dp_reshardable")
_COMMON = "common.pt"
_ITERATION = re.compile(r"iter_0*(\d+)")


def is_megatron(keys: Mapping[str, Any]) -> bool:
    """Return True if an index has the keys of Megatron-Core's optimizer."""
    return any(_KEY.fullmatch(key) or (key.startswith("optimizer.") and _BUCKETS.search(key)) for key in keys)


def states_of(entries: Mapping[str, Any], folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the states of the optimizers in the form of ``state_dict``.

    Args:
        entries: Key -> lazy tensor.
        folder: The checkpoint.

    Raises:
        UnsupportedStateError: The state is in flat buckets, or no file tells its settings.
        RefusedError: ``common.pt`` cannot be read safely.
    """
    buckets = next((key for key in entries if _BUCKETS.search(key)), None)
    if buckets is not None:
        raise UnsupportedStateError(
            f"{folder} must store the optimizer's state by parameter, but has flat buckets ({buckets[:80]}); save it "
            "with dist_ckpt_optim_fully_reshardable"
        )
    states: dict[str, dict[str, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for key, entry in entries.items():
        if found := _KEY.fullmatch(key):
            states[found[1].rstrip(".")][found[3]][found[2]] = entry
    common = _common(folder)
    for optimizer in sorted(states):
        settings, steps = _settings(common, optimizer, folder)
        state = {name: {**fields, "step": steps} for name, fields in states[optimizer].items()}
        yield {"state": state, "param_groups": [{**settings, "params": list(state)}]}


def _common(folder: Path) -> Mapping[str, Any]:
    """Return the content of ``common.pt``; empty if there is no such file."""
    file = next((path for path in (folder / _COMMON, folder.parent / _COMMON) if path.is_file()), None)
    loaded = safe_pickle.load(file) if file is not None else {}
    return loaded if isinstance(loaded, Mapping) else {}


def _settings(common: Mapping[str, Any], optimizer: str, folder: Path) -> tuple[dict[str, Any], int | None]:
    """Return betas and steps of one optimizer; those that no file tells are None.

    Raises:
        UnsupportedStateError: The groups of the optimizer differ in their betas or steps.
    """
    inside: Any = common.get("optimizer", {})
    if isinstance(inside, Mapping) and optimizer:  # a chain has numbers or names
        number = optimizer.rpartition("_")[2]
        inside = next((inside[key] for key in (optimizer, int(number), number) if key in inside), inside)
    if isinstance(inside, Mapping) and isinstance(inside.get("optimizer"), Mapping):
        inside = inside["optimizer"]
    groups = inside.get("param_groups") if isinstance(inside, Mapping) else None
    found = [group for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []
    betas = {tuple(group["betas"]) for group in found if isinstance(group.get("betas"), list | tuple)}
    counts = [group.get("step") for group in found]
    state = inside.get("state") if isinstance(inside, Mapping) else None
    counts.append(state.get("common_step") if isinstance(state, Mapping) else None)
    steps = {int(count) for count in counts if count is not None}
    if len(betas) > 1 or len(steps) > 1:
        raise UnsupportedStateError(
            f"the groups in {folder / _COMMON} must share their betas and steps, found {sorted(betas)} and "
            f"{sorted(steps)}; train with equal ones"
        )
    args = common.get("args")
    if not betas and isinstance(getattr(args, "adam_beta2", None), float):
        betas = {(getattr(args, "adam_beta1", 0.9), args.adam_beta2)}  # type: ignore[union-attr]
    iteration, named = common.get("iteration"), _ITERATION.fullmatch(folder.name)
    last = iteration if type(iteration) is int else int(named[1]) if named else None
    return {"betas": next(iter(betas), None)}, next(iter(steps), last)
