"""``squisher mask``: the few weights that a task needs, and a model in which only those differ from its base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from squisher_mergekit.applications.fish_mask.files import Selected, Written

_PATH = click.Path(path_type=Path)
_SHOWN = 8


@click.group("mask")
def command() -> None:
    """Keep the few weights that a task needs (FISH mask), and give all others their pre-trained values back.

    `select` writes a mask of the weights with the largest scores. `reset` writes the model with nothing but those
    changed, and its difference to the base, a small file; `apply` puts that onto the base, `remove` takes it off, both
    to the bit. To train inside a mask, see squisher_mergekit.training.MaskedTraining and MaskCallback.

    \b
    Example:
        squisher mask select runs/movies --fisher runs/movies/checkpoint-500 --keep 0.005 -o mask.safetensors
        squisher mask reset runs/movies --base bert-base --mask mask.safetensors -o movies
        squisher mask apply bert-base --difference movies -o movies-again
    """


def _choice_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a selection."""
    options = (
        click.option("--fisher", help="A Fisher of MODEL, or whatever `squisher extract` reads."),
        click.option(
            "--score",
            type=click.Choice(["fisher", "reset", "movement", "random"]),
            default="fisher",
            show_default=True,
            help="F; (theta - theta_0)^2 F / 2; |theta - theta_0|; or drawn, the baseline. Two need --base.",
        ),
        click.option(
            "--scope",
            type=click.Choice(["global", "layer"]),
            default="global",
            show_default=True,
            help="The largest scores of all tensors, or of each tensor the same share.",
        ),
        click.option(
            "--head",
            multiple=True,
            metavar="REGEX",
            help="Keep tensors whole in whose names this is found, in place of the model's own head; they count.",
        ),
        click.option("--no-head", is_flag=True, help="Keep no tensor whole."),
        click.option(
            "--exclude",
            multiple=True,
            metavar="REGEX",
            help="Keep nothing of tensors in whose names this is found; they do not count.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of --score random."),
        click.option("--strict", is_flag=True, help="A Fisher or mask made at other weights is an error."),
        click.option("--quiet", is_flag=True, help="No progress bar."),
        click.option("--json", "json_file", type=_PATH, help="Write the report to a file as well."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _patterns(head: tuple[str, ...], no_head: bool) -> tuple[str, ...] | None:
    if head and no_head:
        raise click.UsageError("--head and --no-head exclude each other")
    return head if head or no_head else None


@command.command("select")
@click.argument("model")
@click.option("--keep", type=float, required=True, help="The share of weights to keep, such as 0.005; with the head.")
@click.option("--base", help="The model that MODEL was trained from.")
@click.option("-o", "--out", type=_PATH, required=True, help="The file to write.")
@_choice_options
def select_command(
    model: str, out: Path, head: tuple[str, ...], no_head: bool, quiet: bool, json_file: Path | None, **options: Any
) -> None:
    """Write the mask of the weights of MODEL with the largest scores, over all its tensors.

    The share counts all weights but excluded ones. The head (a classifier; not the output layer of a language model)
    has no pre-trained value: it is kept whole and is part of the share.

    \b
    Example:
        squisher mask select runs/movies --fisher runs/movies/checkpoint-500 --keep 0.005 -o mask.safetensors
    """
    from squisher_mergekit.applications.fish_mask.files import select_files
    from squisher_mergekit.tensors.atomic import write_json

    fisher = options.pop("fisher")
    selected = select_files(model, fisher, out, head=_patterns(head, no_head), progress=not quiet, **options)
    for line in lines(selected):
        click.echo(line)
    if json_file is not None:
        write_json(json_file, {"model": model, "fisher": fisher, "mask": str(out)} | options | selected.as_dict())


@command.command("reset")
@click.argument("model")
@click.option("--base", required=True, help="The model that MODEL was trained from.")
@click.option("--mask", help="A mask of MODEL, such as select writes; without it one is selected.")
@click.option("--keep", type=float, help="The share of weights to keep, where there is no --mask.")
@click.option("-o", "--out", type=_PATH, required=True, help="The folder to make.")
@click.option("--difference-only", is_flag=True, help="Write no model, only its difference to the base.")
@_choice_options
def reset_command(
    model: str, out: Path, head: tuple[str, ...], no_head: bool, quiet: bool, json_file: Path | None, **options: Any
) -> None:
    """Write MODEL with the weights off a mask back at their pre-trained values.

    OUT holds the model as from_pretrained loads it, and difference.safetensors: what changed, with the values before
    and after. The mask is given, or selected by the options of `squisher mask select`.

    \b
    Example:
        squisher mask reset runs/movies --base bert-base --fisher runs/movies --keep 0.005 -o movies
    """
    from squisher_mergekit.applications.fish_mask.files import reset_files
    from squisher_mergekit.tensors.atomic import write_json

    base = options.pop("base")
    written = reset_files(model, base, out, head=_patterns(head, no_head), progress=not quiet, **options)
    if written.selected is not None:
        for line in lines(written.selected):
            click.echo(line)
    click.echo(size_line(written))
    if json_file is not None:
        write_json(json_file, {"model": model, "base": base, "out": str(out)} | options | written.as_dict())


def _patch_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of what puts a difference on or takes it off."""
    options = (
        click.option("--difference", required=True, help="difference.safetensors, or a folder with it."),
        click.option("-o", "--out", type=_PATH, required=True, help="The folder to make."),
        click.option("--strict", is_flag=True, help="A model that differs where nothing changes is an error."),
        click.option("--quiet", is_flag=True, help="No progress bar."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@command.command("apply")
@click.argument("base")
@_patch_options
def apply_command(base: str, difference: str, out: Path, strict: bool, quiet: bool) -> None:
    """Put a difference onto BASE: the model that reset wrote, to the bit.

    Each value that changes is compared with the one that the base had. Where nothing changes, a sample of the bytes
    tells whether it is the same base.

    \b
    Example:
        squisher mask apply bert-base --difference movies/difference.safetensors -o movies-again
    """
    from squisher_mergekit.applications.fish_mask.patching import apply_files

    apply_files(base, difference, out, strict=strict, progress=not quiet)


@command.command("remove")
@click.argument("model")
@_patch_options
def remove_command(model: str, difference: str, out: Path, strict: bool, quiet: bool) -> None:
    """Take a difference off MODEL again: its base, to the bit.

    \b
    Example:
        squisher mask remove movies --difference movies/difference.safetensors -o bert-base-again
    """
    from squisher_mergekit.applications.fish_mask.patching import remove_files

    remove_files(model, difference, out, strict=strict, progress=not quiet)


def lines(selected: Selected) -> Iterator[str]:
    """Say how much is kept, and where most of it lies."""
    share = selected.kept / selected.entries
    yield f"kept      {selected.kept:,} of {selected.entries:,} weights ({share:.4%})"
    for label, names in (("head", selected.heads), ("excluded", selected.excluded)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield f"{label:9} {', '.join(names[:_SHOWN])}{more}"
    chosen = {name: count for name, count in selected.layers.items() if name not in selected.heads}
    most = sorted(chosen, key=lambda name: -chosen[name])[:_SHOWN]
    without = sum(count == 0 for name, count in chosen.items() if name not in selected.excluded)
    yield f"chosen    {sum(chosen.values()):,} weights beside the head; {without} tensors have none; most are in"
    yield from (f"  {chosen[name]:>12,}  {name}" for name in most if chosen[name])


def size_line(written: Written) -> str:
    """Say how large the difference is, beside the model."""
    from squisher_mergekit.fisher.summary import human_bytes

    share = written.difference_bytes / max(written.model_bytes, 1)
    return (
        f"difference {human_bytes(written.difference_bytes)}, {share:.2%} of the model's "
        f"{human_bytes(written.model_bytes)}"
    )
