"""``squisher plan``: check and preview of a merge, from headers alone."""

from pathlib import Path

import click

from squisher_mergekit.cli.options import HELP_OPTIONS, allow_missing_option, json_option, report_option, strict_option


@click.command("plan", context_settings=HELP_OPTIONS)
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@strict_option
@allow_missing_option
@report_option
@json_option
@click.option("--transformers-cache", type=str, default=None, help="Folder for models and Fishers from the Hub.")
@click.option(
    "--lora-merge-cache", type=str, default=None, help="Folder in which mergekit adds LoRAs to copies of models."
)
@click.option("--trust-remote-code", is_flag=True, help="Let transformers run the code of a model (dangerous).")
@click.option("--allow-crimes", is_flag=True, help="Allow models of different architectures.")
def command(
    config: Path,
    strict: bool,
    allow_missing: bool,
    report_file: Path | None,
    json_file: Path | None,
    transformers_cache: str | None,
    lora_merge_cache: str | None,
    trust_remote_code: bool,
    allow_crimes: bool,
) -> None:
    """Check the merge in CONFIG, and show a preview.

    The preview gives, for each model, the source of its Fisher, optimizer, steps, beta2, scale and coverage; then the
    tensors that lack a Fisher and are the weighted mean, with the reason, the bytes to read, and an estimate of memory.
    The command reads the headers of tensors only, and writes no model.

    \b
    Example:
        squisher plan merge.yml
    """
    from squisher_mergekit.cli.output import write_page, write_report
    from squisher_mergekit.merging.merge_plan import preview_text
    from squisher_mergekit.merging.mergekit.commands import plan_config, read_config
    from squisher_mergekit.merging.reports.page import page
    from squisher_mergekit.tensors.input_files import read_text

    text = read_text(config)
    preview = plan_config(
        read_config(text),
        strict=strict,
        allow_missing=allow_missing,
        transformers_cache=transformers_cache,
        lora_merge_cache=lora_merge_cache,
        trust_remote_code=trust_remote_code,
        allow_crimes=allow_crimes,
    )
    click.echo(preview_text(preview))
    if report_file is not None:
        write_page(report_file, page(preview, text, f"Plan of {config.name}"))
    write_report(json_file, preview)
