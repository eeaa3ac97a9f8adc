"""What a merge will do with one tensor, from headers alone: whose Fisher weights it, and whether it falls back."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from squisher_mergekit.errors import ConfigError, MismatchError
from squisher_mergekit.fisher.config import Scaling
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging.parameters import SQUISHER, UBGM_SQUISHER
from squisher_mergekit.merging.sources import ModelFiles, Opened, Sources, find_name
from squisher_mergekit.tensors.safetensors import TensorInfo, check_shape


@dataclass(frozen=True)
class Settings:
    """The parameters that hold for all models of a tensor."""

    scaling: Scaling = "debiased"
    normalize: str = "auto"
    floor: float = 0.0
    missing: str = "error"
    prior: float = 0.0


@dataclass(frozen=True)
class Origin:
    """The base's weight that a model's task vector starts at, where the merge would not read it anyway.

    ``label``: the base. ``name``: the weight's. ``load``: what the merge reads it by, None if the base lacks it.
    ``stored`` and ``info`` as in :class:`WeightInput`. ``vocabulary_axis``: the axis along which the vocabulary is
    brought to one size, if it is.
    """

    label: str
    name: str
    load: Hashable | None
    stored: str | None
    info: TensorInfo | None
    vocabulary_axis: int | None = None


@dataclass(frozen=True)
class WeightInput:
    """One model's weight for one output tensor.

    ``stored``: its name in the model's files, None if it is put together from other tensors when read. ``aliases``:
    other names of the same tensor. ``info``: its header, None if unknown. ``density``: 1 where it changes nothing, as
    of the base or with weight 0. ``origin``: None in ``ubgm_squisher``, where the base is an input.
    """

    key: Hashable
    model: ModelFiles
    stored: str | None
    aliases: tuple[str, ...]
    info: TensorInfo | None
    fisher: str
    weight: float
    fisher_scale: float
    density: float = 1.0
    origin: Origin | None = None
    is_base: bool = False


@dataclass(frozen=True)
class FisherUse:
    """Which tensor of which Fisher weights one model's weight; ``opened`` is None for F = 0 (``fisher: none``).

    ``converted``: no tensor bears a name of the weight, but transformers' checkpoint conversion gives it.
    """

    input: WeightInput
    opened: Opened | None
    name: str
    converted: bool = False


@dataclass(frozen=True)
class TensorPlan:
    """How one output tensor is made.

    ``uses``: empty if no Fisher is needed (a buffer, a tensor that one model alone has). ``missing``: model label ->
    why it has no Fisher here; then all Fishers of this tensor are left out and the weighted mean is taken.
    """

    name: str
    size: int
    settings: Settings
    normalize: str
    uses: tuple[FisherUse, ...]
    missing: dict[str, str]
    inputs: tuple[WeightInput, ...]

    def trimmed(self) -> tuple[WeightInput, ...]:
        """Return the inputs of whose task vector a share is kept."""
        return tuple(use.input for use in self.uses if use.input.density < 1)

    def weights(self) -> list[TensorInfo]:
        """Return the headers of the weights that are read, a base's for ``density`` among them."""
        read = [item.info for item in self.inputs if item.info is not None]
        base = {item.stored for item in self.inputs if item.is_base}
        origins = [item.origin for item in self.trimmed() if item.origin is not None]
        other = {origin.stored: origin.info for origin in origins if origin.stored not in base}
        return read + [info for info in other.values() if info is not None]


CanConvert = Callable[[Hashable, Fisher, str], bool]


def plan_tensor(
    method: str,
    name: str,
    inputs: Sequence[WeightInput],
    settings: Settings,
    sources: Sources,
    *,
    base: Path | None,
    passed_through: bool,
    can_convert: CanConvert,
    cache_dir: str | None = None,
) -> TensorPlan:
    """Plan one output tensor.

    Args:
        method: ``squisher`` or ``ubgm_squisher``.
        name: Name of the output tensor.
        inputs: The weights that will be loaded.
        settings: Parameters for all models.
        sources: Opens the Fishers.
        base: Folder of the base model, for Fishers of partly frozen models.
        passed_through: Whether mergekit copies the tensor, as one model alone has it.
        can_convert: Whether a Fisher's tensors give a weight by transformers' conversion.
        cache_dir: Where Hub files are kept.

    Returns:
        The plan.

    Raises:
        ConfigError: All weights are 0, or ``fisher: none`` where a Fisher is needed.
        RefusedError: A Fisher cannot be found, read, or does not fit the weights.
    """
    known = next((item.info for item in inputs if item.info is not None), None)
    size = math.prod(known.shape) if known is not None else 0

    def plan(
        uses: tuple[FisherUse, ...] = (), missing: dict[str, str] | None = None, normalize: str = "none"
    ) -> TensorPlan:
        return TensorPlan(name, size, settings, normalize, uses, missing or {}, tuple(inputs))

    if any(item.info is not None and not item.info.dtype.is_floating_point for item in inputs):
        return plan()
    if passed_through:
        return plan()
    merged = [item for item in inputs if not (method == UBGM_SQUISHER and item.is_base)]
    if not any(item.weight > 0 for item in merged):
        raise ConfigError(f"the weights of {name} must not all be 0; give one model a positive weight")
    if method == SQUISHER:
        _check_base(name, inputs)
    uses, missing = [], {}
    for item in inputs:
        use = _plan_input(method, item, sources, base, can_convert, cache_dir)
        if isinstance(use, str):
            missing[item.model.label] = use
        else:
            uses.append(use)
    if not missing:
        for item in inputs:
            _check_origin(item)
    fishers = [use.opened.fisher for use in uses if use.opened is not None]
    normalize = settings.normalize
    if normalize == "auto":
        normalize = "none" if all(fisher.config.from_optimizer for fisher in fishers) else "mean"
    return plan(() if missing else tuple(uses), missing, normalize)


def _check_base(name: str, inputs: Sequence[WeightInput]) -> None:
    for item in inputs:
        if item.density < 1 and item.origin is None:
            raise ConfigError(
                f"density below 1 needs base_model:, the model that all were trained from, whose values stand where a "
                f"model's are not kept, but there is none (density {item.density:g} of {item.model.label} for {name}); "
                "add it"
            )


def _check_origin(item: WeightInput) -> None:
    """Refuse a base without the weight that a task vector starts at."""
    origin = item.origin
    if origin is None:
        return
    if origin.load is None:
        raise MismatchError(
            f"density below 1 of {item.model.label} needs every tensor of it in the base_model:, but {origin.label} "
            f"has no {origin.name}; give the model that it was trained from, or set density: 1 for this tensor"
        )
    if origin.info is None or item.info is None:
        return
    found, wanted = list(origin.info.shape), list(item.info.shape)
    if origin.vocabulary_axis is not None and len(found) == len(wanted):
        found[origin.vocabulary_axis] = wanted[origin.vocabulary_axis]
    if found != wanted:
        raise MismatchError(
            f"density below 1 of {item.model.label} needs its tensors to be shaped as in the base_model:, but "
            f"{origin.name} is {list(item.info.shape)} and in {origin.label} {list(origin.info.shape)}; give the model "
            "that it was trained from, or set density: 1 for this tensor"
        )


def _plan_input(
    method: str, item: WeightInput, sources: Sources, base: Path | None, can_convert: CanConvert, cache_dir: str | None
) -> FisherUse | str:
    """Return the use of a Fisher, or why there is none."""
    label = item.model.label
    names = tuple(name for name in (item.stored, *item.aliases) if name is not None)
    if item.fisher == "none":
        if method == UBGM_SQUISHER and item.is_base:
            return FisherUse(item, None, names[0])
        raise ConfigError(f"fisher: none is for the base of {UBGM_SQUISHER} alone, found it for {label}; remove it")
    opened = sources.open(item.fisher, item.model, base if base != item.model.folder else None, cache_dir)
    fisher = opened.fisher
    found = find_name(fisher, names[0], names[1:])
    if found is not None:
        if item.info is not None:
            check_shape(f"{names[0]} for {label}", fisher.info(found).shape, item.info.shape, fisher.location)
        return FisherUse(item, opened, found)
    for name in names:
        if can_convert(item.key, fisher, name):
            return FisherUse(item, opened, name, converted=True)
    return fisher.config.coverage.without.get(names[0], "not in it")
