"""``squisher inspect``: metadata and statistics of a Fisher."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from squisher_mergekit.cli.options import HELP_OPTIONS, naming_options, plot_option, report_options
from squisher_mergekit.cli.tables import shape_text, table

if TYPE_CHECKING:
    from squisher_mergekit.fisher.summary import Summary, TensorSummary
    from squisher_mergekit.tensors.safetensors import TensorInfo

_HEAD = ("tensor", "shape", "min", "median", "max", "zeros")


@click.command("inspect", context_settings=HELP_OPTIONS)
@click.argument("fisher")
@naming_options
@click.option("--headers", is_flag=True, help="Read no tensor: show metadata, coverage and shapes alone.")
@plot_option("Write a histogram of log10 F for each kind of layer, as PNG.")
@report_options
def command(
    fisher: str,
    model: Path | None,
    base: Path | None,
    names: Path | None,
    headers: bool,
    plot: Path | None,
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Show the metadata, the coverage and a table of the tensors of FISHER.

    FISHER is a portable Fisher, or a source that `squisher extract` reads. The table names its scale: debiased, the
    mean squared gradient of a step; or raw, if the metadata lack the steps or beta2. Of a large optimizer state,
    --headers shows format, steps, optimizer, coverage and sizes at once.

    \b
    Example:
        squisher inspect fishers/math --plot math.png
    """
    import json
    import math
    from dataclasses import asdict

    from squisher_mergekit.cli.output import (
        config_lines,
        factors_text,
        progress_bar,
        size_of,
        write_picture,
        write_report,
    )
    from squisher_mergekit.fisher.summary import known_scaling, summarize
    from squisher_mergekit.optimizers.load import load_fisher

    if plot is not None:
        from squisher_mergekit.cli.plots import histogram  # refuses before any work if matplotlib is missing

    opened = load_fisher(fisher, model, base, names)
    if headers and plot is not None:
        raise click.UsageError("--plot needs the entries of the tensors, which --headers leaves unread")
    summary = None if headers else summarize(opened, progress_bar(opened, "Reading", quiet), known_scaling(opened))
    click.echo(fisher)
    entries = sum(math.prod(opened.info(name).shape) for name in opened)
    size = f"{len(opened)} tensors, {entries:,} entries, {size_of(opened)}"
    for line in config_lines(opened.config, size, factors_text(opened)):
        click.echo(line)
    report = {"fisher": fisher, "config": json.loads(opened.config.to_json())}
    if summary is None:
        rows = {name: opened.info(name) for name in opened}
        for line in table(("tensor", "shape", "dtype"), [(n, shape_text(i.shape), _dtype(i)) for n, i in rows.items()]):
            click.echo(line)
        shapes = {name: {"shape": list(info.shape), "bytes": info.nbytes} for name, info in rows.items()}
        write_report(json_file, report | {"tensors": shapes})
        return
    for line in lines(summary):
        click.echo(line)
    if plot is not None:
        write_picture(plot, histogram(summary, fisher))
    keys = ("entries", "zeros", "minimum", "median", "maximum", "mean")
    over_all = {key: getattr(summary, key) for key in keys}
    tensors = {row.name: asdict(row) for row in summary.rows}
    write_report(json_file, report | {"scaling": summary.scaling, "over_all": over_all, "tensors": tensors})


def lines(summary: Summary) -> Iterator[str]:
    """Yield the scale, and a table with a row for each tensor and a last row over all."""
    rows = [(row.name, shape_text(row.shape), *_cells(row)) for row in summary.rows]
    yield f"entries at the {summary.scaling} scale:"
    yield from table(_HEAD, [*rows, ("over all", "", *_cells(summary))])


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _cells(row: Summary | TensorSummary) -> tuple[str, ...]:
    """Return the numbers of a row, as text."""
    return (f"{row.minimum:.2e}", f"{row.median:.2e}", f"{row.maximum:.2e}", f"{row.zeros:.2%}")
