"""``squisher estimate``: a model and data -> a baseline Fisher."""

from __future__ import annotations

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)


@click.command("estimate")
@click.argument("model")
@click.option("-o", "--out", type=_PATH, required=True, help="The folder to make.")
@click.option("--data", required=True, help="jsonl, csv, tsv, parquet or text file, or a dataset org/name[:config].")
@click.option("--split", default="train", show_default=True, help="Of a dataset on the Hub.")
@click.option(
    "--task",
    type=click.Choice(
        ["causal-lm", "sequence-classification", "token-classification", "seq2seq", "masked-lm", "regression"]
    ),
    required=True,
    help="What the model does; it is loaded by it.",
)
@click.option("--num-examples", type=_COUNT, default=256, show_default=True, help="Rows to use, from the first on.")
@click.option(
    "--labels",
    type=click.Choice(["true", "sampled", "exact", "predicted"]),
    default="true",
    show_default=True,
    help="true: the empirical Fisher. sampled, exact: the Fisher. See estimate_fisher in Python.",
)
@click.option("--joint", is_flag=True, help="Square the gradient of a batch, not those of its examples.")
@click.option(
    "--datum",
    type=click.Choice(["example", "token"]),
    default="example",
    show_default=True,
    help="Of a language model: square a sequence's gradient, or each token's (a pass for each place).",
)
@click.option("--num-samples", type=_COUNT, default=1, show_default=True, help="Draws for each example, of sampled.")
@click.option("--batch-size", type=_COUNT, default=8, show_default=True)
@click.option("--max-length", type=_COUNT, default=512, show_default=True, help="Tokens of an example.")
@click.option("--text-column", help="By default one of the usual names.")
@click.option("--pair-column", help="The second text of a pair.")
@click.option("--target-column", help="What is to be said: of seq2seq, or after a prompt.")
@click.option("--label-column", help="The class or number; of token-classification one for each word.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of labels that are drawn, and of masks.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Of passes.")
@click.option(
    "--save-every",
    type=click.IntRange(min=0),
    default=1024,
    show_default=True,
    help="Examples after which sums are kept in OUT.partial.safetensors; the same call goes on from there. 0: never.",
)
@click.option("--shard", is_flag=True, help="Split the model over the processes (FSDP2).")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--json", "json_file", type=_PATH, help="Write the report to a file as well.")
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
    save_every: int,
    shard: bool,
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Estimate the diagonal Fisher of MODEL, a folder or a Hub id, from data.

    Where there is no optimizer state, this is the baseline: the squared gradient of each example, averaged. It takes
    about the time of one training step for as many examples. Of an adapter, the Fisher is of the adapter.

    Rows have a column such as text, or prompt and completion, or messages; and label or target by task.

    \b
    Example:
        squisher estimate runs/math/checkpoint-500 --task causal-lm --data math.jsonl -o fishers/math
        accelerate launch -m squisher_mergekit estimate runs/math --task causal-lm --data math.jsonl -o fishers/math

    Several processes share the examples; with --shard they share the model as well.
    """
    import json

    import torch

    from squisher_mergekit.cli.output import config_lines, size_of
    from squisher_mergekit.estimators.dataset.run import Request, estimate_from
    from squisher_mergekit.tensors.atomic import write_json

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
    )
    fisher = estimate_from(
        request, out, dtype=getattr(torch, dtype), save_every=save_every, sharded=shard, progress=not quiet
    )
    if fisher is None:  # the first process reports
        return
    click.echo(f"{model} -> {out}")
    for line in config_lines(fisher.config, size_of(fisher)):
        click.echo(line)
    if json_file is not None:
        write_json(json_file, {"model": model, "out": str(out), "config": json.loads(fisher.config.to_json())})
