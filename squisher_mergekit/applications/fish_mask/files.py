"""FISH masks of models on disk: selection and reset, tensor by tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from squisher_mergekit.applications.fish_mask.bases import base_of, renamed
from squisher_mergekit.applications.fish_mask.difference import DIFFERENCE_NAME, DifferenceMetadata, write_difference
from squisher_mergekit.applications.fish_mask.heads import parts_on_disk
from squisher_mergekit.applications.fish_mask.recipe import (
    FishMaskOptions,
    FishMaskRecipe,
    all_masks,
    open_inputs,
    plan_mask,
)
from squisher_mergekit.applications.fish_mask.resetting import ResetView
from squisher_mergekit.applications.masks import MASK_NAME, Mask, MaskWriter, read_mask
from squisher_mergekit.applications.selection import SelectionPlan
from squisher_mergekit.errors import ConfigError, MismatchError
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.fingerprint import fingerprint
from squisher_mergekit.models.weights import Weights, check_out, open_weights, write_changed
from squisher_mergekit.optimizers.load import load_fisher
from squisher_mergekit.tensors.atomic import scratch_beside, written_beside, written_file
from squisher_mergekit.tensors.input_files import expanded

if TYPE_CHECKING:
    from typing_extensions import Unpack

LOG = logging.getLogger("squisher_mergekit")
CONFIG = "config.json"


@dataclass(frozen=True)
class MaskReport:
    """Result of a selection.

    Attributes:
        kept: Number of entries that the mask keeps, head included.
        entries: Number of entries that count, head included.
        layers: Name -> number of kept entries, for every floating-point tensor.
        heads: Names of the tensors that are kept whole.
        excluded: Names of the tensors of which nothing is kept.
        fisher_differs: Difference from the weights at which the Fisher was made, in words; None if equal or unknown.
    """

    kept: int
    entries: int
    layers: dict[str, int]
    heads: tuple[str, ...]
    excluded: tuple[str, ...]
    fisher_differs: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ResetReport:
    """Result of a reset.

    Attributes:
        difference_bytes: Size of the difference file.
        model_bytes: Size of the model's tensors.
        selected: Report of the selection; None if the mask was given.
    """

    difference_bytes: int
    model_bytes: int
    selected: MaskReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return asdict(self)


def select_files(
    model: str | Path,
    fisher: str | Path | Fisher | None,
    out: str | Path,
    keep: float,
    *,
    base: str | Path | None = None,
    strict: bool = False,
    progress: bool = False,
    **options: Unpack[FishMaskOptions],
) -> MaskReport:
    """Write the mask of the weights of a model with the largest scores.

    The function reads model, base and Fisher tensor by tensor, three times. It has the scores of one tensor in memory
    at a time.

    Args:
        model: The trained model: a folder with ``model.safetensors`` or its shards, or a Hub id
            ``org/name[@revision]``.
        fisher: A Fisher of the model, or a source that :func:`~squisher_mergekit.load_fisher` opens; None for scores
            that need none.
        out: The file to write.
        keep: Share of the entries to keep, head included.
        base: The model before training, for scores that need it.
        strict: Refuse a Fisher that was made at other weights, instead of a warning.
        progress: Show a progress bar.
        options: The other options of a :class:`~squisher_mergekit.applications.fish_mask.FishMaskRecipe`.

    Returns:
        The report.

    Raises:
        ConfigError: An option is out of range, or the head alone has more entries than the mask keeps.
        MismatchError: The Fisher or the base does not fit the model, or lacks a tensor to choose from.
        ValuesError: F has NaN, infinite or negative entries, or a weight is not finite.
        RefusedError: A source cannot be read. After any error no file is written.

    Example:
        >>> select_files("nowhere/at/all", None, "mask.safetensors", 0.005, score="random")
        Traceback (most recent call last):
        squisher_mergekit.errors.NotFoundError: ...
    """
    recipe, target = FishMaskRecipe(keep, **options), expanded(out)
    if target.is_dir():
        raise ConfigError(f"a mask is written to a file, but {target} is a folder; give {target / MASK_NAME}")
    tuned = open_weights(model)
    before = None if base is None else base_of(open_weights(base, "--base"), tuned)
    opened = fisher if isinstance(fisher, Fisher) else None
    if recipe.takes_fisher and fisher is not None and opened is None:
        opened = load_fisher(fisher, tuned)  # type: ignore[arg-type]
    plan = plan_mask(recipe, tuned, parts_on_disk(tuned))
    inputs, differs = open_inputs(recipe, plan, tuned, before, opened)
    if differs:
        _warn(f"the Fisher was made at other weights than {tuned.folder}: {differs}; make one at these", strict)
    metadata = recipe.metadata(plan) | {"weights_fingerprint": tuned.fingerprint}
    total = plan.passes * len(plan.sizes)
    with (
        written_file(target) as file,
        tqdm(total=total, desc="Selecting", unit="tensor", disable=not progress, delay=2) as bar,
        MaskWriter(file, list(plan.shapes), metadata) as writer,
    ):
        layers = {name: writer.add(name, mask) for name, mask in all_masks(plan, inputs, bar.update)}
    return _report(plan, layers, differs)


def _report(plan: SelectionPlan, layers: dict[str, int], differs: str | None) -> MaskReport:
    heads, excluded = tuple(sorted(plan.selection.always)), tuple(sorted(plan.selection.never))
    return MaskReport(plan.keep, plan.entries, layers, heads, excluded, differs)


def reset_files(
    model: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    mask: str | Path | None = None,
    fisher: str | Path | Fisher | None = None,
    keep: float | None = None,
    difference_only: bool = False,
    strict: bool = False,
    progress: bool = False,
    **options: Unpack[FishMaskOptions],
) -> ResetReport:
    """Write a model with the weights outside a mask reset, and its difference to the base.

    ``out`` gets the model, with config and tokenizer of the trained one, and ``difference.safetensors``, which
    :func:`~.patching.apply_files` applies to the base. If the mask is selected here, ``out`` gets ``mask.safetensors``
    as well.

    Args:
        model: The trained model: a folder with ``model.safetensors`` or its shards, or a Hub id.
        base: The model before training.
        out: The folder to make; new or empty.
        mask: A mask of the model; None selects one.
        fisher: Fisher for the selection, as for :func:`select_files`.
        keep: Share of the entries that the selection keeps.
        difference_only: Write the difference alone, without the model.
        strict: Refuse a mask or Fisher that was made at other weights, instead of a warning.
        progress: Show a progress bar.
        options: The other options of a :class:`~squisher_mergekit.applications.fish_mask.FishMaskRecipe`.

    Returns:
        The report.

    Raises:
        ConfigError: An option is out of range, or ``out`` is not empty.
        MismatchError: The mask or the base does not fit the model, or the base has no value for a weight to reset.
        RefusedError: A source cannot be read. After any error ``out`` does not exist.

    Example:
        >>> reset_files("nowhere/at/all", "base", "out", mask="mask.safetensors")
        Traceback (most recent call last):
        squisher_mergekit.errors.NotFoundError: ...
    """
    target = expanded(out)
    if (mask is None) == (keep is None):
        raise ConfigError("either a mask or a share to keep must be given; give --mask, or --keep and --fisher")
    check_out(target)
    tuned = open_weights(model)
    before = base_of(open_weights(base, "--base"), tuned)
    with scratch_beside(target) as scratch:
        file, selected = scratch / MASK_NAME, None
        if keep is not None:
            selected = select_files(model, fisher, file, keep, base=base, strict=strict, progress=progress, **options)
        chosen = read_mask(file if mask is None else mask)
        _check_made_at(chosen, tuned, strict)
        view = ResetView(tuned, before, chosen)
        view.check()
        total = (1 if difference_only else 2) * len(tuned.infos)
        with tqdm(total=total, desc="Resetting", unit="tensor", disable=not progress, delay=2) as bar:
            _write(view, target, bar.update, difference_only, None if selected is None else file)
    size = sum(info.nbytes for info in tuned.infos.values())
    return ResetReport((target / DIFFERENCE_NAME).stat().st_size, size, selected)


def _write(view: ResetView, out: Path, advance: Callable[[], object], difference_only: bool, mask: Path | None) -> None:
    def place(folder: Path) -> None:
        metadata = DifferenceMetadata(
            text_of(view.tuned.folder / CONFIG),
            text_of(view.base.folder / CONFIG),
            fingerprint(folder),
            view.base.fingerprint,
            renamed(view.tuned.infos, open_weights(view.base.folder, "--base").infos),
        )
        write_difference(view, view.base, folder / DIFFERENCE_NAME, metadata, advance)
        if mask is not None:
            mask.replace(folder / MASK_NAME)

    def change(name: str, tensor: object) -> Any:
        advance()
        return view.read(name)

    if difference_only:
        with written_beside(out) as folder:
            place(folder)
    else:
        write_changed(view.tuned, out, change, beside=place)


def text_of(file: Path) -> str | None:
    """Return the text of a file; None if the file does not exist."""
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _check_made_at(mask: Mask, tuned: Weights, strict: bool) -> None:
    differs = tuned.difference_from(mask.metadata.get("weights_fingerprint"))
    if differs:
        _warn(f"the mask {mask.location} was made at other weights than {tuned.folder}: {differs}", strict)


def _warn(message: str, strict: bool) -> None:
    if strict:
        raise MismatchError(f"{message}; or leave out --strict")
    LOG.warning(message)
