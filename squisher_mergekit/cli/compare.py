"""``squisher compare``: the agreement of two Fishers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from squisher_mergekit.cli.options import HELP_OPTIONS, models_option, plot_option, report_options, scaling_option
from squisher_mergekit.cli.tables import name_lines, shape_text, table

if TYPE_CHECKING:
    from squisher_mergekit.fisher.compare import Agreement, Comparison
    from squisher_mergekit.fisher.config import Scaling

_SHOWN = 20
_HEAD = ("tensor", "shape", "rank corr", "log corr", "mean A/B", "zeros A", "zeros B")


@click.command("compare", context_settings=HELP_OPTIONS)
@click.argument("a")
@click.argument("b")
@models_option
@scaling_option("Scale of both; by default debiased, or raw if the metadata of one do not allow it.", default=None)
@plot_option("Write a scatter plot of log10 F, B against A, as PNG.")
@report_options
def command(
    a: str,
    b: str,
    model: tuple[Path, ...],
    scaling: Scaling | None,
    plot: Path | None,
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Show the agreement of the Fishers A and B, per tensor and over all entries.

    A and B are portable Fishers, or sources that `squisher extract` reads, of one architecture. The table shows
    Spearman's rank correlation, the correlation of log F over the entries that are positive in both, the mean of A over
    the mean of B, and the shares of zeros. A list names the tensors that only one of them has.

    \b
    Example:
        squisher compare fishers/math fishers/code --plot math-code.png
    """
    from squisher_mergekit.cli.output import progress_bar, write_picture, write_report
    from squisher_mergekit.fisher import compare as comparing
    from squisher_mergekit.optimizers.load import load_fisher

    if len(model) > 2:
        raise click.UsageError(f"--model is given once for both Fishers or once for each, not {len(model)} times")
    if plot is not None:
        from squisher_mergekit.cli.plots import scatter  # refuses before any work if matplotlib is missing

    models = model if len(model) == 2 else (model * 2 or (None, None))
    first, second = load_fisher(a, models[0]), load_fisher(b, models[1])
    bar = progress_bar(comparing.common(first, second), "Comparing", quiet)
    result = comparing.compare(first, second, bar, scaling or comparing.common_scaling(first, second))
    click.echo(f"A  {a}\nB  {b}")
    for line in lines(result):
        click.echo(line)
    if plot is not None:
        write_picture(plot, scatter(result, a, b))
    write_report(json_file, {"a": a, "b": b} | as_dict(result))


def lines(result: Comparison) -> Iterator[str]:
    """Yield the comparison as a table, followed by the names of the tensors that only one Fisher has."""
    rows = [(row.name, shape_text(row.shape), *_cells(row)) for row in result.rows]
    yield f"entries at the {result.scaling} scale:"
    yield from table(_HEAD, [*rows, ("over all", "", *_cells(result.over_all))])
    if result.sample < result.over_all.entries:
        yield (
            f"the rank correlation over all is that of a sample: {result.sample:,} of {result.over_all.entries:,} "
            "entries, drawn evenly over the tensors with a fixed seed; all other numbers are exact"
        )
    for label, names in (("A", result.only_a), ("B", result.only_b)):
        if names:
            yield f"only in {label}: {len(names)} tensors"
            yield from name_lines(names, _SHOWN, "  ", "listed by --json FILE")


def as_dict(result: Comparison) -> dict[str, object]:
    """Return the comparison as JSON data."""
    from dataclasses import asdict

    keys = ("a alone", "b alone", "both")
    return {
        "scaling": result.scaling,
        "over_all": asdict(result.over_all),
        "sample": result.sample,
        "zeros": dict(zip(keys, result.zeros, strict=True)),
        "tensors": {row.name: asdict(row) for row in result.rows},
        "only_a": list(result.only_a),
        "only_b": list(result.only_b),
    }


def _cells(agreement: Agreement) -> tuple[str, ...]:
    """Return the numbers of a row, as text."""
    return (
        *("-" if value is None else f"{value:.4f}" for value in (agreement.spearman, agreement.log_correlation)),
        "-" if agreement.ratio is None else f"{agreement.ratio:.3g}",
        f"{agreement.zeros_a:.2%}",
        f"{agreement.zeros_b:.2%}",
    )
