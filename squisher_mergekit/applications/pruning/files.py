"""Prune a model on disk, tensor by tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from squisher_mergekit._deprecated import renamed_options
from squisher_mergekit.applications.masks import MASK_NAME, MaskWriter, read_mask, whole_mask
from squisher_mergekit.applications.pruning.recipe import PruningOptions, PruningRecipe, plan_pruning
from squisher_mergekit.applications.pruning.report import PruningReport, make_report
from squisher_mergekit.applications.selection import ScoreInputs, SelectionPlan, select_masks
from squisher_mergekit.errors import ConfigError, MismatchError, UnsupportedStateError
from squisher_mergekit.fisher.fits import check_fits
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.input_axes import axes_on_disk
from squisher_mergekit.models.roles import roles_on_disk
from squisher_mergekit.models.weights import Weights, check_out, open_weights, refuse_quantised, write_changed
from squisher_mergekit.optimizers.load import load_fisher
from squisher_mergekit.tensors.atomic import scratch_beside
from squisher_mergekit.tensors.input_files import expanded

if TYPE_CHECKING:
    from typing_extensions import Unpack

LOG = logging.getLogger("squisher_mergekit")
_NARROWEST = 2  # smallest size of an entry, in bytes


def prune_files(
    model: str | Path,
    fisher: str | Path | Fisher | None,
    out: str | Path,
    sparsity: float | None = None,
    *,
    strict: bool = False,
    progress: bool = False,
    **options: Unpack[PruningOptions],
) -> PruningReport:
    """Write a copy of a model with its least important weights set to 0, and its ``mask.safetensors``.

    The function reads model and Fisher tensor by tensor: three times (four with ``normalize="layer"``, once for a
    pattern), and once more to write. It has the scores of one tensor in memory at a time. All other files of the folder
    (config, tokenizer, shards) are copied.

    Args:
        model: A folder with ``model.safetensors`` or its shards, or a Hub id ``org/name[@revision]``.
        fisher: A Fisher of the model, or a source that :func:`~squisher_mergekit.load_fisher` opens; None for scores
            that need none.
        out: The folder to make; new or empty.
        sparsity: Share of the candidate entries that becomes 0.
        strict: Refuse a Fisher that was made at other weights, instead of a warning.
        progress: Show a progress bar.
        options: The other options of a :class:`~squisher_mergekit.applications.pruning.PruningRecipe`.

    Returns:
        The report; its mask reads the file.

    Raises:
        ConfigError: An option is out of range, ``out`` is not empty, or no candidate tensor is left.
        MismatchError: The Fisher does not fit this model, or lacks a candidate tensor.
        ValuesError: F has NaN, infinite or negative entries, or a weight is not finite.
        RefusedError: A source cannot be read. After any error ``out`` does not exist.

    Example:
        >>> prune_files("nowhere/at/all", None, "out", 0.5, score="magnitude")
        Traceback (most recent call last):
        squisher_mergekit.errors.NotFoundError: ...
    """
    recipe = PruningRecipe(sparsity, **renamed_options(options, least="min_keep"))
    target = expanded(out)
    weights = open_weights(model)
    check_out(target)
    plan = _plan(recipe, weights)
    opened = _fisher(recipe, fisher, weights)
    differs = check_fits(opened, weights, plan.sizes) if opened is not None else None
    if opened is not None and differs:
        warning = f"the Fisher {opened.location} was made at other weights than {weights.folder}: {differs}"
        if strict:
            raise MismatchError(f"{warning}; make one at these weights, or leave out --strict")
        LOG.warning(warning)
    inputs = ScoreInputs(weights.read)
    if opened is not None:
        scale = _scale(opened, recipe)
        inputs = ScoreInputs(weights.read, opened.__getitem__, scale=scale, location=opened.location)
    total = len(plan.sizes) * plan.passes + len(weights.infos)
    with tqdm(total=total, desc="Pruning", unit="tensor", disable=not progress, delay=2) as bar:
        kept = _write(recipe, weights, target, plan, inputs, bar)
    return make_report(recipe, plan, kept, read_mask(target), differs)


def _plan(recipe: PruningRecipe, weights: Weights) -> SelectionPlan:
    shapes = {name: info.shape for name, info in weights.infos.items() if info.dtype.is_floating_point}
    axes = axes_on_disk(weights, shapes) if recipe.pattern else None
    plan = plan_pruning(recipe, shapes, roles_on_disk(weights), axes)
    for name in plan.sizes:
        if weights.infos[name].dtype.itemsize < _NARROWEST:
            raise UnsupportedStateError(
                f"weights must be of 16 bits or more, but {name} in {weights.folder} is {weights.infos[name].dtype}, "
                "whose values depend on separate scales; prune the model before it is quantized"
            )
    refuse_quantised(weights, str(weights.folder))
    return plan


def _fisher(recipe: PruningRecipe, source: str | Path | Fisher | None, weights: Weights) -> Fisher | None:
    """Return the Fisher if the score needs one, else None."""
    if recipe.score == "taylor_squared":
        raise ConfigError(
            "score taylor_squared needs a mean gradient, which no file holds; call prune in Python, or take fisher"
        )
    if recipe.score != "fisher":
        return None
    if source is None:
        raise ConfigError("score fisher needs a Fisher; give --fisher, or take --score magnitude or random")
    return source if isinstance(source, Fisher) else load_fisher(source, weights)


def _scale(fisher: Fisher, recipe: PruningRecipe) -> Callable[[str], tuple[float, float]]:
    return lambda name: (fisher.offset(name, recipe.scaling), fisher.factor(name, recipe.scaling))


def _write(
    recipe: PruningRecipe, weights: Weights, out: Path, plan: SelectionPlan, inputs: ScoreInputs, bar: Any
) -> dict[str, int]:
    """Write the masks, then the model; return name -> number of kept entries."""
    metadata = {"made_by": "prune", **recipe.metadata(), "weights_fingerprint": weights.fingerprint}
    with scratch_beside(out) as scratch:
        file = scratch / MASK_NAME
        with MaskWriter(file, list(plan.shapes), metadata) as writer:
            kept = {name: writer.add(name, mask) for name, mask in select_masks(plan, inputs, bar.update)}
            for name in plan.outside:
                writer.add(name, whole_mask(plan.shapes[name]))
        chosen = read_mask(file)

        def change(name: str, tensor: Tensor) -> Tensor:
            bar.update()
            return tensor.masked_fill(~chosen[name], 0) if name in kept else tensor

        def place(folder: Path) -> None:
            file.replace(folder / MASK_NAME)

        write_changed(weights, out, change, beside=place)
    return kept
