"""``squisher mask``: FISH masks, and models that differ from their base only inside a mask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from squisher_mergekit.cli.options import (
    FILE,
    HELP_OPTIONS,
    choice_option,
    combined,
    out_option,
    quiet_option,
    report_options,
    seed_option,
)
from squisher_mergekit.cli.tables import name_list, pairs

if TYPE_CHECKING:
    from squisher_mergekit.applications.fish_mask.files import MaskReport, ResetReport
    from squisher_mergekit.applications.fish_mask.recipe import ScoreName
    from squisher_mergekit.applications.selection import Scope

_SHOWN = 8
_NAME_WIDTH = 8


@click.group("mask", context_settings=HELP_OPTIONS)
def command() -> None:
    """Keep the few weights that matter most to a task (FISH mask), and reset all others to the base model.

    `select` writes a mask of the weights with the largest scores. `reset` writes the model with only those weights
    changed, and a small file with the difference to the base. `apply` adds the difference to the base, `remove` takes
    it off, both bit for bit. To train inside a mask, see squisher_mergekit.training.MaskedTraining and MaskCallback.

    \b
    Example:
        squisher mask select runs/movies --fisher runs/movies/checkpoint-500 --keep 0.005 -o mask.safetensors
        squisher mask reset runs/movies --base bert-base --mask mask.safetensors -o movies
        squisher mask apply bert-base --difference movies -o movies-again
    """


_selection_options = combined(
    click.option("--fisher", help="Fisher of MODEL, or a source that `squisher extract` reads."),
    choice_option(
        "--score",
        ["fisher", "reset", "movement", "random"],
        "F; (theta - theta_0)^2 F / 2; |theta - theta_0|; or random, the baseline. reset and movement need --base.",
        default="fisher",
    ),
    choice_option(
        "--scope",
        ["global", "layer"],
        "Keep the largest scores of all tensors, or the same share of each tensor.",
        default="global",
    ),
    click.option(
        "--head",
        multiple=True,
        metavar="REGEX",
        help="Keep each tensor whose name matches whole, in place of the model's own head; it counts towards the "
        "share. Repeatable.",
    ),
    click.option("--no-head", is_flag=True, help="Keep no tensor whole."),
    click.option(
        "--exclude",
        multiple=True,
        metavar="REGEX",
        help="Keep nothing of each tensor whose name matches; it does not count towards the share. Repeatable.",
    ),
    seed_option("Seed of --score random."),
    click.option("--strict", is_flag=True, help="Refuse a Fisher or mask that was made at other weights."),
    report_options,
)
_difference_options = combined(
    click.option("--difference", required=True, help="The file difference.safetensors, or its folder."),
    out_option(),
    click.option("--strict", is_flag=True, help="Refuse a model that differs where the difference changes nothing."),
    quiet_option,
)


def _head_patterns(head: tuple[str, ...], no_head: bool) -> tuple[str, ...] | None:
    """Return the patterns of the head, or None for the model's own head."""
    if head and no_head:
        raise click.UsageError("--head and --no-head exclude each other")
    return head if head or no_head else None


@command.command("select")
@click.argument("model")
@click.option("--keep", type=float, required=True, help="Share of the weights to keep, such as 0.005, head included.")
@click.option("--base", help="The model before training.")
@out_option("File to write; - is standard output.", FILE)
@_selection_options
def select_command(
    model: str,
    keep: float,
    base: str | None,
    out: Path,
    fisher: str | None,
    score: ScoreName,
    scope: Scope,
    head: tuple[str, ...],
    no_head: bool,
    exclude: tuple[str, ...],
    seed: int,
    strict: bool,
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Write the mask of the weights of MODEL with the largest scores, over all its tensors.

    The share counts all weights that are not excluded. The head (a classifier, but not the output layer of a language
    model) has no pre-trained value: the mask keeps it whole, as part of the share.

    \b
    Example:
        squisher mask select runs/movies --fisher runs/movies/checkpoint-500 --keep 0.005 -o mask.safetensors
    """
    from squisher_mergekit.applications.fish_mask.files import select_files
    from squisher_mergekit.cli.output import write_report

    selected = select_files(
        model,
        fisher,
        out,
        keep,
        base=base,
        strict=strict,
        progress=not quiet,
        score=score,
        scope=scope,
        head=_head_patterns(head, no_head),
        exclude=exclude,
        seed=seed,
    )
    for line in lines(selected):
        click.echo(line)
    request: dict[str, Any] = {
        "model": model,
        "fisher": fisher,
        "mask": str(out),
        "keep": keep,
        "base": base,
        "score": score,
    }
    request |= {"scope": scope, "exclude": exclude, "seed": seed, "strict": strict}
    write_report(json_file, request | selected.as_dict())


@command.command("reset")
@click.argument("model")
@click.option("--base", required=True, help="The model before training.")
@click.option("--mask", help="Mask of MODEL, from select; by default reset selects one.")
@click.option("--keep", type=float, help="Share of the weights to keep, without --mask.")
@out_option()
@click.option("--difference-only", is_flag=True, help="Write only the difference to the base, not the model.")
@_selection_options
def reset_command(
    model: str,
    base: str,
    mask: str | None,
    keep: float | None,
    out: Path,
    difference_only: bool,
    fisher: str | None,
    score: ScoreName,
    scope: Scope,
    head: tuple[str, ...],
    no_head: bool,
    exclude: tuple[str, ...],
    seed: int,
    strict: bool,
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Write MODEL with the weights outside a mask reset to their pre-trained values.

    OUT contains the model, for from_pretrained, and difference.safetensors: the changed weights with their values
    before and after. The mask comes from --mask, or from the options of `squisher mask select`.

    \b
    Example:
        squisher mask reset runs/movies --base bert-base --fisher runs/movies --keep 0.005 -o movies
    """
    from squisher_mergekit.applications.fish_mask.files import reset_files
    from squisher_mergekit.cli.output import write_report

    written = reset_files(
        model,
        base,
        out,
        mask=mask,
        fisher=fisher,
        keep=keep,
        difference_only=difference_only,
        strict=strict,
        progress=not quiet,
        score=score,
        scope=scope,
        head=_head_patterns(head, no_head),
        exclude=exclude,
        seed=seed,
    )
    if written.selected is not None:
        for line in lines(written.selected):
            click.echo(line)
    click.echo(size_line(written))
    request: dict[str, Any] = {
        "model": model,
        "base": base,
        "out": str(out),
        "mask": mask,
        "keep": keep,
        "fisher": fisher,
    }
    request |= {"difference_only": difference_only, "score": score, "scope": scope, "exclude": exclude}
    write_report(json_file, request | {"seed": seed, "strict": strict} | written.as_dict())


@command.command("apply")
@click.argument("base")
@_difference_options
def apply_command(base: str, difference: str, out: Path, strict: bool, quiet: bool) -> None:
    """Add a difference to BASE, which gives the model of reset, bit for bit.

    The command compares each value before its change with the value in BASE, and a sample of the unchanged bytes.

    \b
    Example:
        squisher mask apply bert-base --difference movies/difference.safetensors -o movies-again
    """
    from squisher_mergekit.applications.fish_mask.patching import apply_files

    apply_files(base, difference, out, strict=strict, progress=not quiet)


@command.command("remove")
@click.argument("model")
@_difference_options
def remove_command(model: str, difference: str, out: Path, strict: bool, quiet: bool) -> None:
    """Take a difference off MODEL, which gives its base, bit for bit.

    \b
    Example:
        squisher mask remove movies --difference movies/difference.safetensors -o bert-base-again
    """
    from squisher_mergekit.applications.fish_mask.patching import remove_files

    remove_files(model, difference, out, strict=strict, progress=not quiet)


def lines(selected: MaskReport) -> Iterator[str]:
    """Yield the number of kept weights, and the tensors with most of them."""
    rows = [
        ("kept", f"{selected.kept:,} of {selected.entries:,} weights ({selected.kept / selected.entries:.4%})"),
        *((label, name_list(names, _SHOWN)) for label, names in _named_groups(selected) if names),
    ]
    chosen = {name: count for name, count in selected.layers.items() if name not in selected.heads}
    most = sorted(chosen, key=lambda name: -chosen[name])[:_SHOWN]
    without = sum(count == 0 for name, count in chosen.items() if name not in selected.excluded)
    total = sum(chosen.values())
    rows.append(("chosen", f"{total:,} weights outside the head; {without} tensors have none; the largest numbers:"))
    yield from pairs(rows, _NAME_WIDTH)
    yield from (f"  {chosen[name]:>12,}  {name}" for name in most if chosen[name])


def _named_groups(selected: MaskReport) -> tuple[tuple[str, list[str]], tuple[str, list[str]]]:
    """Return the labels and names of the tensors that are kept whole or excluded."""
    return ("head", list(selected.heads)), ("excluded", list(selected.excluded))


def size_line(written: ResetReport) -> str:
    """Return the size of the difference relative to the model."""
    from squisher_mergekit.fisher.summary import human_bytes

    share = written.difference_bytes / max(written.model_bytes, 1)
    return (
        f"difference {human_bytes(written.difference_bytes)}, {share:.2%} of the model's "
        f"{human_bytes(written.model_bytes)}"
    )
