"""``squisher prune``: a copy of a model with its least important weights set to 0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from squisher_mergekit.cli.options import (
    HELP_OPTIONS,
    choice_option,
    out_option,
    report_options,
    scaling_option,
    seed_option,
    strict_option,
)
from squisher_mergekit.cli.tables import shape_text, table

if TYPE_CHECKING:
    from squisher_mergekit.applications.pruning.recipe import ScoreName
    from squisher_mergekit.applications.pruning.report import PruningReport
    from squisher_mergekit.applications.selection import Normalize, Scope
    from squisher_mergekit.fisher.config import Scaling


def _pattern(context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Parse ``n:m`` as two numbers."""
    if value is None:
        return None
    n, colon, m = value.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal()):
        raise click.BadParameter(f"{value!r} is not of the form 2:4")
    return int(n), int(m)


@click.command("prune", context_settings=HELP_OPTIONS)
@click.argument("model")
@out_option("Folder to create; new or empty.")
@click.option("--fisher", help="Fisher of MODEL, or a source that `squisher extract` reads; for --score fisher.")
@click.option("--sparsity", type=float, help="Share of the candidate entries that becomes 0, in [0, 1).")
@choice_option(
    "--score", ["fisher", "magnitude", "random"], "theta^2 F / 2, |theta|, or random numbers.", default="fisher"
)
@choice_option(
    "--normalize",
    ["none", "layer"],
    "none: compare the scores directly. layer: divide them by their mean over the tensor, so that small layers, whose "
    "weights have larger scores, lose as much as large ones.",
    default="none",
)
@choice_option(
    "--scope",
    ["global", "layer"],
    "global: remove the lowest scores of all tensors. layer: remove the same share of each tensor.",
    default="global",
)
@click.option(
    "--min-keep",
    type=float,
    help="Smallest share of each tensor to keep: theta^2 F differs by orders of magnitude between layers, so that a "
    "global choice would empty some. By default a third of the overall share; 0 for none.",
)
@click.option("--least", type=float, hidden=True)
@click.option(
    "--pattern",
    metavar="N:M",
    callback=_pattern,
    help="Instead of --sparsity: keep N of each M weights along the inputs.",
)
@click.option("--ignore", multiple=True, help="Name or regular expression of tensors to leave unchanged; repeatable.")
@click.option("--no-default-ignore", is_flag=True, help="Also prune embeddings, norms, biases and the output layer.")
@scaling_option("Scale of the Fisher; matters with --normalize none if tensors have different numbers of steps.")
@seed_option("Seed of --score random.")
@strict_option
@report_options
def command(
    model: str,
    out: Path,
    fisher: str | None,
    sparsity: float | None,
    score: ScoreName,
    normalize: Normalize,
    scope: Scope,
    min_keep: float | None,
    least: float | None,
    pattern: tuple[int, int] | None,
    ignore: tuple[str, ...],
    no_default_ignore: bool,
    scaling: Scaling,
    seed: int,
    strict: bool,
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Write a copy of MODEL, a folder or a Hub id, with its least important weights set to 0.

    The score of a weight is the growth of the loss without it, theta^2 F / 2. Embeddings, norms, biases and the output
    layer stay unchanged. OUT loads like MODEL. Its mask.safetensors, with a bit for each weight, keeps pruned weights 0
    in further training (MaskedTraining in Python). The sparsity is exact, over the candidate entries; the table shows
    the sparsity of each layer, and the last lines that of the whole model.

    \b
    Example:
        squisher prune runs/math/checkpoint-500 --fisher fishers/math --sparsity 0.5 -o pruned
        squisher prune runs/math/checkpoint-500 --fisher fishers/math --pattern 2:4 -o pruned-2-4
    """
    from squisher_mergekit.applications.pruning.files import prune_files
    from squisher_mergekit.cli.output import write_report

    if (sparsity is None) == (pattern is None):
        raise click.UsageError("give either --sparsity or --pattern")
    if least is not None:
        click.echo("--least is deprecated; use --min-keep", err=True)
        min_keep = least if min_keep is None else min_keep
    report = prune_files(
        model,
        fisher,
        out,
        sparsity,
        strict=strict,
        progress=not quiet,
        score=score,
        normalize=normalize,
        scope=scope,
        min_keep=min_keep,
        pattern=pattern,
        ignore=ignore,
        default_ignore=not no_default_ignore,
        scaling=scaling,
        seed=seed,
    )
    click.echo(f"{model} -> {out}")
    for line in lines(report):
        click.echo(line)
    write_report(json_file, {"model": model, "fisher": fisher, "out": str(out)} | report.as_dict())


def lines(report: PruningReport) -> Iterator[str]:
    """Yield a table of the pruned tensors, the totals, and the numbers of unchanged tensors."""
    from collections import Counter

    rows = [(row.name, shape_text(row.shape), f"{row.kept:,}", f"{row.sparsity:.2%}") for row in report.layers]
    total = report.over_all
    rows.append((total.name, "", f"{total.kept:,}", f"{total.sparsity:.2%}"))
    yield from table(("tensor", "shape", "kept", "sparsity"), rows)
    yield f"of the whole model, {report.entries:,} entries, {report.sparsity_of_model:.2%} were pruned"
    empty = [layer.name for layer in report.layers if not layer.kept]
    if empty:
        yield f"{len(empty)} layers have no weight left, {empty[0]} among them; see --min-keep"
    reasons = Counter(report.ignored.values())
    if reasons:
        yield "left alone: " + ", ".join(f"{count} ({why})" for why, count in reasons.items())
