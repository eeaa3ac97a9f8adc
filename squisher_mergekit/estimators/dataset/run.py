"""A Fisher of a saved model from saved data, written to disk: batches shared among processes, resumable."""

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
from squisher_mergekit.estimators.accumulator import FisherAccumulator, Grouping, check_labels
from squisher_mergekit.estimators.dataset.batches import BatchMaker
from squisher_mergekit.estimators.dataset.load_model import TASKS, load_model, shard
from squisher_mergekit.estimators.dataset.resume import EstimateCheckpoint
from squisher_mergekit.estimators.dataset.rows import DataTask, columns_of, read_rows
from squisher_mergekit.estimators.output_gradients import Labels
from squisher_mergekit.estimators.tasks import Datum
from squisher_mergekit.fisher.config import SourceInfo
from squisher_mergekit.fisher.files import check_free, read_fisher, write_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.fingerprint import fingerprint
from squisher_mergekit.tensors.sharded import OnRankZero

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Request:
    """What a Fisher is asked of: all that its entries depend on.

    Args:
        model: Folder or Hub id, of a model or an adapter.
        data: See :func:`~squisher_mergekit.estimators.dataset.rows.read_rows`.
        task: What the model does.
        labels: See :func:`~squisher_mergekit.estimate_fisher`, as for the next three.
        grouping: See there.
        num_samples: See there.
        datum: See there.
        num_examples: At most so many rows.
        batch_size: Rows at once.
        max_length: Tokens of a row.
        columns: Names of the columns ``text``, ``pair``, ``target``, ``label``, where they are not the usual ones.
        split: Of a dataset on the Hub.
        seed: Of drawn labels and masks.
        precision: ``fp32``, or ``bf16`` for passes in bfloat16; squares are float32 in any case.
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


def estimate_from(
    request: Request,
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    save_every: int = 0,
    sharded: bool = False,
    progress: bool = False,
) -> Fisher | None:
    """Load a model and data, estimate the Fisher, and write it; in all processes that accelerate or torchrun started.

    Batches are dealt out to the processes in turn, and are the same however many there are. A call with
    the same request resumes an interrupted one.

    Args:
        request: What is asked.
        out: The folder to make.
        dtype: Of the file.
        save_every: Examples between checkpoints in ``OUT.partial.safetensors``; 0: no checkpoint.
        sharded: Split the model over the processes by FSDP2.
        progress: Show a bar.

    Returns:
        The Fisher that was written; None in all processes but the first.

    Raises:
        NotFoundError: There is no such model, or no such data.
        ConfigError: An argument does not fit.
    """
    import accelerate
    from tqdm import tqdm

    state = accelerate.PartialState(cpu=not torch.accelerator.is_available())
    rows, columns = _check_request(request, out, sharded, state.num_processes)
    weights_fingerprint = _fingerprint(request.model)
    checkpoint = EstimateCheckpoint.beside(out, _checkpoint_request(request, columns, weights_fingerprint, rows))
    done = checkpoint.num_batches()
    model, tokenizer = load_model(request.model, request.task, progress and state.is_main_process)
    labels = getattr(model.config, "label2id", None) or {}
    make = BatchMaker(tokenizer, request.task, request.max_length, columns, labels, request.seed, request.batch_size)
    accumulator = _accumulator(request, shard(model, state.device) if sharded else model.to(state.device))
    if done:
        checkpoint.restore(accumulator)
    size, step = request.batch_size, state.num_processes
    bar = tqdm(
        desc="Estimating", unit="example", total=len(rows), initial=min(done * size, len(rows)),
        disable=not (progress and state.is_main_process),
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


def _check_request(request: Request, out: Path, sharded: bool, processes: int) -> tuple[Rows, Mapping[str, str]]:
    """Refuse what can be known to fail before a model is loaded; return the rows, and which column is what."""
    check_labels(request.labels, request.grouping)
    check_free(out)
    if sharded and processes == 1:
        raise ConfigError(
            "a model is sharded over several processes, but there is one; start more, by accelerate launch or torchrun"
        )
    rows = list(read_rows(request.data, request.split, request.num_examples))
    if not rows:
        raise ConfigError(f"a Fisher needs at least one example, but {request.data} has none; give a file with rows")
    return rows, columns_of(rows[0], request.task, request.columns)


def _fingerprint(model: str) -> str | None:
    folder = Path(model).expanduser()
    return fingerprint(folder) if folder.is_dir() else None


def _checkpoint_request(
    request: Request, columns: Mapping[str, str], weights_fingerprint: str | None, rows: Rows
) -> dict[str, Any]:
    """Return everything the accumulators depend on: rows and weights by content, not by location."""
    fields = asdict(request) | {
        "columns": dict(columns),
        "model": weights_fingerprint or request.model,
        "rows": _digest(rows),
    }
    del fields["data"], fields["split"]
    return fields


def _digest(rows: Rows) -> str:
    """Return what tells these rows from others."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(json.dumps(row, default=str, sort_keys=True).encode())
    return digest.hexdigest()


def _accumulator(request: Request, model: nn.Module) -> FisherAccumulator:
    return FisherAccumulator(
        model,
        request.labels,
        request.grouping,
        request.num_samples,
        TASKS[request.task][1],
        seed=request.seed,
        datum=request.datum,
    )


def _add_batch(accumulator: FisherAccumulator, make: BatchMaker, rows: Rows, number: int, device: torch.device) -> None:
    """Add the batch of a number; where there is none left, keep the other processes of a sharded model company."""
    batch_rows = rows[number * make.batch_size : (number + 1) * make.batch_size]
    if batch_rows or accumulator.sharded:
        batch = make(batch_rows or rows[:1], number if batch_rows else 0)
        accumulator.add({key: value.to(device) for key, value in batch.items()}, number, counts=bool(batch_rows))


def _save_checkpoint(checkpoint: EstimateCheckpoint, accumulator: FisherAccumulator, batches: int, first: bool) -> None:
    """Checkpoint the sums over all processes; rank 0 keeps them, the others restart from zero."""
    accumulator.reduce()
    checkpoint.save(accumulator, batches)
    if not first:
        accumulator.reset()


def _write_fisher(
    accumulator: FisherAccumulator, request: Request, out: Path, dtype: torch.dtype, weights_fingerprint: str | None
) -> None:
    """Write the mean; of a sharded model the first process gathers one tensor after the other."""
    accumulator.divide()
    on_rank_zero = OnRankZero()
    fisher = accumulator.fisher(on_rank_zero, statistic="mean", num_examples=accumulator.examples)
    name = None if Path(request.model).expanduser().exists() else request.model
    fisher.config = fisher.config.model_copy(
        update={"weights_fingerprint": weights_fingerprint, "source": SourceInfo(layout="estimate", model=name)}
    )
    on_rank_zero.run(lambda: write_fisher(fisher, out, dtype))
