"""``squisher extract``: optimizer state of a checkpoint -> portable Fisher."""

from __future__ import annotations

from pathlib import Path

import click

_POSITIVE = click.FloatRange(min=0, min_open=True)
_PATH = click.Path(path_type=Path)


@click.command("extract")
@click.argument("checkpoint")
@click.option("-o", "--out", type=_PATH, required=True, help="The folder to make.")
@click.option("--model", type=_PATH, help="The weights, or their config.json, where CHECKPOINT does not hold them.")
@click.option("--base", type=_PATH, help="The model before training: for LoRA (config.json is enough), frozen layers.")
@click.option("--names", type=_PATH, help="Text file, one name a line: line i names the optimizer's parameter i.")
@click.option("--examples-per-step", type=_POSITIVE, help="Examples behind one optimizer step, to be recorded.")
@click.option("--tokens-per-step", type=_POSITIVE, help="Tokens behind one optimizer step, to be recorded.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option(
    "--compress",
    type=click.Choice(["log8", "log4", "rank1"]),
    help="Logarithmic codes (F to 4 %, 40 %), or row and column means; --dtype is then that of tensors kept whole.",
)
@click.option("--no-verify", is_flag=True, help="Do not hold what is read against the checksums saved with it.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--json", "json_file", type=_PATH, help="Write the report to a file as well.")
def command(
    checkpoint: str,
    out: Path,
    model: Path | None,
    base: Path | None,
    names: Path | None,
    examples_per_step: float | None,
    tokens_per_step: float | None,
    dtype: str,
    compress: str | None,
    no_verify: bool,
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Read the optimizer state of CHECKPOINT into a Fisher with the names of the weights.

    CHECKPOINT is a checkpoint of a Hugging Face Trainer, accelerate, FSDP, DeepSpeed, Lightning or
    torch.distributed (of a run's folder the last one is taken), a file with an optimizer's state_dict, or a Hub id
    org/name[@revision]. No code in it is run. Where it cannot be told with certainty which tensor belongs to which
    parameter, nothing is written. Parameters without a second moment (frozen, unused, tied) are listed; the Fisher
    then covers the others.

    \b
    Example:
        squisher extract runs/math/checkpoint-500 -o fishers/math
    """
    import json

    import torch

    from squisher_mergekit.cli.output import config_lines, size_of
    from squisher_mergekit.optimizers.load import extract
    from squisher_mergekit.tensors.atomic import write_json

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
        verify=not no_verify,
        progress=not quiet,
    )
    click.echo(f"{checkpoint} -> {out}")
    for line in config_lines(fisher.config, f"{len(fisher)} tensors, {size_of(fisher)}"):
        click.echo(line)
    if json_file is not None:
        size = sum(fisher.info(name).nbytes for name in fisher)
        report = {"checkpoint": checkpoint, "out": str(out), "bytes": size}
        write_json(json_file, report | {"config": json.loads(fisher.config.to_json())})
