"""FISH masks of models on disk, tensor by tensor: select, reset, and the difference to the base put on or taken off."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from squisher_mergekit.applications.fish_mask.bases import base_of, renamed
from squisher_mergekit.applications.fish_mask.choice import PASSES, Choice, Plan, Sources, make_plan, masks
from squisher_mergekit.applications.fish_mask.difference import DIFFERENCE_NAME, About, write_difference
from squisher_mergekit.applications.fish_mask.heads import parts_on_disk
from squisher_mergekit.applications.fish_mask.resetting import Reset
from squisher_mergekit.applications.masks import MASK_NAME, Mask, MaskWriter, read_mask
from squisher_mergekit.errors import ConfigError, MismatchError
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.fingerprint import difference, fingerprint
from squisher_mergekit.models.weights import Weights, check_out, open_weights, write_changed
from squisher_mergekit.optimizers.load import load_fisher
from squisher_mergekit.tensors.atomic import written_beside

LOG = logging.getLogger("squisher_mergekit")
CONFIG = "config.json"


@dataclass(frozen=True)
class Selected:
    """What a mask on disk keeps.

    ``kept`` of ``entries``: both with the head, without what is excluded. ``layers``: name -> how many entries are
    kept, of every floating-point tensor. ``heads``, ``excluded``: names. ``fisher_differs``: in what the weights differ
    from those that the Fisher was made at, if that is known.
    """

    kept: int
    entries: int
    layers: dict[str, int]
    heads: tuple[str, ...]
    excluded: tuple[str, ...]
    fisher_differs: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return asdict(self)


@dataclass(frozen=True)
class Written:
    """What a reset wrote: bytes of the difference, and of the model that it makes from the base."""

    difference_bytes: int
    model_bytes: int
    selected: Selected | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
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
    **options: Any,
) -> Selected:
    """Write the mask of the weights of a model that matter most.

    Model, base and Fisher are read tensor by tensor, three times; scores are held of one tensor at a time, so that
    memory is that of ``extract``.

    Args:
        model: A folder with ``model.safetensors`` or its shards, or a Hub id ``org/name[@revision]``: after training.
        fisher: A Fisher of it, or whatever :func:`~squisher_mergekit.load_fisher` opens; None where the score needs
            none.
        out: The file to write.
        keep: See :class:`~squisher_mergekit.applications.fish_mask.Choice`.
        base: The model that it was trained from, where the score needs it.
        strict: Refuse a Fisher that was made at other weights; otherwise a warning says so.
        progress: Show a bar.
        options: The other fields of a :class:`~squisher_mergekit.applications.fish_mask.Choice`.

    Returns:
        What is kept.

    Raises:
        ConfigError: An option is out of range, or the head alone has more entries than are to be kept.
        MismatchError: The Fisher or the base is not of this model, or lacks a tensor that is chosen from.
        ValuesError: F has NaN, infinite or negative entries, or a weight is not finite.
        RefusedError: Something cannot be read. In all cases nothing is written.

    Example:
        >>> select_files("nowhere/at/all", None, "mask.safetensors", 0.005, score="random")
        Traceback (most recent call last):
        squisher_mergekit.errors.NotFoundError: ...
    """
    choice, target = Choice(keep, **options), Path(out).expanduser()
    if target.is_dir():
        raise ConfigError(f"a mask is written to a file, but {target} is a folder; give {target / MASK_NAME}")
    tuned = open_weights(model)
    below = None if base is None else base_of(open_weights(base, "--base"), tuned)
    opened = fisher if isinstance(fisher, Fisher) else None
    if choice.takes_fisher and fisher is not None and opened is None:
        opened = load_fisher(fisher, tuned)  # type: ignore[arg-type]
    plan, sources = make_plan(choice, tuned, parts_on_disk(tuned)), Sources(tuned, below, opened)
    differs = sources.check(plan)
    if differs:
        _warn(f"the Fisher was made at other weights than {tuned.folder}: {differs}; make one at these", strict)
    about = plan.about() | {"weights_fingerprint": tuned.fingerprint}
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside,
        tqdm(total=PASSES * len(plan.sizes), desc="Selecting", unit="tensor", disable=not progress, delay=2) as bar,
    ):
        file = Path(beside) / MASK_NAME
        with MaskWriter(file, list(plan.shapes), about) as writer:
            layers = {name: writer.add(name, mask) for name, mask in masks(plan, sources, bar.update)}
        file.replace(target)
    return _selected(plan, layers, differs)


def _selected(plan: Plan, layers: dict[str, int], differs: str | None) -> Selected:
    heads, excluded = tuple(sorted(plan.heads)), tuple(sorted(plan.excluded))
    return Selected(plan.kept, plan.entries, layers, heads, excluded, differs)


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
    **options: Any,
) -> Written:
    """Write a model whose weights off a mask have their pre-trained values back, and its difference to the base.

    ``out`` then holds the model, with config and tokenizer of the trained one, and ``difference.safetensors``, which
    :func:`~.patching.apply_files` puts onto the base; a mask that is selected here lies beside as ``mask.safetensors``.

    Args:
        model: After training: a folder with ``model.safetensors`` or its shards, or a Hub id.
        base: The model that it was trained from.
        out: The folder to make; new or empty.
        mask: A mask of the model; or
        fisher: one is selected: as for :func:`select_files`.
        keep: The share of entries that is kept, in that case.
        difference_only: Write no model.
        strict: Refuse a mask or Fisher that was made at other weights; otherwise a warning says so.
        progress: Show a bar.
        options: Of the selection, the other fields of a :class:`~squisher_mergekit.applications.fish_mask.Choice`.

    Returns:
        The sizes of what was written.

    Raises:
        ConfigError: An option is out of range, or ``out`` is taken.
        MismatchError: The mask or the base is not of this model, or the base has no value for a weight off the mask.
        RefusedError: Something cannot be read. In all cases nothing is left at ``out``.

    Example:
        >>> reset_files("nowhere/at/all", "base", "out", mask="mask.safetensors")
        Traceback (most recent call last):
        squisher_mergekit.errors.NotFoundError: ...
    """
    target = Path(out).expanduser()
    if (mask is None) == (keep is None):
        raise ConfigError("either a mask or a share to keep must be given; give --mask, or --keep and --fisher")
    check_out(target)
    tuned = open_weights(model)
    below = base_of(open_weights(base, "--base"), tuned)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside:
        file, selected = Path(beside) / MASK_NAME, None
        if keep is not None:
            selected = select_files(model, fisher, file, keep, base=base, strict=strict, progress=progress, **options)
        chosen = read_mask(file if mask is None else mask)
        _check_made_at(chosen, tuned, strict)
        view = Reset(tuned, below, chosen)
        view.check()
        total = (1 if difference_only else 2) * len(tuned.infos)
        with tqdm(total=total, desc="Resetting", unit="tensor", disable=not progress, delay=2) as bar:
            _write(view, target, bar.update, difference_only, None if selected is None else file)
    size = sum(info.nbytes for info in tuned.infos.values())
    return Written((target / DIFFERENCE_NAME).stat().st_size, size, selected)


def _write(view: Reset, out: Path, advance: Callable[[], object], difference_only: bool, mask: Path | None) -> None:
    def place(folder: Path) -> None:
        about = About(
            text_of(view.tuned.folder / CONFIG),
            text_of(view.base.folder / CONFIG),
            fingerprint(folder),
            view.base.fingerprint,
            renamed(view.tuned.infos, open_weights(view.base.folder, "--base").infos),
        )
        write_difference(view, view.base, folder / DIFFERENCE_NAME, about, advance)
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
    """Return the text of a file; None if there is none."""
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _check_made_at(mask: Mask, tuned: Weights, strict: bool) -> None:
    differs = difference(mask.about.get("weights_fingerprint"), tuned.fingerprint)
    if differs:
        _warn(f"the mask {mask.location} was made at other weights than {tuned.folder}: {differs}", strict)


def _warn(message: str, strict: bool) -> None:
    if strict:
        raise MismatchError(f"{message}; or leave out --strict")
    LOG.warning(message)
