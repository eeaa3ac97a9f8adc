"""``squisher prune``: a copy of a model whose least important weights are 0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from squisher_mergekit.applications.pruning.report import Report

_PATH = click.Path(path_type=Path)


def _pattern(context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Read ``n:m`` as two numbers."""
    if value is None:
        return None
    n, colon, m = value.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal()):
        raise click.BadParameter(f"{value!r} is not of the form 2:4")
    return int(n), int(m)


@click.command("prune")
@click.argument("model")
@click.option("-o", "--out", type=_PATH, required=True, help="The folder to make; new or empty.")
@click.option("--fisher", help="A Fisher of MODEL, or what `squisher extract` reads. Not needed by the other scores.")
@click.option("--sparsity", type=float, help="Share, in [0, 1), of the entries chosen from that becomes 0.")
@click.option(
    "--score",
    type=click.Choice(["fisher", "magnitude", "random"]),
    default="fisher",
    show_default=True,
    help="theta^2 F / 2, |theta|, or drawn evenly.",
)
@click.option(
    "--normalize",
    type=click.Choice(["none", "layer"]),
    default="none",
    show_default=True,
    help="none: compare scores as they are. layer: divide them by their mean over the tensor; a small layer, of which "
    "every weight matters more, then loses as much as a large one.",
)
@click.option(
    "--scope",
    type=click.Choice(["global", "layer"]),
    default="global",
    show_default=True,
    help="global: the lowest scores of all tensors go. layer: of each tensor the same share.",
)
@click.option(
    "--least",
    type=float,
    help="Keep at least this share of each tensor: theta^2 F differs by orders of magnitude between layers, a global "
    "choice would empty some. By default a third of the share that is kept over all; 0 for none.",
)
@click.option(
    "--pattern",
    metavar="N:M",
    callback=_pattern,
    help="In place of --sparsity: keep N of each M weights along the inputs.",
)
@click.option("--ignore", multiple=True, help="A name, or a regular expression, of tensors to leave alone; repeatable.")
@click.option("--no-default-ignore", is_flag=True, help="Prune embeddings, norms, biases and the output layer as well.")
@click.option(
    "--scaling",
    type=click.Choice(["raw", "debiased", "per_example"]),
    default="debiased",
    show_default=True,
    help="Of the Fisher; matters with --normalize none where tensors have seen different numbers of steps.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of --score random.")
@click.option("--strict", is_flag=True, help="Refuse a Fisher that was made at other weights.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--json", "json_file", type=_PATH, help="Write the report to a file as well.")
def command(
    model: str,
    out: Path,
    fisher: str | None,
    sparsity: float | None,
    score: str,
    normalize: str,
    scope: str,
    least: float | None,
    pattern: tuple[int, int] | None,
    ignore: tuple[str, ...],
    no_default_ignore: bool,
    scaling: str,
    seed: int,
    strict: bool,
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Write a copy of MODEL, a folder or a Hub id, in which the weights that matter least are 0.

    A weight's score is by how much the loss would grow without it, theta^2 F / 2. Embeddings, norms, biases and the
    output layer are left alone. OUT loads as MODEL does, and holds mask.safetensors as well, a bit for each weight: it
    keeps pruned weights 0 in further training (MaskedTraining in Python). The sparsity is counted over the entries
    chosen from, exactly; the table shows that of each layer, and that of the whole model below.

    \b
    Example:
        squisher prune runs/math/checkpoint-500 --fisher fishers/math --sparsity 0.5 -o pruned
        squisher prune runs/math/checkpoint-500 --fisher fishers/math --pattern 2:4 -o pruned-2-4
    """
    from squisher_mergekit.applications.pruning.files import prune_files
    from squisher_mergekit.tensors.atomic import write_json

    if (sparsity is None) == (pattern is None):
        raise click.UsageError("give either --sparsity or --pattern")
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
        least=least,
        pattern=pattern,
        ignore=ignore,
        default_ignore=not no_default_ignore,
        scaling=scaling,
        seed=seed,
    )
    click.echo(f"{model} -> {out}")
    for line in table(report):
        click.echo(line)
    if json_file is not None:
        write_json(json_file, {"model": model, "fisher": fisher, "out": str(out)} | report.as_dict())


def table(report: Report) -> Iterator[str]:
    """Return the report as aligned text: one tensor a line, then sums, then what was left alone."""
    from collections import Counter

    rows = [*report.layers, report.over_all]
    shapes = ["x".join(map(str, row.shape)) for row in report.layers] + [""]
    width, space = (max(map(len, texts)) for texts in ([row.name for row in rows], ["shape", *shapes]))
    yield f"{'tensor':{width}}  {'shape':>{space}}  {'kept':>14}  sparsity"
    for row, shape in zip(rows, shapes, strict=True):
        yield f"{row.name:{width}}  {shape:>{space}}  {row.kept:>14,}  {row.sparsity:>8.2%}"
    yield f"of the whole model, {report.entries:,} entries, {report.sparsity_of_model:.2%} were pruned"
    empty = [layer.name for layer in report.layers if not layer.kept]
    if empty:
        yield f"{len(empty)} layers have no weight left, {empty[0]} among them; see --least"
    reasons = Counter(report.ignored.values())
    if reasons:
        yield "left alone: " + ", ".join(f"{count} ({why})" for why, count in reasons.items())
