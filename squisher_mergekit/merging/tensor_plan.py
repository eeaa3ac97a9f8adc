"""Plan of one output tensor, made from headers alone: the Fisher of each model, or the fallback."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.fisher.factors.mapping import Side
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging.coupling.recorded import recorded_sides, sides_of
from squisher_mergekit.merging.parameters import SQUISHER, UBGM_SQUISHER
from squisher_mergekit.merging.planning.checks import check_base, check_origins, check_shapes, short_of_rows
from squisher_mergekit.merging.planning.records import FisherUse, Settings, TensorPlan, WeightInput
from squisher_mergekit.merging.sources import FisherSources, find_name, is_untouched
from squisher_mergekit.models.layouts import MatrixLayout
from squisher_mergekit.models.roles import is_running_statistic
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.tensors.safetensors import check_shape

# Reasons in the coverage of a Fisher for a tensor that no gradient reaches.
_BUFFER = ("a buffer", "no parameter of the model (a buffer)")

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
        is_buffer: True for a buffer of the model's class; None if the class is unknown: the name or the Fishers tell.
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
        told = is_buffer
        if told is None:
            told = is_running_statistic(name) or all(why in _BUFFER for why in (missing or {}).values())
        return TensorPlan(name, size, settings, normalize, uses, missing or {}, tuple(inputs), bool(missing) and told)

    if any(item.info is not None and not item.info.dtype.is_floating_point for item in inputs):
        return replace(plan(), is_integer=True)
    if passed_through or is_untouched((item.model, item.stored) for item in inputs):
        return replace(plan(), is_untouched=not passed_through)
    check_shapes(name, inputs, resized)
    merged = [item for item in inputs if not (method == UBGM_SQUISHER and item.is_base)]
    if not any(item.weight > 0 for item in merged):
        raise ConfigError(f"the weights of {name} must not all be 0; give one model a positive weight")
    if method == SQUISHER:
        check_base(name, inputs, settings)
    uses, missing = [], {}
    for item in inputs:
        use = _plan_input(method, item, settings, sources, base, can_convert, cache_dir)
        if isinstance(use, str):
            missing[item.model.label] = use
        else:
            uses.append(use)
    if method == SQUISHER and missing and settings.missing == "error" and settings.structure == "diagonal":
        uses, missing = _left_to_others(inputs, uses, missing)
    fishers = [use.opened.fisher for use in uses if use.opened is not None]
    normalize = settings.normalize
    if normalize == "auto":
        normalize = "none" if all(fisher.config.of_squishers for fisher in fishers) else "mean"
    planned = plan(() if missing else tuple(uses), missing, normalize)
    if method == SQUISHER:
        check_origins(planned.differenced(), settings.votes)
    return planned if missing or settings.structure == "diagonal" else _with_structure(planned, layout)


def _left_to_others(
    inputs: Sequence[WeightInput], uses: list[FisherUse], missing: dict[str, str]
) -> tuple[list[FisherUse], dict[str, str]]:
    """Return Fishers and reasons, with F = 0 for models whose LoRA left the weight alone.

    F of such a weight is unknown; the model kept W0 there, so that the weight is left to the full models that have F.
    Nothing changes where another model lacks F, where no full model has it, or in slices of different weights.
    """
    kept = {
        item.model.label: FisherUse(item, None, item.stored, left=True)
        for item in inputs
        if item.model.lora is not None and item.stored is not None and item.model.lora.keeps(item.stored)
    }
    full = any(use.input.model.lora is None and use.input.weight > 0 and use.opened for use in uses)
    alike = len({item.stored for item in inputs}) == 1 and all(item.info is not None for item in inputs)
    if not full or not alike or not missing.keys() <= kept.keys():
        return uses, missing
    known = {use.input.model.label: use for use in uses}
    return [known.get(item.model.label) or kept[item.model.label] for item in inputs], {}


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
            short = short_of_rows(fisher.info(found).shape, item)
            if short is not None:
                return FisherUse(item, opened, found, padding=short)
            check_shape(f"{names[0]} for {label}", fisher.info(found).shape, item.info.shape, fisher.location)
        return FisherUse(item, opened, found, filled=found in opened.fills)
    for name in names:
        if can_convert(item.key, fisher, name):
            return FisherUse(item, opened, name, converted=True)
    return fisher.config.coverage.without.get(names[0], "not in it")
