"""``squisher pull``: a Fisher on the Hugging Face Hub -> a folder."""

from __future__ import annotations

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.command("pull")
@click.argument("source", metavar="ORG/NAME[@REVISION]")
@click.option("-o", "--out", type=_PATH, required=True, help="The folder to make.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
@click.option("--json", "json_file", type=_PATH, help="Write the report to a file as well.")
def command(source: str, out: Path, quiet: bool, json_file: Path | None) -> None:
    """Fetch the Fisher that is published as ORG/NAME into the folder OUT.

    Without a revision it is looked for at the default one, then at revision fisher. No other file is fetched. With
    HF_HUB_OFFLINE=1 it is taken from Hugging Face's cache. A merge needs no pull: it takes fisher: org/name@revision.

    \b
    Example:
        squisher pull me/llama-math@fisher -o fishers/math
    """
    import json

    from squisher_mergekit.cli.output import config_lines
    from squisher_mergekit.fisher.hub import pull
    from squisher_mergekit.fisher.summary import human_bytes
    from squisher_mergekit.tensors.atomic import write_json
    from squisher_mergekit.tensors.hub import progress_bars

    with progress_bars(not quiet):
        fisher = pull(source, out)
    files = sorted(path for path in out.iterdir() if path.name.startswith("fisher"))
    size = sum(path.stat().st_size for path in files)
    click.echo(f"{source} -> {out}")
    for line in config_lines(fisher.config, f"{len(fisher)} tensors, {human_bytes(size)}"):
        click.echo(line)
    if json_file is not None:
        report = {"source": source, "out": str(out), "files": [path.name for path in files], "bytes": size}
        write_json(json_file, report | {"config": json.loads(fisher.config.to_json())})
