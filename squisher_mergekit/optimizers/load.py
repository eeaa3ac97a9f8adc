"""Open a Fisher from whatever holds one: our own file, the Hub, or the optimizer state that training left on disk."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from squisher_mergekit.errors import ConfigError, CorruptFileError, MismatchError, NamingError, NotFoundError
from squisher_mergekit.fisher import hub
from squisher_mergekit.fisher.config import Coverage, FisherConfig, OptimizerInfo, SourceInfo, per_parameter
from squisher_mergekit.fisher.files import (
    TIED,
    SafetensorsStore,
    has_fisher,
    read_fisher,
    safetensors_files,
    tensor_infos,
    tied_aliases,
    write_fisher,
)
from squisher_mergekit.fisher.fingerprint import fingerprint
from squisher_mergekit.fisher.mapping import Fisher, TensorInfo, check_shape
from squisher_mergekit.optimizers import pickles
from squisher_mergekit.optimizers.lora import adapter_skeleton
from squisher_mergekit.optimizers.naming import Parameter, assign
from squisher_mergekit.optimizers.skeleton import Skeleton, skeleton
from squisher_mergekit.optimizers.state import OptimizerState, Slot, parameters_of, parse
from squisher_mergekit.optimizers.store import MomentStore, store_moments

LOG = logging.getLogger("squisher_mergekit")
STATE_NAMES = ("optimizer.pt", "optimizer.bin")


def find_state(folder: Path) -> Path | None:
    """Return the optimizer's file in a folder, None if there is none."""
    return next((folder / name for name in STATE_NAMES if (folder / name).is_file()), None)


def load_fisher(
    source: str | Path,
    model: str | Path | None = None,
    base: str | Path | None = None,
    names: str | Path | Sequence[str] | None = None,
) -> Fisher:
    """Open a Fisher; its tensors are read when asked for.

    Args:
        source: A portable Fisher, an optimizer's file, a folder with either (of a run with several ``checkpoint-N`` the
            last), or a Hub id ``org/name[@revision]``.
        model: The weights it belongs to, or a folder with their ``config.json``, where ``source`` does not hold them.
        base: The model before training, which tells frozen parameters apart; for a LoRA its base model.
        names: One name for each of the optimizer's parameters, in order: a list, or a text file with one a line.

    Returns:
        The Fisher, under the names in ``model.safetensors`` (of a LoRA: in ``adapter_model.safetensors``).

    Raises:
        NotFoundError: There is nothing to open.
        RefusedError: It cannot be read safely, named with certainty, or does not fit the weights.

    Example:
        >>> load_fisher("nowhere")
        Traceback (most recent call last):
        squisher_mergekit.errors.NotFoundError: a Fisher must be a file, a folder or a Hub id org/name[@revision], ...
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = hub.resolve(str(source))
    if has_fisher(path) if path.is_dir() else path.suffix in (".safetensors", ".json"):
        return _checked(read_fisher(path), Path(model) if model is not None else None)
    file = path if path.is_file() else _state_in(path)
    given_model, given_base = (Path(item).expanduser() if item is not None else None for item in (model, base))
    return _open_state(file, given_model, given_base, _read_names(names))


def extract(
    source: str | Path,
    out: str | Path,
    model: str | Path | None = None,
    base: str | Path | None = None,
    names: str | Path | Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    compress: str | None = None,
    *,
    examples_per_step: float | None = None,
    tokens_per_step: float | None = None,
    progress: bool = False,
) -> Fisher:
    """Write the Fisher in ``source`` as a portable one.

    Args:
        source: As for :func:`load_fisher`.
        out: The folder to make.
        model: As for :func:`load_fisher`.
        base: As for :func:`load_fisher`.
        names: As for :func:`load_fisher`.
        dtype: float32 (default) or bfloat16.
        compress: Not known to this version; must be None.
        examples_per_step: Examples behind one optimizer step, over all processes and accumulation, to be recorded.
        tokens_per_step: The same in tokens.
        progress: Show a bar.

    Returns:
        The Fisher that was written.

    Raises:
        ConfigError: ``compress`` is given, or ``out`` holds a Fisher already.
        RefusedError: As for :func:`load_fisher`; or an entry is NaN, infinite or negative. Nothing is left at ``out``.
    """
    from tqdm import tqdm

    if compress is not None:
        raise ConfigError(f"compress must be None in this version, found {compress!r}; dtype bfloat16 halves the size")
    fisher = load_fisher(source, model, base, names)
    known = {"examples_per_step": examples_per_step, "tokens_per_step": tokens_per_step}
    changes = {key: value for key, value in known.items() if value is not None}
    fisher.config = fisher.config.model_copy(update=changes)
    bar = tqdm(list(fisher), desc="Extracting", unit="tensor", disable=not progress)
    write_fisher(fisher, Path(out), dtype or torch.float32, bar)
    return read_fisher(Path(out))


def _state_in(folder: Path) -> Path:
    """Return the optimizer's file in a checkpoint, or in the last checkpoint of a run.

    Raises:
        NotFoundError: There is none.
    """
    found = find_state(folder)
    if found is not None:
        return found
    steps = {
        int(m[1]): path for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    for step in sorted(steps, reverse=True):
        found = find_state(steps[step])
        if found is not None:
            LOG.warning(
                "%s is a run with %d checkpoints; taking the last with optimizer state, %s", folder, len(steps), step
            )
            return found
    raise NotFoundError(
        f"no optimizer state in {folder}: neither fisher.safetensors nor {' nor '.join(STATE_NAMES)}, there or in a "
        "checkpoint-N below; save with save_only_model=False and point at checkpoint-N, not at the final model"
    )


def _read_names(names: str | Path | Sequence[str] | None) -> list[str] | None:
    if names is None or not isinstance(names, str | Path):
        return None if names is None else list(names)
    path = Path(names)
    if not path.is_file():
        raise NotFoundError(f"--names must be a text file with one name a line, but there is no {path}")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _open_state(file: Path, model: Path | None, base: Path | None, names: list[str] | None) -> Fisher:
    state = parse(pickles.load(file), file)
    folder = file.parent
    adapter = (folder / "adapter_config.json").is_file()
    described = model if model is not None and not adapter else folder
    described = described.parent if described.is_file() else described
    bones: Skeleton | None = None
    if adapter:
        bones = adapter_skeleton(folder, base)
    elif (described / "config.json").is_file():
        bones = skeleton(described.resolve())
    named = _name_slots(state, bones, names, described, None if adapter else base)
    moments = {name: slot.tensor for name, slot in named.items() if slot.tensor is not None}
    _check_moments(named, bones, file)
    store = store_moments(str(file), moments, bones)
    basename = "adapter_model" if adapter else "model"
    weights = _weights_of(described, basename)
    config = _config(state, named, store, bones, weights, adapter)
    LOG.debug("%s: %d of %d parameters have a second moment", file, len(moments), len(named))
    fisher = Fisher(store, config, {**(bones.aliases if bones else {}), **tied_aliases(config)})
    _warn(fisher, named, folder)
    return _checked(fisher, described if adapter else (model or folder), basename)


def _name_slots(
    state: OptimizerState, bones: Skeleton | None, names: list[str] | None, described: Path, base: Path | None
) -> dict[str, Slot]:
    """Give every slot its name: the user's word, the file's own names, or the one mapping that fits the model."""
    slots = list(state.slots)
    if names is not None:
        if len(names) != len(slots):
            raise NamingError(
                f"--names must have one name for each of the {len(slots)} parameters in {state.file}, "
                f"found {len(names)}"
            )
        return dict(zip(names, slots, strict=True))
    if all(slot.name is not None for slot in slots):
        return {str(slot.name): slot for slot in slots}
    if state.model is not None:
        shapes = parameters_of(state.model)
        parameters: Sequence[Parameter] = [Parameter(name, tuple(shape)) for name, shape in shapes.items()]
        if bones is not None and {p.name for p in bones.parameters} <= set(state.model):
            parameters = bones.parameters
    elif bones is not None:
        parameters = bones.parameters
    else:
        raise NamingError(
            f"the parameters in {state.file} are numbered, and their names follow from the model's config.json, which "
            f"{described} does not have; give --model DIR, or --names FILE with one name a line"
        )
    groups = state.groups
    if len(groups) > 1 and not any(groups[1:]) and not bones:
        groups = groups[:1]
    wanted = [[tuple(slot.tensor.shape) if slot.tensor is not None else None for slot in group] for group in groups]
    changed = None
    if base is not None and len(slots) < len(parameters):
        changed = _changed(described, base, bones)
    chosen = assign(wanted, parameters, changed, str(state.file))
    return {
        name: slot
        for group, group_names in zip(groups, chosen, strict=True)
        for slot, name in zip(group, group_names, strict=True)
    }


def _changed(tuned: Path, base: Path, bones: Skeleton | None) -> set[str] | None:
    """Return the parameters whose weights differ from the base model's after the same cast, None if there are none."""
    files = [{n: f for f in safetensors_files(folder, "model") for n in tensor_infos(f)} for folder in (tuned, base)]
    if bones is None or not all(files):
        return None
    differing: set[str] = set()
    for name in files[0].keys() & files[1].keys():
        now, before = (SafetensorsStore([side[name]], str(side[name])).read(name) for side in files)
        if now.shape != before.shape or not torch.equal(now, before.to(now.dtype)):
            differing.update(bones.sources.get(name, ()))
    return differing


def _check_moments(named: Mapping[str, Slot], bones: Skeleton | None, file: Path) -> None:
    shapes = {p.name: p.shape for p in bones.parameters} if bones is not None else {}
    for name, slot in named.items():
        if slot.tensor is not None and name in shapes:
            check_shape(name, tuple(slot.tensor.shape), shapes[name], str(file))


def _weights_of(folder: Path, basename: str) -> dict[str, TensorInfo]:
    files = safetensors_files(folder, basename)
    return {name: info for file in files for name, info in tensor_infos(file).items()}


def _checked(fisher: Fisher, model: Path | None, basename: str = "model") -> Fisher:
    """Hold names and shapes against the weights' headers, where there are weights.

    Raises:
        MismatchError: A name is not there, or a shape differs.
    """
    weights = _weights_of(model, basename) if model is not None and model.is_dir() else {}
    for name in fisher if weights else ():
        if name not in weights:
            raise MismatchError(
                f"the names of a Fisher must be those of the weights, but {name} in {fisher.location} is not in "
                f"{model}; give the model that was trained"
            )
        check_shape(name, fisher.info(name).shape, weights[name].shape, fisher.location)
    return fisher


def _config(
    state: OptimizerState,
    named: Mapping[str, Slot],
    store: MomentStore,
    bones: Skeleton | None,
    weights: Mapping[str, TensorInfo],
    adapter: bool,
) -> FisherConfig:
    folder = state.file.parent
    first = {name: named[sources[0]] for name, sources in store.sources.items()}
    kinds = [slot.moment for slot in first.values() if slot.moment is not None]
    classes = {kind.class_ for kind in kinds}
    decays = {n: s.moment.decay for n, s in first.items() if s.moment is not None and s.moment.decay is not None}
    steps = {name: slot.steps for name, slot in first.items() if slot.steps is not None}
    start = max(kind.start for kind in kinds)
    optimizer = OptimizerInfo.model_validate(
        {
            "class": classes.pop() if len(classes) == 1 else None,
            "beta2": per_parameter(decays),
            "decoupled_weight_decay": kinds[0].decoupled,
            "amsgrad": kinds[0].amsgrad,
            "initial_accumulator_value": start or None,
        }
    )
    trainer = (folder / "trainer_state.json").is_file()
    layout = "transformers-trainer" if trainer else "accelerate" if state.file.name == "optimizer.bin" else "torch"
    return FisherConfig(
        estimator="squisher",
        statistic=kinds[0].statistic,
        parameters="adapter" if adapter else "model",
        optimizer=optimizer,
        steps=per_parameter(steps) if len(steps) == len(first) else None,
        bias_corrected=False,
        encoding={"default": str(next(iter(store.infos.values())).dtype).removeprefix("torch.")},
        source=SourceInfo(layout=layout, files=(state.file.name,), versions=_versions(folder)),
        coverage=Coverage.model_validate({"with": len(store.infos), "without": _without(named, store, bones, weights)}),
        weights_fingerprint=fingerprint(folder, "adapter_model" if adapter else "model"),
    )


def _versions(folder: Path) -> dict[str, str]:
    file = folder / "config.json"
    version = _json(file).get("transformers_version") if file.is_file() else None
    return {"transformers": str(version)} if version else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"{file} must be JSON, but {error}; copy it again") from error
    return data if isinstance(data, dict) else {}


def _without(
    named: Mapping[str, Slot], store: MomentStore, bones: Skeleton | None, weights: Mapping[str, TensorInfo]
) -> dict[str, str]:
    """Say of every weight without a second moment why it has none."""
    without = {alias: TIED + kept for alias, kept in (bones.aliases if bones else {}).items() if kept in store.infos}
    names = list(weights) or list(bones.sources if bones else named)
    for name in names:
        if name in store.infos or name in without:
            continue
        sources = bones.sources.get(name, (name,)) if bones else (name,)
        handed_over = any(source in named for source in sources)
        without[name] = "never stepped (frozen or unused)" if handed_over else "not given to the optimizer (frozen)"
        if weights and not weights[name].dtype.is_floating_point:
            without[name] = "a buffer"
    return without


def _warn(fisher: Fisher, named: Mapping[str, Slot], folder: Path) -> None:
    kinds = [
        (slot.moment, slot.tensor) for slot in named.values() if slot.moment is not None and slot.tensor is not None
    ]
    narrow = [t.dtype for m, t in kinds if t.dtype in (torch.bfloat16, torch.float16) and (m.decay or 0) > 0.95]
    if narrow:
        LOG.warning(
            "%s: %d second moments are stored as %s with beta2 > 0.95, where they cannot decay; "
            "their scale is not to be trusted (train with fp32 weights or beta2 <= 0.95)",
            fisher.location, len(narrow), str(narrow[0]).removeprefix("torch."),
        )  # fmt: skip
    if any(moment.coupled_decay for moment, _ in kinds):
        LOG.warning(
            "%s: weight decay was added to the gradient before squaring; the Fisher is polluted by it", fisher.location
        )
    state_file = folder / "trainer_state.json"
    recorded = _json(state_file).get("global_step") if state_file.is_file() else None
    most = max((slot.steps for slot in named.values() if slot.steps is not None), default=None)
    if recorded is not None and most is not None and most > recorded:
        LOG.warning("%s has seen %d steps, but trainer_state.json says %s; are both of one checkpoint?",
                    fisher.location, most, recorded)  # fmt: skip
