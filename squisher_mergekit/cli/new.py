"""``squisher new``: draft of a merge configuration."""

from __future__ import annotations

from pathlib import Path

import click

from squisher_mergekit.cli.options import FILE, HELP_OPTIONS, choice_option, strict_option
from squisher_mergekit.errors import OutputError


@click.command("new", context_settings=HELP_OPTIONS)
@click.argument("models", nargs=-1, required=True)
@click.option("--base", default=None, help="Folder or Hub id of the base model.")
@choice_option("--method", ["squisher", "ubgm_squisher"], "Merge method.", "squisher")
@choice_option("--structure", ["rows", "columns", "kron"], "Curvature beyond the diagonal; needs --base.")
@click.option("-o", "--out", type=FILE, default=None, help="File to write; standard output by default.")
@click.option("--overwrite", is_flag=True, help="Replace FILE even if it was edited, or is no draft.")
@strict_option
@click.option("--transformers-cache", type=str, default=None, help="Folder for models and Fishers from the Hub.")
@click.option("--trust-remote-code", is_flag=True, help="Let transformers run the code of a model (dangerous).")
def command(
    models: tuple[str, ...],
    base: str | None,
    method: str,
    structure: str | None,
    out: Path | None,
    overwrite: bool,
    strict: bool,
    transformers_cache: str | None,
    trust_remote_code: bool,
) -> None:
    """Draft the configuration of a merge of MODELS.

    The draft is commented YAML: the optimizer state or Fisher of each model, with its steps, scale and coverage, and
    the settings that are worth a thought. A merge that `squisher plan` refuses is refused here.

    \b
    Example:
        squisher new runs/math runs/code --base base -o merge.yml
    """
    from squisher_mergekit.recipes.draft import draft
    from squisher_mergekit.tensors.atomic import is_stream, write_whole

    text = draft(
        models,
        base,
        method,
        structure,
        strict=strict,
        transformers_cache=transformers_cache,
        trust_remote_code=trust_remote_code,
    )
    if out is None:
        click.echo(text, nl=False)
        return
    if not overwrite and not is_stream(out) and out.is_file() and out.read_bytes() != text.encode():
        raise OutputError(
            f"-o must be a new file, or one with the same draft, but {out} has other content; choose another file, or "
            "give --overwrite to replace it"
        )
    write_whole(out, text.encode())
