"""Plan of one output tensor, made from headers alone: the Fisher of each model, or the fallback."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from squisher_mergekit.errors import ConfigError, MismatchError
from squisher_mergekit.fisher.config import Scaling
from squisher_mergekit.fisher.factors.mapping import Side
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging.coupling.recorded import recorded_sides, sides_of
from squisher_mergekit.merging.parameters import SQUISHER, UBGM_SQUISHER
from squisher_mergekit.merging.sources import FisherSources, ModelFiles, OpenFisher, find_name, is_untouched
from squisher_mergekit.models.layouts import MatrixLayout
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.tensors.safetensors import TensorInfo, check_shape


@dataclass(frozen=True)
class Settings:
    """Parameters of one tensor that hold for all models."""

    scaling: Scaling = "debiased"
    normalize: str = "auto"
    floor: float = 0.0
    missing: str = "error"
    prior: float = 0.0
    structure: str = "diagonal"
    block: int = 128


# Reasons in the coverage of a Fisher for a tensor that no gradient reaches.
_BUFFER = ("a buffer", "no parameter of the model (a buffer)")


@dataclass(frozen=True)
class Origin:
    """Base weight at which a model's task vector starts, where the base is not an input of the merge.

    Attributes:
        label: Name of the base in the configuration.
        name: Name of the weight.
        load: Task of the graph that reads the weight; None if the base lacks it.
        stored: As in :class:`WeightInput`.
        info: As in :class:`WeightInput`.
        vocabulary_axis: Axis along which vocabularies are brought to one size; None if none is.
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

    Attributes:
        key: The graph's reference to the model.
        model: Files of the model.
        stored: Name in the model's files; None if the weight is built from other tensors when it is read.
        aliases: Other names of the same tensor.
        info: Header of the weight; None if unknown.
        fisher: The parameter ``fisher:``.
        weight: w_i.
        fisher_scale: Factor on the Fisher.
        density: Share of the task vector that is kept; 1 for a base and for weight 0, where it changes nothing.
        origin: theta_0, where the merge needs it; None in ``ubgm_squisher``, where the base is an input.
        is_base: True for the base model.
        vocabulary_axis: Axis of the vocabulary; None if the weight has none.
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
    vocabulary_axis: int | None = None


@dataclass(frozen=True)
class FisherUse:
    """Tensor of a Fisher that weights one model's weight.

    Attributes:
        input: The model's weight.
        opened: The Fisher; None for F = 0 (``fisher: none``).
        name: Name of the tensor.
        converted: True if transformers' checkpoint conversion builds the tensor from others of the Fisher.
        padding: Axis and size to which rows of F = 0 are added: vocabulary entries added after training.
        sides: Sides of the stored matrix whose recorded factors the merge takes.
        filled: True if F is the mean over layers of the same kind, because the model's LoRA left this one alone.
    """

    input: WeightInput
    opened: OpenFisher | None
    name: str
    converted: bool = False
    padding: tuple[int, int] | None = None
    sides: tuple[Side, ...] = ()
    filled: bool = False

    @property
    def warning(self) -> str | None:
        """Warning about rows without a Fisher; None if there are none."""
        if self.padding is None or self.opened is None:
            return None
        axis, size = self.padding
        fisher, label = self.opened.fisher, self.input.model.label
        return (
            f"{self.name} of {label} has {size} rows, but {fisher.location} {fisher.info(self.name).shape[axis]}; the "
            "rows added since then count as unseen (F = 0)"
        )


@dataclass(frozen=True)
class TensorPlan:
    """Plan of one output tensor.

    Attributes:
        name: Name of the tensor.
        size: Number of entries.
        settings: Parameters for all models.
        normalize: ``none``, ``mean`` or ``l2``.
        uses: One Fisher tensor for each model; empty if the tensor needs none (a buffer, a tensor of one model alone).
        missing: Model -> reason why it has no Fisher here. If there is one, the tensor is the weighted mean.
        inputs: The models' weights.
        is_buffer: True for a buffer of real numbers, which can have no Fisher and is the weighted mean.
        is_integer: True for integers, which mergekit copies.
        coupled: True for a matrix that is merged with coupled rows or columns.
        uncoupled: Reason why a structure leaves the tensor to the diagonal; empty if none does.
        transposed: True for a matrix ``[in, out]``.
        is_untouched: True for a weight of the base that no LoRA changes, which is copied.
    """

    name: str
    size: int
    settings: Settings
    normalize: str
    uses: tuple[FisherUse, ...]
    missing: dict[str, str]
    inputs: tuple[WeightInput, ...]
    is_buffer: bool = False
    is_integer: bool = False
    coupled: bool = False
    uncoupled: str = ""
    transposed: bool = False
    is_untouched: bool = False

    @property
    def is_copied(self) -> bool:
        """True for a tensor that mergekit copies: one model alone has it, no LoRA changes it, or it is of integers."""
        return not self.uses and not self.missing

    def differenced(self) -> tuple[WeightInput, ...]:
        """Return the inputs whose difference to the base the merge needs."""
        merged = tuple(use.input for use in self.uses)
        if self.coupled:
            return tuple(item for item in merged if item.weight > 0 and not item.is_base)
        return tuple(item for item in merged if item.density < 1)

    def weights(self) -> list[TensorInfo]:
        """Return the headers of the weights that the merge reads, theta_0 included."""
        read = [item.info for item in self.inputs if item.info is not None]
        base = {item.stored for item in self.inputs if item.is_base}
        origins = [item.origin for item in self.differenced() if item.origin is not None]
        other = {origin.stored: origin.info for origin in origins if origin.stored not in base}
        return read + [info for info in other.values() if info is not None]


CanConvert = Callable[[Hashable, Fisher, str], bool]


def plan_tensor(
    method: str,
    name: str,
    inputs: Sequence[WeightInput],
    settings: Settings,
    sources: FisherSources,
    *,
    base: Weights | None,
    passed_through: bool,
    is_buffer: bool | None = None,
    can_convert: CanConvert,
    layout: MatrixLayout,
    cache_dir: str | None = None,
    resized: bool = False,
) -> TensorPlan:
    """Plan one output tensor.

    Args:
        method: ``squisher`` or ``ubgm_squisher``.
        name: Name of the output tensor.
        inputs: The weights that the merge reads.
        settings: Parameters for all models.
        sources: Open Fishers of the merge.
        base: Weights of the base model, for Fishers of partly frozen models.
        passed_through: True if mergekit copies the tensor, because one model alone has it.
        is_buffer: True for a buffer of the model's class; None if the class is unknown and the Fishers must tell.
        can_convert: Function that returns whether transformers' conversion builds a weight from a Fisher's tensors.
        layout: Form of the tensor.
        cache_dir: Folder for files from the Hub.
        resized: True if mergekit brings the vocabularies to one size.

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
        told = all(why in _BUFFER for why in (missing or {}).values()) if is_buffer is None else is_buffer
        return TensorPlan(name, size, settings, normalize, uses, missing or {}, tuple(inputs), bool(missing) and told)

    if any(item.info is not None and not item.info.dtype.is_floating_point for item in inputs):
        return replace(plan(), is_integer=True)
    if passed_through or is_untouched((item.model, item.stored) for item in inputs):
        return replace(plan(), is_untouched=not passed_through)
    _check_shapes(name, inputs, resized)
    merged = [item for item in inputs if not (method == UBGM_SQUISHER and item.is_base)]
    if not any(item.weight > 0 for item in merged):
        raise ConfigError(f"the weights of {name} must not all be 0; give one model a positive weight")
    if method == SQUISHER:
        _check_base(name, inputs, settings)
    uses, missing = [], {}
    for item in inputs:
        use = _plan_input(method, item, settings, sources, base, can_convert, cache_dir)
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
    planned = plan(() if missing else tuple(uses), missing, normalize)
    return planned if missing or settings.structure == "diagonal" else _with_structure(planned, layout)


def _with_structure(planned: TensorPlan, layout: MatrixLayout) -> TensorPlan:
    """Return the plan of a coupled tensor with its recorded factors, or with the reason why it is not coupled."""
    reason = "an embedding, whose rows are tokens" if layout.embedding else _reason_to_uncouple(planned.inputs)
    if reason:
        return replace(planned, uncoupled=reason)
    sides, block = sides_of(planned.settings.structure, layout.transposed), planned.settings.block
    with_factors = tuple(_with_recorded(use, sides, block) for use in planned.uses)
    return replace(planned, uses=with_factors, coupled=True, transposed=layout.transposed)


def _with_recorded(use: FisherUse, sides: tuple[Side, ...], block: int) -> FisherUse:
    """Return the use of a Fisher with its recorded factors, if it has some; models of weight 0 need none."""
    if use.opened is None or use.converted or use.padding is not None or not use.input.weight:
        return use
    return replace(use, sides=recorded_sides(use.opened.fisher, use.name, sides, block))


def _reason_to_uncouple(inputs: Sequence[WeightInput]) -> str:
    """Return the reason why no structure fits a tensor, as far as headers show it; empty if one fits."""
    for item in inputs:
        if item.info is not None and len(item.info.shape) != 2:
            return "no matrix"
        if item.is_base or item.weight == 0:
            continue
        origin = item.origin
        if origin is None or origin.load is None:
            return "not in the base"
        if origin.vocabulary_axis is not None:
            return "re-ordered by tokenizer:"
        if origin.info is not None and item.info is not None and origin.info.shape != item.info.shape:
            return "of another shape in the base"
    return ""


def _check_base(name: str, inputs: Sequence[WeightInput], settings: Settings) -> None:
    coupled = settings.structure != "diagonal"
    for item in inputs:
        if coupled and item.density < 1:
            raise ConfigError(
                f"density of {item.model.label} must be 1 with structure: {settings.structure}, found "
                f"{item.density:g} for {name}; remove one of the two"
            )
        if coupled and item.origin is None and not item.is_base and item.weight > 0:
            raise ConfigError(
                f"structure: {settings.structure} needs base_model:, the model that all were trained from, but there "
                "is none; add it"
            )
        if item.density < 1 and item.origin is None:
            raise ConfigError(
                f"density below 1 needs base_model:, the model that all were trained from, whose values replace the "
                f"entries that are not kept, but there is none (density {item.density:g} of {item.model.label} for "
                f"{name}); add it"
            )


def _check_shapes(name: str, inputs: Sequence[WeightInput], resized: bool) -> None:
    """Refuse weights of different shapes, apart from vocabularies that mergekit brings to one size."""
    known = [(item, item.info.shape) for item in inputs if item.info is not None]
    for item, shape in known[1:]:
        first, wanted = known[0]
        axis = item.vocabulary_axis
        same_but_rows = (
            axis is not None
            and len(shape) == len(wanted) > axis
            and all(a == b for i, (a, b) in enumerate(zip(shape, wanted, strict=True)) if i != axis)
        )
        if shape == wanted or (same_but_rows and resized):
            continue
        cure = "set tokenizer: {source: union}" if same_but_rows else "merge models of one architecture and size"
        raise MismatchError(
            f"{name} must have one shape in all models, but is {list(wanted)} in {first.model.label} and {list(shape)} "
            f"in {item.model.label}; {cure}"
        )


def _short_of_rows(shape: Sequence[int], item: WeightInput) -> tuple[int, int] | None:
    """Return axis and size of the weight's vocabulary if a Fisher's shape lacks rows of it alone."""
    axis = item.vocabulary_axis
    if axis is None or item.info is None or len(shape) != len(item.info.shape):
        return None
    size = item.info.shape[axis]
    grown = [size if i == axis else length for i, length in enumerate(shape)]
    return (axis, size) if grown == list(item.info.shape) and shape[axis] < size else None


def _check_origin(item: WeightInput) -> None:
    """Refuse a base whose weight is missing or has another shape, where ``density`` needs it."""
    origin = item.origin
    if origin is None or item.density == 1:
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
    method: str,
    item: WeightInput,
    settings: Settings,
    sources: FisherSources,
    base: Weights | None,
    can_convert: CanConvert,
    cache_dir: str | None,
) -> FisherUse | str:
    """Return the Fisher tensor of one model, or the reason why there is none."""
    label = item.model.label
    names = tuple(name for name in (item.stored, *item.aliases) if name is not None)
    if item.fisher == "none":
        if (method == UBGM_SQUISHER and item.is_base) or settings.structure != "diagonal":
            return FisherUse(item, None, names[0])
        raise ConfigError(
            f"fisher: none is for the base of {UBGM_SQUISHER} alone, or for {SQUISHER} with structure: rows, columns "
            f"or kron, found it for {label}; remove it"
        )
    other = base if base is not None and base.folder != item.model.weights.folder else None
    opened = sources.open(item.fisher, item.model, other, cache_dir, method if item.is_base else None)
    fisher = opened.fisher
    found = find_name(fisher, names[0], names[1:])
    if found is not None:
        if item.info is not None:
            short = _short_of_rows(fisher.info(found).shape, item)
            if short is not None:
                return FisherUse(item, opened, found, padding=short)
            check_shape(f"{names[0]} for {label}", fisher.info(found).shape, item.info.shape, fisher.location)
        return FisherUse(item, opened, found, filled=found in opened.fills)
    for name in names:
        if can_convert(item.key, fisher, name):
            return FisherUse(item, opened, name, converted=True)
    return fisher.config.coverage.without.get(names[0], "not in it")
