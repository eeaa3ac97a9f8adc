"""``squisher pull``: download of a Fisher from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click

from squisher_mergekit.cli.options import HELP_OPTIONS, out_option, report_options


@click.command("pull", context_settings=HELP_OPTIONS)
@click.argument("source", metavar="ORG/NAME[@REVISION]")
@out_option()
@report_options
def command(source: str, out: Path, quiet: bool, json_file: Path | None) -> None:
    """Download the Fisher of ORG/NAME from the Hugging Face Hub into the folder OUT.

    Without a revision, the command searches the default one, then revision fisher. It downloads the files of the Fisher
    alone; HF_HUB_OFFLINE=1 takes them from Hugging Face's cache. A merge needs no pull: its parameter fisher accepts
    org/name@revision.

    \b
    Example:
        squisher pull me/llama-math@fisher -o fishers/math
    """
    import json

    from squisher_mergekit.cli.output import config_lines, write_report
    from squisher_mergekit.fisher.hub import pull
    from squisher_mergekit.fisher.summary import human_bytes
    from squisher_mergekit.tensors.hub import progress_bars

    with progress_bars(not quiet):
        fisher = pull(source, out)
    files = sorted(path for path in out.iterdir() if path.name.startswith("fisher"))
    size = sum(path.stat().st_size for path in files)
    click.echo(f"{source} -> {out}")
    for line in config_lines(fisher.config, f"{len(fisher)} tensors, {human_bytes(size)}"):
        click.echo(line)
    report = {"source": source, "out": str(out), "files": [path.name for path in files], "bytes": size}
    write_report(json_file, report | {"config": json.loads(fisher.config.to_json())})
