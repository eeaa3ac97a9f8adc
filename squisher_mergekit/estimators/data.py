"""From a file or a dataset of the Hub to batches for a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import ConfigError, NotFoundError
from squisher_mergekit.estimators.tasks import IGNORED, Task

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
# Names that columns usually have, in the order in which they are looked for.
_TEXTS = ("text", "sentence", "sentence1", "premise", "question", "source", "input", "document", "article")
_SECONDS = ("text_pair", "sentence2", "hypothesis")
_TARGETS = ("target", "summary", "highlights", "output", "answer")
_LABELS = ("label", "labels", "class")


def read_rows(data: str, split: str = "train", limit: int | None = None) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a jsonl, csv, tsv, parquet or text file, or of a dataset on the Hub.

    Args:
        data: The file, or the Hub's name of a dataset, ``org/name`` or ``org/name:configuration``.
        split: Of a dataset.
        limit: At most so many.

    Raises:
        NotFoundError: There is no such file, and no such dataset.
    """
    import datasets

    path = Path(data).expanduser()
    try:
        if path.is_file():
            kind = _READERS.get(path.suffix)
            if kind is None:
                raise ConfigError(f"{path} must end in one of {', '.join(_READERS)}; convert it")
            extra = {"sep": "\t"} if path.suffix == ".tsv" else {}
            rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True, **extra)
        else:
            name, _, configuration = data.partition(":")
            rows = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        yield from islice(rows, limit)
    except ConfigError:
        raise
    except Exception as error:  # a file that does not parse, or the Hub, can fail in any way
        raise NotFoundError(
            f"--data must be a file of rows or a dataset on the Hub, but {data} cannot be read "
            f"({' '.join(str(error).split())[:150]})"
        ) from error


def columns_of(row: Mapping[str, Any], task: Task, given: Mapping[str, str | None]) -> dict[str, str]:
    """Return which column of a row is what: ``text``, and by task ``pair``, ``target`` and ``label``.

    Args:
        row: The first one.
        task: Not ``auto``.
        given: The user's choice, by the same keys.

    Raises:
        ConfigError: A column that is needed is not there.

    Example:
        >>> columns_of({"sentence": "a", "label": 1}, "classification", {})
        {'text': 'sentence', 'label': 'label'}
    """
    wanted = {"text": _TEXTS, "pair": _SECONDS, "target": _TARGETS, "label": _LABELS}
    needed = {"classification": ("text", "label"), "regression": ("text", "label"), "seq2seq": ("text", "target")}
    optional = {"classification": ("pair",), "regression": ("pair",)}
    found = {}
    for key in needed.get(task, ("text",)) + optional.get(task, ()):
        chosen = given.get(key)
        name = chosen if chosen is not None else next((name for name in wanted[key] if name in row), None)
        if name is not None and name in row:
            found[key] = name
        elif chosen is not None or key not in optional.get(task, ()):
            raise ConfigError(
                f"a row must have a column for the {key}, found {', '.join(row)}; name it by --{key}-column"
            )
    return found


def batches(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    task: Task,
    batch_size: int,
    max_length: int,
    given: Mapping[str, str | None],
    seed: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """Yield tokenized batches, padded to their longest row, with labels.

    Args:
        rows: Of text.
        tokenizer: The model's.
        task: Not ``auto``. Of ``masked-lm`` 15 % of the tokens are masked, as in training.
        batch_size: Rows of a batch.
        max_length: Tokens of a row; what is longer is cut.
        given: Columns that the user names.
        seed: Of the masks.

    Raises:
        ConfigError: A column is missing.
    """
    iterator = iter(rows)
    columns: dict[str, str] | None = None
    generator = torch.Generator().manual_seed(seed)
    while part := list(islice(iterator, batch_size)):
        columns = columns or columns_of(part[0], task, given)
        texts = [str(row[columns["text"]]) for row in part]
        pairs = [str(row[columns["pair"]]) for row in part] if "pair" in columns else None
        encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        batch = {key: value for key, value in encoded.items() if isinstance(value, Tensor)}
        if task in ("classification", "regression"):
            kind = torch.int64 if task == "classification" else torch.float32
            batch["labels"] = torch.tensor([row[columns["label"]] for row in part], dtype=kind)
        elif task == "seq2seq":
            targets = [str(row[columns["target"]]) for row in part]
            wanted = tokenizer(
                text_target=targets, truncation=True, max_length=max_length, padding=True, return_tensors="pt"
            )
            batch["labels"] = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, IGNORED)
        else:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
            if task == "masked-lm":
                _mask(batch, tokenizer, generator)
        yield batch


def _mask(batch: dict[str, Tensor], tokenizer: Any, generator: torch.Generator) -> None:
    """Hide 15 % of the tokens that are none of the tokenizer's special ones; only these have a label."""
    special = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for token in tokenizer.all_special_ids:
        special |= batch["input_ids"] == token
    hidden = (torch.rand(special.shape, generator=generator) < 0.15) & ~special
    batch["labels"] = batch["labels"].masked_fill(~hidden, IGNORED)
    batch["input_ids"] = batch["input_ids"].masked_fill(hidden, tokenizer.mask_token_id)
