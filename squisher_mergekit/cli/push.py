"""``squisher push``: a Fisher -> the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from squisher_mergekit.fisher.publish import Prepared

_PATH = click.Path(path_type=Path)


@click.command("push")
@click.argument("fisher")
@click.argument("repo")
@click.option("--revision", default="fisher", show_default=True, help="The branch; it is made if it is missing.")
@click.option(
    "--compress",
    type=click.Choice(["rank1", "log8", "log4", "none"]),
    help="How to make it small; rank1 by default, or as it is where it is compact already.",
)
@click.option("--private", is_flag=True, help="Make the repository private if it does not exist yet.")
@click.option("--message", help="Of the commit.")
@click.option("--model", type=_PATH, help="The weights, or their config.json, where FISHER does not hold them.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
@click.option("--json", "json_file", type=_PATH, help="Write the report to a file as well.")
def command(
    fisher: str,
    repo: str,
    revision: str,
    compress: str | None,
    private: bool,
    message: str | None,
    model: Path | None,
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Publish FISHER as REPO (org/name) on the Hugging Face Hub, so that others merge without data.

    FISHER is a portable Fisher or whatever `squisher extract` reads. It is made small first, and what that costs is
    measured and printed. Then fisher.safetensors, fisher_config.json and a section in README.md go up in one commit; no
    other file is touched. Others use it in a merge as fisher: org/name@fisher.

    \b
    Example:
        squisher push fishers/math me/llama-math
    """
    import tempfile
    from dataclasses import asdict

    from tqdm import tqdm

    from squisher_mergekit.fisher import publish
    from squisher_mergekit.optimizers.load import load_fisher
    from squisher_mergekit.tensors.atomic import write_json
    from squisher_mergekit.tensors.hub import progress_bars

    publish.check_repository(repo)
    opened = load_fisher(fisher, model)
    bar = tqdm(list(opened), desc="Compressing", unit="tensor", disable=quiet, delay=2)
    with tempfile.TemporaryDirectory(prefix="squisher-push-") as folder:
        prepared = publish.prepare(opened, Path(folder) / "fisher", compress, bar)
        click.echo(f"{fisher} -> {repo} at revision {revision}")
        for line in cost_lines(prepared):
            click.echo(line)
        with progress_bars(not quiet):
            done = publish.publish(prepared, repo, revision, message, private)
    source = repo if revision == "main" else f"{repo}@{revision}"
    click.echo(f"uploaded   {', '.join(done.files)}\ncommit     {done.url}\nuse        fisher: {source}")
    if json_file is not None:
        cost = None if prepared.agreement is None else asdict(prepared.agreement) | {"sample": prepared.sample}
        report = {"fisher": fisher, "bytes_before": prepared.before, "bytes_after": prepared.after, "cost": cost}
        write_json(json_file, report | {"encoding": prepared.config.encoding} | asdict(done))


def cost_lines(prepared: Prepared) -> Iterator[str]:
    """Say the size before and after, and how far what is published is from what was there."""
    from squisher_mergekit.fisher.summary import human_bytes

    codes = ", ".join(sorted(set(prepared.config.encoding.values())))
    yield f"size       {human_bytes(prepared.before)} -> {human_bytes(prepared.after)} ({codes})"
    agreement = prepared.agreement
    if agreement is None:
        yield "cost       none: every entry is published as it is"
        return
    parts = []
    if agreement.factor is not None:
        parts.append(f"half of the positive entries change by less than a factor of {agreement.factor:.3g}")
    if agreement.spearman is not None:
        parts.append(f"rank correlation {agreement.spearman:.4f}")
    if agreement.log_correlation is not None:
        parts.append(f"correlation of log F {agreement.log_correlation:.4f}")
    parts.append(f"zeros {agreement.zeros_a:.2%} -> {agreement.zeros_b:.2%}")
    yield f"cost       {'; '.join(parts)}"
    if prepared.sample < agreement.entries:
        yield f"           (factor and rank correlation of a sample of {prepared.sample:,} entries)"
