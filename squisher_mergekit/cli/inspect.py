"""``squisher inspect``: what a Fisher holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from squisher_mergekit.fisher.summary import Summary

_PATH = click.Path(path_type=Path)


@click.command("inspect")
@click.argument("fisher")
@click.option("--model", type=_PATH, help="The weights, or their config.json, where FISHER does not hold them.")
@click.option("--base", type=_PATH, help="The model before training: for LoRA (config.json is enough), frozen layers.")
@click.option("--names", type=_PATH, help="Text file, one name a line: line i names the optimizer's parameter i.")
@click.option("--plot", type=_PATH, help="Write a histogram of log10 F for each kind of layer as PNG.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--json", "json_file", type=_PATH, help="Write the report to a file as well.")
def command(
    fisher: str,
    model: Path | None,
    base: Path | None,
    names: Path | None,
    plot: Path | None,
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Show what FISHER holds: its metadata, its coverage, and a table of its tensors.

    FISHER is a portable Fisher or whatever `squisher extract` reads. The table shows entries at the debiased scale,
    the mean squared gradient of a step; where steps or beta2 are not recorded, raw as stored. It says which.

    \b
    Example:
        squisher inspect fishers/math --plot math.png
    """
    import json
    from dataclasses import asdict

    from tqdm import tqdm

    from squisher_mergekit.cli.output import config_lines, size_of
    from squisher_mergekit.fisher.summary import known_scaling, summarize
    from squisher_mergekit.optimizers.load import load_fisher
    from squisher_mergekit.tensors.atomic import write_json, write_whole

    if plot is not None:
        from squisher_mergekit.cli.plots import histogram  # says at once if matplotlib is missing

    opened = load_fisher(fisher, model, base, names)
    bar = tqdm(list(opened), desc="Reading", unit="tensor", disable=quiet, delay=2)
    summary = summarize(opened, bar, known_scaling(opened))
    click.echo(fisher)
    for line in config_lines(opened.config, f"{len(opened)} tensors, {summary.entries:,} entries, {size_of(opened)}"):
        click.echo(line)
    for line in table(summary):
        click.echo(line)
    if plot is not None:
        write_whole(plot, histogram(summary, fisher))
    if json_file is not None:
        keys = ("entries", "zeros", "minimum", "median", "maximum", "mean")
        over_all = {key: getattr(summary, key) for key in keys}
        tensors = {row.name: asdict(row) for row in summary.rows}
        report = {"fisher": fisher, "config": json.loads(opened.config.to_json()), "scaling": summary.scaling}
        write_json(json_file, report | {"over_all": over_all, "tensors": tensors})


def table(summary: Summary) -> Iterator[str]:
    """Return the rows as aligned text: the scale, one tensor a line, and a last line over all."""
    width = max((len(row.name) for row in summary.rows), default=4)
    shapes = ["x".join(map(str, row.shape)) or "scalar" for row in summary.rows]
    space = max((len(shape) for shape in shapes), default=5)
    yield f"entries at the {summary.scaling} scale:"
    yield f"{'tensor':{width}}  {'shape':>{space}}  {'min':>9}  {'median':>9}  {'max':>9}  {'zeros':>7}"
    for row, shape in zip(summary.rows, shapes, strict=True):
        numbers = f"{row.minimum:9.2e}  {row.median:9.2e}  {row.maximum:9.2e}  {row.zeros:7.2%}"
        yield f"{row.name:{width}}  {shape:>{space}}  {numbers}"
    numbers = f"{summary.minimum:9.2e}  {summary.median:9.2e}  {summary.maximum:9.2e}  {summary.zeros:7.2%}"
    yield f"{'over all':{width}}  {'':{space}}  {numbers}"
