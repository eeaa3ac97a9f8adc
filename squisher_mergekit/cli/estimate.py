"""``squisher estimate``: the Fisher of a model from data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from squisher_mergekit.cli.options import (
    COUNT,
    HELP_OPTIONS,
    choice_option,
    out_option,
    report_options,
    seed_option,
)


class _Task(click.Choice):  # type: ignore[type-arg]
    """Choice of a task, which still accepts the name of version 0.1 for classification."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the task, with a warning for its old name."""
        if value == "sequence-classification":
            click.echo("--task sequence-classification is deprecated; take --task classification", err=True)
            return "classification"
        return super().convert(value, param, ctx)


class _Dtype(click.Choice):  # type: ignore[type-arg]
    """Choice of the model's dtype, which still accepts a dtype of the file, as version 0.1 did."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the dtype, with a warning for a dtype of the file."""
        if value in _FILE_DTYPES:
            click.echo(f"--dtype {value} is deprecated for the dtype of the file; take --file-dtype {value}", err=True)
            return value
        return super().convert(value, param, ctx)


_FILE_DTYPES = ["float32", "bfloat16"]


@click.command("estimate", context_settings=HELP_OPTIONS)
@click.argument("model")
@out_option()
@click.option(
    "--data", required=True, help="A jsonl, csv, tsv, parquet or text file, or a dataset org/name[:config] on the Hub."
)
@click.option("--split", default="train", show_default=True, help="Split of a dataset on the Hub.")
@click.option(
    "--task",
    type=_Task(["causal-lm", "classification", "token-classification", "seq2seq", "masked-lm", "regression"]),
    required=True,
    help="Task of the model; selects the class to load it with.",
)
@click.option("--num-examples", type=COUNT, default=256, show_default=True, help="Number of rows, from the first on.")
@choice_option(
    "--labels",
    ["true", "sampled", "exact", "predicted"],
    "true: the empirical Fisher. sampled, exact: the Fisher. predicted: with the likeliest label.",
    default="true",
)
@click.option("--joint", is_flag=True, help="Square the gradient of each batch, not of each example.")
@choice_option(
    "--datum",
    ["example", "token"],
    "Square the gradient of each sequence or of each token (one backward pass for each position).",
    default="example",
)
@click.option(
    "--num-samples",
    type=COUNT,
    default=1,
    show_default=True,
    help="Labels drawn for each example, for --labels sampled.",
)
@click.option("--batch-size", type=COUNT, default=8, show_default=True, help="Rows of a batch.")
@click.option("--max-length", type=COUNT, default=512, show_default=True, help="Largest number of tokens of a row.")
@click.option("--text-column", help="Column of the text, the words or the messages; by default one of the usual names.")
@click.option("--pair-column", help="Column of the second text of a pair.")
@click.option("--target-column", help="Column of the target of seq2seq, or of the completion of a prompt.")
@click.option("--label-column", help="Column of the class or number; for token-classification one for each word.")
@seed_option("Seed of drawn labels and masks.")
@click.option(
    "--dtype",
    type=_Dtype(["fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="Dtype that the model is loaded in; sums are float32. Small gradients vanish in fp16.",
)
@choice_option(
    "--precision", ["fp32", "bf16"], "Precision of forward and backward passes of a model in fp32.", default="fp32"
)
@click.option("--offload", is_flag=True, help="Keep the sums in host memory while the model runs on a GPU.")
@click.option(
    "--file-dtype", type=click.Choice(_FILE_DTYPES), default=None, help="Dtype of the file.  [default: float32]"
)
@click.option(
    "--save-every",
    type=click.IntRange(min=0),
    default=1024,
    show_default=True,
    help="Examples between checkpoints in OUT.partial.safetensors; the same command resumes from it. 0: none.",
)
@choice_option(
    "--factors",
    ["rows", "columns", "kron"],
    "Also estimate factors of each matrix, for merges with that structure; kron: both sides.",
)
@click.option("--block", type=COUNT, default=128, show_default=True, help="Rows or columns of a block of the factors.")
@click.option("--shard", is_flag=True, help="Shard the model over the processes (FSDP2).")
@report_options
def command(
    model: str,
    out: Path,
    data: str,
    split: str,
    task: str,
    num_examples: int,
    labels: str,
    joint: bool,
    datum: str,
    num_samples: int,
    batch_size: int,
    max_length: int,
    text_column: str | None,
    pair_column: str | None,
    target_column: str | None,
    label_column: str | None,
    seed: int,
    dtype: str,
    precision: str,
    offload: bool,
    file_dtype: str | None,
    save_every: int,
    factors: str | None,
    block: int,
    shard: bool,
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Estimate the diagonal Fisher of MODEL, a folder or a Hub id, from data.

    Use it when there is no optimizer state: it averages the squared gradient of each example. An example costs about
    as much time as in a training step. The Fisher of a LoRA is that of the adapter.

    Rows have a column such as text, or prompt and completion, or messages; and label or target, depending on the task.

    \b
    Example:
        squisher estimate runs/math/checkpoint-500 --task causal-lm --data math.jsonl -o fishers/math
        accelerate launch -m squisher_mergekit estimate runs/math --task causal-lm --data math.jsonl -o fishers/math

    Several processes share the examples; with --shard they also share the model.
    """
    import json

    import torch

    from squisher_mergekit.cli.output import config_lines, factors_text, size_of, write_report
    from squisher_mergekit.estimators.dataset.run import Request, estimate_from

    if dtype in _FILE_DTYPES:
        dtype, file_dtype = "fp32", file_dtype or dtype
    request = Request(
        model,
        data,
        task,  # type: ignore[arg-type]
        labels,  # type: ignore[arg-type]
        "batch" if joint else "example",
        num_samples,
        datum,  # type: ignore[arg-type]
        num_examples,
        batch_size,
        max_length,
        {"text": text_column, "pair": pair_column, "target": target_column, "label": label_column},
        split,
        seed,
        precision,  # type: ignore[arg-type]
        factors,
        block,
        dtype,  # type: ignore[arg-type]
    )
    fisher = estimate_from(
        request,
        out,
        dtype=getattr(torch, file_dtype or "float32"),
        save_every=save_every,
        sharded=shard,
        progress=not quiet,
        offload=offload,
    )
    if fisher is None:  # rank 0 reports
        return
    click.echo(f"{model} -> {out}")
    for line in config_lines(fisher.config, size_of(fisher), factors_text(fisher)):
        click.echo(line)
    write_report(json_file, {"model": model, "out": str(out), "config": json.loads(fisher.config.to_json())})
