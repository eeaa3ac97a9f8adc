"""``squisher merge``: mergekit's own merge, with a check before and a report after it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from squisher_mergekit.cli.options import (
    FOLDER,
    HELP_OPTIONS,
    allow_missing_option,
    json_option,
    plot_option,
    report_option,
    strict_option,
)
from squisher_mergekit.cli.output import write_page, write_picture, write_report
from squisher_mergekit.errors import ConfigError
from squisher_mergekit.merging.mergekit.commands import (
    help_class,
    merge_options,
    read_config,
    run_as_adapter,
    run_config,
)
from squisher_mergekit.merging.reports.card import add_picture, public_name
from squisher_mergekit.merging.reports.page import page
from squisher_mergekit.merging.reports.text import report_text
from squisher_mergekit.tensors.atomic import written_beside
from squisher_mergekit.tensors.folder_moves import is_new
from squisher_mergekit.tensors.input_files import read_text


@click.command("merge", cls=help_class(), context_settings=HELP_OPTIONS)
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=FOLDER)
@strict_option
@allow_missing_option
@report_option
@plot_option(
    "Draw the merge as PNG: the share of each model by layer and kind of matrix; the merged step (structure:)."
)
@json_option
@click.option(
    "--as-adapter", is_flag=True, help="Of LoRAs of one base: write the merge as an adapter of peft, not a full model."
)
@click.option(
    "--rank", type=click.IntRange(min=1), help="Rank of that adapter.  [default: the sum of the ranks of the LoRAs]"
)
@merge_options
def command(
    config: Path,
    out: Path,
    strict: bool,
    allow_missing: bool,
    report_file: Path | None,
    plot: Path | None,
    json_file: Path | None,
    as_adapter: bool,
    rank: int | None,
    merge_options: Any,
) -> None:
    """Merge the models in CONFIG into the folder OUT, and print a report.

    mergekit does the merge, with all its options. OUT appears only when all of it is written. The report gives the
    share of entries without signal in any model and the effective weight of each model, overall and per kind of layer.
    The model card gets a section on the source of each Fisher, and with --plot a picture. With a `structure`, the
    report also gives the share of each model in the merged step, the conflict of the models, and the effective rank of
    the factors, overall, per layer and per tensor. With --as-adapter, it gives the share of the energy of the change
    that the rank discards, and the tensor that loses most. --report writes the report as one HTML file, with heat maps
    by layer and a table of all tensors.

    \b
    Example:
        squisher merge merge.yml merged --report report.html
        squisher merge lora.yml merged-lora --as-adapter --rank 16
    """
    if not is_new(out):
        raise ConfigError(f"OUT must be a new or an empty folder, but {out} is not; choose another or remove it")
    if rank is not None and not as_adapter:
        raise ConfigError("--rank needs --as-adapter, but the merge is written as a full model; leave one of them out")
    reported = any(file is not None for file in (json_file, plot, report_file)) or not merge_options.quiet
    merge_options.apply_global_options()
    text = read_text(config)
    parsed = read_config(text)
    if plot is not None:
        import squisher_mergekit.cli.plots  # noqa: F401  # refuses before any work without matplotlib
    accepted: dict[str, Any] = {"strict": strict, "allow_missing": allow_missing}
    adapter: dict[str, Any] = {}
    with written_beside(out.absolute()) as folder:
        if as_adapter:
            run, adapter["adapter"] = run_as_adapter(parsed, text, folder, merge_options, rank, **accepted)
        else:
            run = run_config(parsed, text, folder, merge_options, **accepted, reported=reported)
        report = run.report() | adapter
        if plot is not None:  # a card is public, so its picture has no local path
            add_picture(folder, _picture(report, out.absolute().name, public_name), _meaning(report))
    if not merge_options.quiet:
        click.echo(report_text(report))
    if plot is not None:
        write_picture(plot, _picture(report, str(config)))
    if report_file is not None:
        write_page(report_file, page(run.preview or {}, text, f"Merge of {config.name}", report))
    write_report(json_file, {**report, "plan": run.preview})


def _picture(report: dict[str, Any], title: str, shown: Callable[[str], str] = str) -> bytes:
    """Return the picture of a merge: the merged step of coupled matrices, or else the shares."""
    from squisher_mergekit.cli.plots import heat_maps, merged_steps

    # With one model, no tensor is coupled.
    if "structure" in report:
        return merged_steps(report["structure"], title, shown)
    return heat_maps(report, title, shown)


def _meaning(report: dict[str, Any]) -> str:
    """Return the description of the picture."""
    if "structure" in report:
        return "Share of each model in the merged step, and conflict of the models, by layer"
    return "Share of each model in the merge, by layer and kind of matrix"
