"""``squisher extract``: a portable Fisher from the optimizer state of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from squisher_mergekit.cli.options import (
    HELP_OPTIONS,
    choice_option,
    dtype_option,
    naming_options,
    out_option,
    report_options,
)

_POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command("extract", context_settings=HELP_OPTIONS)
@click.argument("checkpoint")
@out_option()
@naming_options
@click.option("--examples-per-step", type=_POSITIVE, help="Examples behind one optimizer step, for the metadata.")
@click.option("--tokens-per-step", type=_POSITIVE, help="Tokens behind one optimizer step, for the metadata.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps, where CHECKPOINT does not record them.")
@click.option(
    "--beta2",
    type=click.FloatRange(min=0, max=1, max_open=True),
    help="Decay of the second moments, where CHECKPOINT does not record it.",
)
@dtype_option
@choice_option(
    "--compress",
    ["log8", "log4", "rank1"],
    "Compact form: logarithmic codes (each entry to 4 % or 40 %), or row and column means. Tensors that stay whole "
    "have --dtype.",
)
@click.option(
    "--lift", is_flag=True, help="Of a LoRA: write the Fisher of the merged weights, not of A and B; needs --base."
)
@click.option("--no-verify", is_flag=True, help="Skip the checksums in the files.")
@report_options
def command(
    checkpoint: str,
    out: Path,
    model: Path | None,
    base: Path | None,
    names: Path | None,
    examples_per_step: float | None,
    tokens_per_step: float | None,
    steps: int | None,
    beta2: float | None,
    dtype: str,
    compress: str | None,
    lift: bool,
    no_verify: bool,
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Convert the optimizer state of CHECKPOINT to a Fisher with the names of the weights.

    CHECKPOINT is a checkpoint of a Hugging Face Trainer, accelerate, FSDP, DeepSpeed, Lightning, torch.distributed or
    another trainer that optimizers/README.md lists (or the folder of a run, for its last checkpoint), a file with an
    optimizer's state_dict, a safetensors file of second moments, a Hub id org/name[@revision], or one file there,
    org/name[@revision]:path.safetensors. The command runs no code from a checkpoint. It writes nothing if the
    parameter of a tensor is not certain. A list names the parameters without a second moment (frozen, unused, tied);
    the Fisher covers the others.

    \b
    Example:
        squisher extract runs/math/checkpoint-500 -o fishers/math
        squisher extract lora/math/checkpoint-500 --base base --lift -o fishers/math
    """
    import json

    import torch

    from squisher_mergekit.cli.output import config_lines, factors_text, size_of, write_report
    from squisher_mergekit.optimizers.load import extract

    fisher = extract(
        checkpoint,
        out,
        model,
        base,
        names,
        getattr(torch, dtype),
        compress,
        examples_per_step=examples_per_step,
        tokens_per_step=tokens_per_step,
        steps=steps,
        beta2=beta2,
        verify=not no_verify,
        progress=not quiet,
        lift=lift,
    )
    click.echo(f"{checkpoint} -> {out}")
    size_line = f"{len(fisher)} tensors, {size_of(fisher)}"
    for line in config_lines(fisher.config, size_line, factors_text(fisher)):
        click.echo(line)
    size = sum(fisher.info(name).nbytes for name in fisher)
    report = {"checkpoint": checkpoint, "out": str(out), "bytes": size}
    write_report(json_file, report | {"config": json.loads(fisher.config.to_json())})
