"""``squisher push``: upload of a Fisher to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from squisher_mergekit.cli.options import HELP_OPTIONS, choice_option, model_option, report_options
from squisher_mergekit.cli.tables import pairs

if TYPE_CHECKING:
    from squisher_mergekit.fisher.publish import Prepared


@click.command("push", context_settings=HELP_OPTIONS)
@click.argument("fisher")
@click.argument("repo")
@click.option("--revision", default="fisher", show_default=True, help="Branch; created if it is missing.")
@choice_option(
    "--compress",
    ["rank1", "log8", "log4", "none"],
    "Compact form of the upload; by default rank1, or none for a Fisher that is compact already.",
)
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--message", help="Commit message.")
@model_option
@report_options
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

    FISHER is a portable Fisher, or a source that `squisher extract` reads. The command compresses it, prints the size
    and the measured error, and uploads fisher.safetensors, fisher_config.json and a section of README.md in one commit;
    it touches no other file. Others merge with it by fisher: org/name@fisher.

    \b
    Example:
        squisher push fishers/math me/llama-math
    """
    import tempfile
    from dataclasses import asdict

    from squisher_mergekit.cli.output import progress_bar, write_report
    from squisher_mergekit.fisher import publish
    from squisher_mergekit.optimizers.load import load_fisher
    from squisher_mergekit.tensors.hub import progress_bars
    from squisher_mergekit.tensors.temporary import temporary_folder

    publish.check_repository(repo)
    opened = load_fisher(fisher, model)
    bar = progress_bar(opened, "Compressing", quiet)
    with temporary_folder(Path(tempfile.gettempdir()), "push") as folder:
        prepared = publish.prepare(opened, folder / "fisher", compress, bar)
        click.echo(f"{fisher} -> {repo} at revision {revision}")
        for line in cost_lines(prepared):
            click.echo(line)
        with progress_bars(not quiet):
            done = publish.publish(prepared, repo, revision, message, private)
    source = repo if revision == "main" else f"{repo}@{revision}"
    for line in pairs([("uploaded", ", ".join(done.files)), ("commit", done.url), ("use", f"fisher: {source}")]):
        click.echo(line)
    cost = None if prepared.agreement is None else asdict(prepared.agreement) | {"sample": prepared.sample}
    report = {"fisher": fisher, "bytes_before": prepared.before, "bytes_after": prepared.after, "cost": cost}
    write_report(json_file, report | {"encoding": prepared.config.encoding} | asdict(done))


def cost_lines(prepared: Prepared) -> Iterator[str]:
    """Yield the size before and after compression, and its error."""
    from squisher_mergekit.fisher.summary import human_bytes

    codes = ", ".join(sorted(set(prepared.config.encoding.values())))
    yield from pairs([("size", f"{human_bytes(prepared.before)} -> {human_bytes(prepared.after)} ({codes})")])
    info = prepared.config.factors
    if prepared.factors is not None and info is not None:
        before, after = map(human_bytes, prepared.factors)
        error = "" if info.error is None else f", relative error {info.error:.2%} (Frobenius)"
        yield from pairs([("factors", f"{before} -> {after} ({info.form.replace('_', ' ')}){error}")])
    agreement = prepared.agreement
    if agreement is None:
        yield from pairs([("cost", "none: every entry is published as it is")])
        return
    parts = []
    if agreement.factor is not None:
        parts.append(f"half of the positive entries change by less than a factor of {agreement.factor:.3g}")
    if agreement.spearman is not None:
        parts.append(f"rank correlation {agreement.spearman:.4f}")
    if agreement.log_correlation is not None:
        parts.append(f"correlation of log F {agreement.log_correlation:.4f}")
    parts.append(f"zeros {agreement.zeros_a:.2%} -> {agreement.zeros_b:.2%}")
    rows = [("cost", "; ".join(parts))]
    if prepared.sample < agreement.entries:
        rows.append(("", f"(factor and rank correlation of a sample of {prepared.sample:,} entries)"))
    yield from pairs(rows)
