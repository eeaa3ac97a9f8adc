"""``squisher merge``: mergekit's own merge between a strict check and a report."""

import json
from pathlib import Path

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.merging.mergekit.commands import read_config, run_config
from squisher_mergekit.merging.report import as_text
from squisher_mergekit.merging.run import strict_runs
from squisher_mergekit.tensors.atomic import written_beside


@click.command("merge", cls=PrettyPrintHelp)
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--strict", is_flag=True, help="A Fisher made at other weights is an error, not a warning.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the report to a file as well.")
@add_merge_options  # type: ignore[untyped-decorator]
def command(config: Path, out: Path, strict: bool, json_file: Path | None, merge_options: MergeOptions) -> None:
    """Merge the models in CONFIG into the folder OUT, and report what happened.

    The merge is mergekit's own, with all its options, and OUT appears only when all of it is written. The report gives
    the share of entries that fell back and the effective weight of each model, overall and per kind of layer; the
    model card gets a section on where the Fishers come from.

    \b
    Example:
        squisher merge merge.yml merged --json report.json
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"OUT must be a new or an empty folder, but {out} is not; choose another or remove it")
    merge_options.apply_global_options()
    text = config.read_text(encoding="utf-8")
    parsed = read_config(text)
    with strict_runs(strict), written_beside(out.absolute()) as folder:
        run = run_config(parsed, text, folder, merge_options)
    report = run.report()
    if not merge_options.quiet:
        click.echo(as_text(report))
    if json_file is not None:
        plan = run.plan.as_dict() if run.plan is not None else None
        json_file.write_text(json.dumps({**report, "plan": plan}, indent=2) + "\n", encoding="utf-8")
