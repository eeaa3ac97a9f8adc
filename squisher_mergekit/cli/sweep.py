"""``squisher sweep``: merges over a grid of parameters, scored by the user's own command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from squisher_mergekit.cli.options import HELP_OPTIONS, out_option, strict_option
from squisher_mergekit.cli.output import each_warning_once, progress_bar, write_picture
from squisher_mergekit.errors import ConfigError, NotFoundError, RefusedError
from squisher_mergekit.merging.mergekit.commands import help_class, merge_options

PICTURE = "sweep.png"


@click.command("sweep", cls=help_class(), context_settings=HELP_OPTIONS)
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("more", nargs=-1, metavar="[NAME=VALUES...]")
@click.option(
    "--grid", "axes", multiple=True, required=True, metavar="NAME=VALUES...", help="Parameters and their values."
)
@click.option(
    "--eval", "evaluation", required=True, help="Command that prints a score as its last number; {model} is the folder."
)
@out_option("Folder of the table, the picture and the best model; an interrupted sweep continues there.")
@click.option("--lower", is_flag=True, help="The lowest score is the best, as for a loss.")
@click.option("--keep-all", is_flag=True, help="Keep all models, not the best alone.")
@strict_option
@merge_options
@each_warning_once()
def command(
    config: Path,
    more: tuple[str, ...],
    axes: tuple[str, ...],
    evaluation: str,
    out: Path,
    lower: bool,
    keep_all: bool,
    strict: bool,
    merge_options: Any,
) -> None:
    """Merge the models in CONFIG at each point of a grid, score each merge by a command, and keep the best.

    The command of --eval is yours: it gets the folder of a merged model in the place of {model}, and the last number on
    its standard output is the score. Score on validation data: the best of several points looks better on the data that
    chose it than on any other. Test the best model once, on data that no choice has seen.

    OUT has sweep.csv (a line for each point), sweep.png (with matplotlib), and the best model in best, or all in models
    with --keep-all. The models are merged one after another with the same open Fishers.

    \b
    Example:
        squisher sweep merge.yml --grid lambda=1,1.5 normalize=none,mean --eval 'python score.py {model}' -o sweep
    """
    from squisher_mergekit.merging.mergekit.commands import (
        input_paths,
        read_config,
        read_document,
        run_config,
    )
    from squisher_mergekit.merging.sources import FisherSources
    from squisher_mergekit.recipes.grid import check_grid, label, parse_grid, points, with_point
    from squisher_mergekit.recipes.sweep import Sweep, command_score, identity, inputs_of
    from squisher_mergekit.tensors.input_files import read_text

    if "{model}" not in evaluation:
        raise ConfigError("--eval must name the folder of the model as {model}, but does not; add it")
    grid = parse_grid((*axes, *more))
    merge_options.apply_global_options()
    given = read_text(config)
    document = read_document(given)
    read_config(given)
    check_grid(document["merge_method"], grid)
    every = list(points(grid))
    texts = {label(point): _yaml(with_point(document, point)) for point in every}
    for text in texts.values():
        read_config(text)
    inputs = inputs_of(input_paths(read_config(given), grid.get("fisher", ())))
    sweep = Sweep(out, every, identity(document, grid, evaluation, not lower), not lower, keep_all, inputs)
    sweep.resume()
    sources = FisherSources()
    each = merge_options.model_copy(update={"quiet": True})  # the sweep has one bar, and a line for each point
    merged = ""

    def merge(point: Mapping[str, Any], folder: Path) -> None:
        nonlocal merged
        merged = label(point)
        run_config(read_config(texts[merged]), texts[merged], folder, each, strict=strict, sources=sources)

    def score(model: Path) -> float:
        found = command_score(evaluation, model)
        if not merge_options.quiet:
            click.echo(f"{merged.replace(',', ', ')}: score {found:g}")
        return found

    try:
        _plan({name: text for name, text in texts.items() if name not in sweep.scores}, merge_options, strict, sources)
        sweep.run(merge, score, lambda items: progress_bar(items, "sweep", merge_options.quiet, unit="merge"))
    finally:
        sources.close()
        if sweep.scores:
            _draw(sweep, out, lower)
    best = sweep.best
    assert best is not None
    click.echo(f"best of {len(every)}: {best.replace(',', ', ')}, score {sweep.scores[best]:g}, in {sweep.place(best)}")


def _plan(texts: Mapping[str, str], merge_options: Any, strict: bool, sources: Any) -> None:
    """Plan the merge of every point.

    Raises:
        RefusedError: A plan refuses its point, which the message names.
    """
    from squisher_mergekit.merging.mergekit.commands import plan_config, read_config

    options = {key: value for key, value in merge_options if key != "quiet"}
    for name in progress_bar(texts, "plan", merge_options.quiet, unit="point"):
        try:
            plan_config(read_config(texts[name]), strict=strict, sources=sources, **options)
        except RefusedError as error:
            raise type(error)(f"the point {name.replace(',', ', ')}: {error.message}") from error


def _draw(sweep: Any, out: Path, lower: bool) -> None:
    """Write the picture, if matplotlib is installed."""
    try:
        from squisher_mergekit.cli.plots import sweep_scores
    except NotFoundError as error:
        click.echo(f"no {PICTURE}: {error.message}", err=True)
        return
    write_picture(out / PICTURE, sweep_scores(sweep.scores, sweep.best, lower))


def _yaml(document: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)
