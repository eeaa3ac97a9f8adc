"""``squisher compare``: how two Fishers agree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from squisher_mergekit.fisher.compare import Agreement, Comparison
    from squisher_mergekit.fisher.config import Scaling

_PATH = click.Path(path_type=Path)
_SHOWN = 20


@click.command("compare")
@click.argument("a")
@click.argument("b")
@click.option("--model", type=_PATH, multiple=True, help="The weights, or their config.json; twice: of A, then of B.")
@click.option(
    "--scaling",
    type=click.Choice(["raw", "debiased", "per_example"]),
    help="The scale of both; debiased by default, or raw where one does not record what that needs.",
)
@click.option("--plot", type=_PATH, help="Write a picture of log10 F, B against A, as PNG.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--json", "json_file", type=_PATH, help="Write the report to a file as well.")
def command(
    a: str,
    b: str,
    model: tuple[Path, ...],
    scaling: Scaling | None,
    plot: Path | None,
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Show how the Fishers A and B agree, tensor by tensor and over all entries.

    A and B are portable Fishers or whatever `squisher extract` reads, of one architecture. The table shows the rank
    correlation (Spearman's, ties at their average rank), the correlation of log F over entries that are positive in
    both, the mean of A over the mean of B, and the shares of zeros. Tensors that one alone has are listed.

    \b
    Example:
        squisher compare fishers/math fishers/code --plot math-code.png
    """
    from tqdm import tqdm

    from squisher_mergekit.fisher import compare as comparing
    from squisher_mergekit.optimizers.load import load_fisher
    from squisher_mergekit.tensors.atomic import write_json, write_whole

    if len(model) > 2:
        raise click.UsageError(f"--model is given once for both Fishers or once for each, not {len(model)} times")
    if plot is not None:
        from squisher_mergekit.cli.plots import scatter  # says at once if matplotlib is missing

    models = model if len(model) == 2 else (model * 2 or (None, None))
    first, second = load_fisher(a, models[0]), load_fisher(b, models[1])
    bar = tqdm(comparing.common(first, second), desc="Comparing", unit="tensor", disable=quiet, delay=2)
    result = comparing.compare(first, second, bar, scaling or comparing.common_scaling(first, second))
    click.echo(f"A  {a}\nB  {b}")
    for line in table(result):
        click.echo(line)
    if plot is not None:
        write_whole(plot, scatter(result, a, b))
    if json_file is not None:
        write_json(json_file, {"a": a, "b": b} | as_dict(result))


def table(result: Comparison) -> Iterator[str]:
    """Return the comparison as aligned text: one tensor a line, a line over all, and what one alone has."""
    width = max(8, *(len(row.name) for row in result.rows))
    shapes = ["x".join(map(str, row.shape)) or "scalar" for row in result.rows]
    space = max(5, *(len(shape) for shape in shapes))
    heads = ("rank corr", "log corr", "mean A/B", "zeros A", "zeros B")
    yield f"entries at the {result.scaling} scale:"
    yield f"{'tensor':{width}}  {'shape':>{space}}  " + "  ".join(f"{head:>9}" for head in heads)
    for row, shape in zip(result.rows, shapes, strict=True):
        yield f"{row.name:{width}}  {shape:>{space}}  {_numbers(row)}"
    yield f"{'over all':{width}}  {'':{space}}  {_numbers(result.over_all)}"
    if result.sample < result.over_all.entries:
        yield (
            f"the rank correlation over all is of a sample: {result.sample:,} of {result.over_all.entries:,} entries, "
            "drawn evenly over the tensors with a fixed seed; all else is exact"
        )
    for label, names in (("A", result.only_a), ("B", result.only_b)):
        if names:
            yield f"only in {label}: {len(names)} tensors"
            yield from (f"  {name}" for name in names[:_SHOWN])
            if len(names) > _SHOWN:
                yield f"  and {len(names) - _SHOWN} more (--json FILE has all)"


def as_dict(result: Comparison) -> dict[str, object]:
    """Return the comparison as JSON takes it."""
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


def _numbers(agreement: Agreement) -> str:
    cells = (
        *("-" if value is None else f"{value:.4f}" for value in (agreement.spearman, agreement.log_correlation)),
        "-" if agreement.ratio is None else f"{agreement.ratio:.3g}",
        f"{agreement.zeros_a:.2%}",
        f"{agreement.zeros_b:.2%}",
    )
    return "  ".join(f"{cell:>9}" for cell in cells)
