"""Estimate of a saved model's Fisher from a dataset, written to disk; resumable, in one process or several."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.estimators.accumulator import FisherAccumulator
from squisher_mergekit.estimators.dataset.batches import BatchMaker
from squisher_mergekit.estimators.dataset.load_model import BAR_DELAY, MODEL_DTYPES, ModelDtype, load_model, shard
from squisher_mergekit.estimators.dataset.resume import EstimateCheckpoint
from squisher_mergekit.estimators.dataset.rows import columns_of, read_rows
from squisher_mergekit.estimators.output_gradients import Labels
from squisher_mergekit.estimators.requirements import Grouping, check_labels
from squisher_mergekit.estimators.tasks import DataTask, Datum
from squisher_mergekit.fisher.config import SourceInfo
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import check_free, write_fisher
from squisher_mergekit.models.fingerprint import fingerprint
from squisher_mergekit.tensors.input_files import exists, expanded
from squisher_mergekit.tensors.sharded import OnRankZero

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Request:
    """Model, data and options of an estimate: everything the entries of the Fisher depend on.

    Args:
        model: Folder or Hub id of a model or an adapter.
        data: See :func:`~squisher_mergekit.estimators.dataset.rows.read_rows`.
        task: Task of the model.
        labels: See :func:`~squisher_mergekit.estimate_fisher`, as for the next three.
        grouping: See there.
        num_samples: See there.
        datum: See there.
        num_examples: Largest number of rows.
        batch_size: Rows of a batch.
        max_length: Largest number of tokens of a row.
        columns: Column names by key (``text``, ``pair``, ``target``, ``label``); None: the usual names.
        split: Split of a dataset on the Hub.
        seed: Seed of drawn labels and masks.
        factors: See :func:`~squisher_mergekit.estimate_fisher`, as for ``block``.
        block: See there.
        precision: ``fp32``, or ``bf16`` for forward and backward passes in bfloat16. Squares are float32 either way.
        model_dtype: Dtype that the model is loaded in. Squares and sums are float32 with every dtype.
    """

    model: str
    data: str
    task: DataTask
    labels: Labels = "true"
    grouping: Grouping = "example"
    num_samples: int = 1
    datum: Datum = "example"
    num_examples: int = 256
    batch_size: int = 8
    max_length: int = 512
    columns: Mapping[str, str | None] = field(default_factory=dict)
    split: str = "train"
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    factors: str | None = None
    block: int = 128
    model_dtype: ModelDtype = "fp32"


def estimate_from(
    request: Request,
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    save_every: int = 0,
    sharded: bool = False,
    progress: bool = False,
    offload: bool = False,
) -> Fisher | None:
    """Load a model and data, estimate the Fisher, and write it; every process of accelerate or torchrun calls this.

    The processes take batches in turn. The batches do not depend on the number of processes. A call with the same
    request resumes an interrupted one.

    Args:
        request: Model, data and options.
        out: Folder to create.
        dtype: Dtype of the file.
        save_every: Examples between checkpoints in ``OUT.partial.safetensors``; 0: no checkpoint.
        sharded: True to shard the model over the processes by FSDP2.
        progress: True to show a progress bar.
        offload: True to keep the accumulators in host memory while the model runs on a GPU.

    Returns:
        The written Fisher on rank 0; None on other ranks.

    Raises:
        NotFoundError: The model or the data do not exist.
        ConfigError: The arguments do not fit together, or ``out`` already has a Fisher.
    """
    import accelerate
    from tqdm import tqdm

    state = accelerate.PartialState(cpu=not torch.accelerator.is_available())
    rows, columns = _check_request(request, out, sharded, state.num_processes, offload)
    weights_fingerprint = _fingerprint(request.model)
    checkpoint = EstimateCheckpoint.beside(out, _checkpoint_request(request, columns, weights_fingerprint, rows))
    done = checkpoint.num_batches()
    model, tokenizer = load_model(
        request.model, request.task, progress and state.is_main_process, MODEL_DTYPES[request.model_dtype]
    )
    labels = getattr(model.config, "label2id", None) or {}
    make = BatchMaker(tokenizer, request.task, request.max_length, columns, labels, request.seed, request.batch_size)
    make.check(rows, done * request.batch_size)
    accumulator = _accumulator(request, shard(model, state.device) if sharded else model.to(state.device), offload)
    if done:
        checkpoint.restore(accumulator)
    size, step = request.batch_size, state.num_processes
    bar = tqdm(
        desc="Estimating", unit="example", total=len(rows), initial=min(done * size, len(rows)),
        disable=not (progress and state.is_main_process), delay=BAR_DELAY,
    )  # fmt: skip
    with bar, torch.autocast(state.device.type, torch.bfloat16, enabled=request.precision == "bf16"):
        for first in range(done, -(-len(rows) // size), step):
            _add_batch(accumulator, make, rows, first + state.process_index, state.device)
            examples = min((first + step) * size, len(rows))
            bar.update(examples - first * size)
            if save_every and examples < len(rows) and examples // save_every > first * size // save_every:
                _save_checkpoint(checkpoint, accumulator, first + step, state.is_main_process)
    accumulator.reduce()
    _write_fisher(accumulator, request, out, dtype, weights_fingerprint)
    checkpoint.remove()
    return read_fisher(out) if state.is_main_process else None


def _check_request(
    request: Request, out: Path, sharded: bool, processes: int, offload: bool
) -> tuple[Rows, Mapping[str, str]]:
    """Return the rows and their columns; raise for errors that need no model."""
    check_labels(request.labels, request.grouping)
    check_free(out)
    if request.model_dtype != "fp32" and request.precision != "fp32":
        raise ConfigError(
            f"--precision {request.precision} narrows the passes of a model in fp32, but --dtype is "
            f"{request.model_dtype}, whose passes are narrow already; give one of the two"
        )
    if sharded and offload:
        raise ConfigError(
            "--offload keeps the sums of a whole model in host memory, but --shard shards it; give one of the two"
        )
    if sharded and processes == 1:
        raise ConfigError("--shard needs several processes, found one; start more, by accelerate launch or torchrun")
    rows = list(read_rows(request.data, request.split, request.num_examples))
    if not rows:
        raise ConfigError(f"a Fisher needs at least one example, but {request.data} has none; give a file with rows")
    return rows, columns_of(rows[0], request.task, request.columns)


def _fingerprint(model: str) -> str | None:
    """Return the fingerprint of a local model's weights; None for a model on the Hub."""
    folder = expanded(model)
    return fingerprint(folder) if folder.is_dir() else None


def _checkpoint_request(
    request: Request, columns: Mapping[str, str], weights_fingerprint: str | None, rows: Rows
) -> dict[str, Any]:
    """Return everything the sums depend on, with rows and weights by content instead of location."""
    fields = asdict(request) | {
        "columns": dict(columns),
        "model": weights_fingerprint or request.model,
        "rows": _digest(rows),
    }
    del fields["data"], fields["split"]
    return fields


def _digest(rows: Rows) -> str:
    """Return a hash of the rows."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(json.dumps(row, default=str, sort_keys=True).encode())
    return digest.hexdigest()


def _accumulator(request: Request, model: nn.Module, offload: bool) -> FisherAccumulator:
    """Return an accumulator with the options of the request."""
    return FisherAccumulator(
        model,
        request.labels,
        request.grouping,
        request.num_samples,
        request.task,
        seed=request.seed,
        datum=request.datum,
        offload=offload,
        factors=request.factors,
        block=request.block,
    )


def _add_batch(accumulator: FisherAccumulator, make: BatchMaker, rows: Rows, number: int, device: torch.device) -> None:
    """Add a batch by its number; without rows left, only take part in the collectives of a sharded model."""
    batch_rows = rows[number * make.batch_size : (number + 1) * make.batch_size]
    if batch_rows or accumulator.sharded:
        batch = make(batch_rows or rows[:1], number if batch_rows else 0)
        accumulator.add({key: value.to(device) for key, value in batch.items()}, number, counts=bool(batch_rows))


def _save_checkpoint(checkpoint: EstimateCheckpoint, accumulator: FisherAccumulator, batches: int, first: bool) -> None:
    """Write a checkpoint of the sums over all processes; rank 0 continues from them, other ranks from zero."""
    accumulator.reduce()
    checkpoint.save(accumulator, batches)
    if not first:
        accumulator.reset()


def _write_fisher(
    accumulator: FisherAccumulator, request: Request, out: Path, dtype: torch.dtype, weights_fingerprint: str | None
) -> None:
    """Write the mean; rank 0 gathers the tensors of a sharded model one by one."""
    accumulator.divide()
    on_rank_zero = OnRankZero()
    fisher = accumulator.fisher(on_rank_zero, statistic="mean", num_examples=accumulator.examples)
    name = None if exists(expanded(request.model)) else request.model
    fisher.config = fisher.config.model_copy(
        update={"weights_fingerprint": weights_fingerprint, "source": SourceInfo(layout="estimate", model=name)}
    )
    on_rank_zero.run(lambda: write_fisher(fisher, out, dtype))
