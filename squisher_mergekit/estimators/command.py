"""A Fisher of a saved model from saved data, written to disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from squisher_mergekit.errors import NotFoundError
from squisher_mergekit.estimators.data import batches, columns_of, read_rows
from squisher_mergekit.estimators.estimate import estimate_fisher
from squisher_mergekit.estimators.labels import Labels
from squisher_mergekit.estimators.sums import Grouping, check_kind
from squisher_mergekit.estimators.tasks import Task
from squisher_mergekit.fisher.config import SourceInfo
from squisher_mergekit.fisher.files import read_fisher, write_fisher
from squisher_mergekit.fisher.fingerprint import fingerprint
from squisher_mergekit.fisher.mapping import Fisher

_CLASSES: dict[Task, str] = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
}


def estimate_from(
    model: str,
    data: str,
    out: Path,
    task: Task,
    *,
    labels: Labels = "true",
    grouping: Grouping = "example",
    num_examples: int = 256,
    num_samples: int = 1,
    batch_size: int = 8,
    max_length: int = 512,
    columns: Mapping[str, str | None] | None = None,
    split: str = "train",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Fisher:
    """Load a model and data, estimate the Fisher, and write it.

    Args:
        model: Folder or Hub id.
        data: See :func:`~squisher_mergekit.estimators.data.read_rows`.
        out: The folder to make.
        task: Not ``auto``.
        labels: See :func:`~squisher_mergekit.estimators.estimate.estimate_fisher`, as for the further ones.
        grouping: See there.
        num_examples: At most so many rows.
        num_samples: See there.
        batch_size: Rows at once.
        max_length: Tokens of a row.
        columns: Names of the columns ``text``, ``pair``, ``target``, ``label``, where they are not the usual ones.
        split: Of a dataset on the Hub.
        seed: Of drawn labels and masks.
        dtype: Of the file.
        progress: Show a bar.

    Returns:
        The Fisher that was written.

    Raises:
        NotFoundError: There is no such model, or no such data.
        ConfigError: An argument does not fit.
    """
    from tqdm import tqdm

    check_kind(labels, grouping)
    found = list(read_rows(data, split, num_examples))
    if found:
        columns_of(found[0], task, columns or {})
    loaded, tokenizer = _load(model, task, progress)
    rows = tqdm(found, desc="Estimating", unit="example", disable=not progress)
    made = batches(rows, tokenizer, task, batch_size, max_length, columns or {}, seed)
    fisher = estimate_fisher(loaded, made, labels, grouping, num_samples=num_samples, task=task, seed=seed)
    local = Path(model).expanduser()
    name = None if local.exists() else model
    mark = fingerprint(local) if local.is_dir() else None
    fisher.config = fisher.config.model_copy(
        update={"weights_fingerprint": mark, "source": SourceInfo(layout="estimate", model=name)}
    )
    write_fisher(fisher, out, dtype)
    return read_fisher(out)


def _load(model: str, task: Task, progress: bool) -> tuple[nn.Module, Any]:
    """Return the model, in float32, and its tokenizer.

    Raises:
        NotFoundError: There is no such model, or transformers cannot load it for the task.
    """
    import transformers

    bars = transformers.utils.logging
    if not progress:
        bars.disable_progress_bar()
    try:
        kind = getattr(transformers, _CLASSES[task])
        loaded: nn.Module = kind.from_pretrained(model, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers reports what is missing in many ways
        raise NotFoundError(
            f"{model} must be a model for {task} with its tokenizer, local or on the Hub, but "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    finally:
        bars.enable_progress_bar()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return loaded, tokenizer
