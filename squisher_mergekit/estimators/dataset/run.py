"""A Fisher of a saved model from saved data, written to disk: planned, dealt out to processes, kept under way."""

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
from squisher_mergekit.estimators.accumulator import Grouping, Sums, check_kind
from squisher_mergekit.estimators.dataset.batches import BatchMaker
from squisher_mergekit.estimators.dataset.load_model import TASKS, load_model, shard
from squisher_mergekit.estimators.dataset.resume import Kept
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

    Batches are dealt out to the processes in turn, and are the same however many there are. What was kept by an
    interrupted call with the same request is taken up.

    Args:
        request: What is asked.
        out: The folder to make.
        dtype: Of the file.
        save_every: Keep the sums in ``OUT.partial.safetensors`` each time so many examples were added; 0: never.
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

    here = accelerate.PartialState(cpu=not torch.accelerator.is_available())
    rows, columns = _checked(request, out, sharded, here.num_processes)
    mark = _fingerprint(request.model)
    kept = Kept.of(out, _asked(request, columns, mark, rows))
    done = kept.batches()
    model, tokenizer = load_model(request.model, request.task, progress and here.is_main_process)
    labels = getattr(model.config, "label2id", None) or {}
    make = BatchMaker(tokenizer, request.task, request.max_length, columns, labels, request.seed, request.batch_size)
    sums = _sums(request, shard(model, here.device) if sharded else model.to(here.device))
    if done:
        kept.restore(sums)
    size, step = request.batch_size, here.num_processes
    bar = tqdm(
        desc="Estimating", unit="example", total=len(rows), initial=min(done * size, len(rows)),
        disable=not (progress and here.is_main_process),
    )  # fmt: skip
    with bar, torch.autocast(here.device.type, torch.bfloat16, enabled=request.precision == "bf16"):
        for first in range(done, -(-len(rows) // size), step):
            _add(sums, make, rows, first + here.process_index, here.device)
            examples = min((first + step) * size, len(rows))
            bar.update(examples - first * size)
            if save_every and examples < len(rows) and examples // save_every > first * size // save_every:
                _keep(kept, sums, first + step, here.is_main_process)
    sums.reduce()
    _write(sums, request, out, dtype, mark)
    kept.remove()
    return read_fisher(out) if here.is_main_process else None


def _checked(request: Request, out: Path, sharded: bool, processes: int) -> tuple[Rows, Mapping[str, str]]:
    """Refuse what can be known to fail before a model is loaded; return the rows, and which column is what."""
    check_kind(request.labels, request.grouping)
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


def _asked(request: Request, columns: Mapping[str, str], mark: str | None, rows: Rows) -> dict[str, Any]:
    """Return what sums depend on: the rows and weights themselves, not where they lie."""
    asked = asdict(request) | {"columns": dict(columns), "model": mark or request.model, "rows": _digest(rows)}
    del asked["data"], asked["split"]
    return asked


def _digest(rows: Rows) -> str:
    """Return what tells these rows from others."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(json.dumps(row, default=str, sort_keys=True).encode())
    return digest.hexdigest()


def _sums(request: Request, model: nn.Module) -> Sums:
    return Sums(
        model,
        request.labels,
        request.grouping,
        request.num_samples,
        TASKS[request.task][1],
        seed=request.seed,
        datum=request.datum,
    )


def _add(sums: Sums, make: BatchMaker, rows: Rows, number: int, device: torch.device) -> None:
    """Add the batch of a number; where there is none left, keep the other processes of a sharded model company."""
    mine = rows[number * make.batch_size : (number + 1) * make.batch_size]
    if mine or sums.sharded:
        batch = make(mine or rows[:1], number if mine else 0)
        sums.add({key: value.to(device) for key, value in batch.items()}, number, counts=bool(mine))


def _keep(kept: Kept, sums: Sums, batches: int, first: bool) -> None:
    """Keep the sums of all processes so far; the first one goes on from them, the others from nothing."""
    sums.reduce()
    kept.save(sums, batches)
    if not first:
        sums.start_again()


def _write(sums: Sums, request: Request, out: Path, dtype: torch.dtype, mark: str | None) -> None:
    """Write the mean; of a sharded model the first process gathers one tensor after the other."""
    sums.divide()
    together = OnRankZero()
    fisher = sums.fisher(together, statistic="mean", num_examples=sums.examples)
    name = None if Path(request.model).expanduser().exists() else request.model
    fisher.config = fisher.config.model_copy(
        update={"weights_fingerprint": mark, "source": SourceInfo(layout="estimate", model=name)}
    )
    together.run(lambda: write_fisher(fisher, out, dtype))
