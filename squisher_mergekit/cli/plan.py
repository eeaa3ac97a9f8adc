"""``squisher plan``: check a merge strictly and preview it, before any tensor is read whole."""

import json
from pathlib import Path

import click
from mergekit.options import MergeOptions

from squisher_mergekit.merging.mergekit.commands import plan_config, read_config
from squisher_mergekit.merging.run import strict_runs


@click.command("plan")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--strict", is_flag=True, help="A Fisher made at other weights is an error, not a warning.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the plan to a file as well.")
@click.option("--transformers-cache", type=str, default=None, help="Where models and Fishers from the Hub are kept.")
@click.option("--trust-remote-code", is_flag=True, help="Let transformers run a model's own code (danger).")
@click.option("--allow-crimes", is_flag=True, help="Allow mixing architectures.")
def command(
    config: Path,
    strict: bool,
    json_file: Path | None,
    transformers_cache: str | None,
    trust_remote_code: bool,
    allow_crimes: bool,
) -> None:
    """Check the merge in CONFIG strictly and show what it would do.

    For each model: where its Fisher comes from, optimizer, steps, beta2, scale and coverage; then the tensors that
    will fall back and why, the bytes to read, and an estimate of memory. Nothing is written, and of tensors only the
    headers are read.

    \b
    Example:
        squisher plan merge.yml
    """
    options = MergeOptions(
        transformers_cache=transformers_cache,
        trust_remote_code=trust_remote_code,
        allow_crimes=allow_crimes,
        quiet=True,
    )
    with strict_runs(strict):
        plan = plan_config(read_config(config.read_text(encoding="utf-8")), options)
    click.echo(str(plan))
    if json_file is not None:
        json_file.write_text(json.dumps(plan.as_dict(), indent=2) + "\n", encoding="utf-8")
