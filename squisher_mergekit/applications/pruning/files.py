"""Prune a model on disk, tensor by tensor."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from squisher_mergekit.applications.masks import MASK_NAME, MaskWriter, read_mask
from squisher_mergekit.applications.pruning.recipe import Inputs, Plan, Recipe, make_plan, masks
from squisher_mergekit.applications.pruning.report import Report, make_report
from squisher_mergekit.errors import ConfigError, MismatchError, UnsupportedStateError
from squisher_mergekit.fisher.fits import check_fits
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.input_axes import axes_on_disk
from squisher_mergekit.models.roles import roles_on_disk
from squisher_mergekit.models.weights import Weights, check_out, open_weights, write_changed
from squisher_mergekit.optimizers.load import load_fisher

LOG = logging.getLogger("squisher_mergekit")
_NARROWEST = 2  # bytes of an entry


def prune_files(
    model: str | Path,
    fisher: str | Path | Fisher | None,
    out: str | Path,
    sparsity: float | None = None,
    *,
    strict: bool = False,
    progress: bool = False,
    **options: Any,
) -> Report:
    """Write a copy of a model whose least important weights are 0, and ``mask.safetensors`` beside it.

    The model and the Fisher are read tensor by tensor, four times (twice for a pattern), and once more to write; scores
    are held of one tensor at a time, so that memory is that of ``extract``. Everything else of the folder (config,
    tokenizer, shards) stays as it is.

    Args:
        model: A folder with ``model.safetensors`` or its shards, or a Hub id ``org/name[@revision]``.
        fisher: A Fisher of it, or whatever :func:`~squisher_mergekit.load_fisher` opens; None where the score needs
            none.
        out: The folder to make; new or empty.
        sparsity: See :class:`~squisher_mergekit.applications.pruning.recipe.Recipe`.
        strict: Refuse a Fisher that was made at other weights; otherwise a warning says so.
        progress: Show a bar.
        options: The other fields of a :class:`~squisher_mergekit.applications.pruning.recipe.Recipe`.

    Returns:
        What was pruned, layer by layer; its mask reads the file.

    Raises:
        ConfigError: An option is out of range, ``out`` is taken, or nothing is left to choose from.
        MismatchError: The Fisher is not of this model, or lacks a tensor that is chosen from.
        ValuesError: F has NaN, infinite or negative entries, or a weight is not finite.
        RefusedError: Something cannot be read. In all cases nothing is left at ``out``.

    Example:
        >>> prune_files("nowhere/at/all", None, "out", 0.5, score="magnitude")
        Traceback (most recent call last):
        squisher_mergekit.errors.NotFoundError: ...
    """
    recipe, target = Recipe(sparsity, **options), Path(out).expanduser()
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
    inputs = Inputs(weights.read)
    if opened is not None:
        inputs = Inputs(weights.read, opened.__getitem__, _scale(opened, recipe), opened.location)
    total = len(plan.sizes) * plan.passes + len(weights.infos)
    with tqdm(total=total, desc="Pruning", unit="tensor", disable=not progress, delay=2) as bar:
        kept = _write(weights, target, plan, inputs, bar)
    return make_report(plan, kept, read_mask(target), differs)


def _plan(recipe: Recipe, weights: Weights) -> Plan:
    shapes = {name: info.shape for name, info in weights.infos.items() if info.dtype.is_floating_point}
    axes = axes_on_disk(weights, shapes) if recipe.pattern else None
    plan = make_plan(recipe, shapes, roles_on_disk(weights), axes)
    for name in plan.sizes:
        if weights.infos[name].dtype.itemsize < _NARROWEST:
            raise UnsupportedStateError(
                f"weights must be of 16 bits or more, but {name} in {weights.folder} is {weights.infos[name].dtype}, "
                "whose values depend on scales stored beside; prune the model before it is quantized"
            )
    return plan


def _fisher(recipe: Recipe, source: str | Path | Fisher | None, weights: Weights) -> Fisher | None:
    """Open the Fisher, where the score needs one."""
    if recipe.score == "taylor_squared":
        raise ConfigError(
            "score taylor_squared needs a mean gradient, which no file holds; call prune in Python, or take fisher"
        )
    if recipe.score != "fisher":
        return None
    if source is None:
        raise ConfigError("score fisher needs a Fisher; give --fisher, or take --score magnitude or random")
    return source if isinstance(source, Fisher) else load_fisher(source, weights)


def _scale(fisher: Fisher, recipe: Recipe) -> Callable[[str], tuple[float, float]]:
    return lambda name: (fisher.offset(name, recipe.scaling), fisher.factor(name, recipe.scaling))


def _write(weights: Weights, out: Path, plan: Plan, inputs: Inputs, bar: Any) -> dict[str, int]:
    """Write masks, then the model; return name -> how many entries are kept."""
    about = {"made_by": "prune", **plan.recipe.about(), "weights_fingerprint": weights.fingerprint}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        file = Path(beside) / MASK_NAME
        with MaskWriter(file, list(plan.shapes), about) as writer:
            kept = {name: writer.add(name, mask) for name, mask in masks(plan, inputs, bar.update)}
            for name in plan.ignored:
                writer.add(name, torch.ones((), dtype=torch.bool).expand(plan.shapes[name]))
        chosen = read_mask(file)

        def change(name: str, tensor: Tensor) -> Tensor:
            bar.update()
            return tensor.masked_fill(~chosen[name], 0) if name in kept else tensor

        def place(folder: Path) -> None:
            file.replace(folder / MASK_NAME)

        write_changed(weights, out, change, beside=place)
    return kept
