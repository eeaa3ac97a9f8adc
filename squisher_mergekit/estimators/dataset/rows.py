"""Rows of a file or of a dataset on the Hub, and the meaning of their columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from squisher_mergekit.errors import ConfigError, NotFoundError
from squisher_mergekit.estimators.tasks import DataTask
from squisher_mergekit.tensors.input_files import expanded

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
# Usual names of columns, in order of preference.
_TEXTS = ("text", "sentence", "sentence1", "premise", "question", "source", "input", "document", "article")
_SECONDS = ("text_pair", "sentence2", "hypothesis")
_TARGETS = ("target", "summary", "highlights", "output", "answer")
_LABELS = ("label", "labels", "class")
# Questions, inputs and sources are missing here: of a row with two texts a language model would silently see one.
_PROSE = ("text", "sentence", "document", "article")
_CLASSIFIED = {"text": _TEXTS, "label": _LABELS, "pair": _SECONDS}
_NAMES: dict[DataTask, dict[str, tuple[str, ...]]] = {
    "causal-lm": {"text": _PROSE},
    "masked-lm": {"text": _PROSE},
    "classification": _CLASSIFIED,
    "regression": _CLASSIFIED,
    "token-classification": {"text": ("tokens", "words"), "label": ("tags", "ner_tags", "labels")},
    "seq2seq": {"text": _TEXTS, "target": _TARGETS},
}


def read_rows(data: str, split: str = "train", limit: int | None = None) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a jsonl, json, csv, tsv, parquet or text file, or of a dataset on the Hub.

    All but parquet may be compressed (``rows.jsonl.gz``). Each line of a text file is a row with the column ``text``.

    Args:
        data: A file, or the id of a dataset on the Hub, ``org/name`` or ``org/name:configuration``.
        split: Split of a dataset on the Hub.
        limit: Largest number of rows; None: all.

    Raises:
        NotFoundError: No file and no dataset has this name, or it cannot be parsed.
        ConfigError: The file's name has an unknown ending.
    """
    import datasets

    path = expanded(data)
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs the reason that the refusal has as well
    try:
        if path.is_file():
            if path.stat().st_size == 0:
                raise ConfigError(f"--data must have rows, but {data} is empty; give data")
            kind, options = _reader(path)
            rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)
        else:
            name, _, configuration = data.partition(":")
            rows = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        yield from islice(rows, limit)
    except ConfigError:
        raise
    except Exception as error:  # parsers and the Hub raise many types
        raise NotFoundError(
            f"--data must be a file of rows or a dataset on the Hub, but {data} cannot be read "
            f"({' '.join(str(error).split())[:150]}); check its name and content"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def _reader(path: Path) -> tuple[str, dict[str, str]]:
    """Return the builder of :mod:`datasets` for a file's ending, and its options."""
    compressed = path.suffix == ".gz"
    suffix = path.with_suffix("").suffix if compressed else path.suffix
    kind = _READERS.get(suffix)
    if kind is None:
        raise ConfigError(f"{path} must end in one of {', '.join(_READERS)}, .gz may follow; convert it")
    if compressed and kind == "parquet":
        raise ConfigError(f"{path} must end in .parquet, which compresses itself; decompress it")
    return kind, {"sep": "\t"} if suffix == ".tsv" else {}


def columns_of(row: Mapping[str, Any], task: DataTask, given: Mapping[str, str | None]) -> dict[str, str]:
    """Return the columns of a task's inputs and labels: ``text``, and by task ``pair``, ``target`` and ``label``.

    A causal language model has one of three forms: ``text`` alone; ``text`` and ``target``, a prompt and its
    completion; or ``messages``, a conversation. Without a choice of the user, the column ``text`` comes first, then
    ``prompt`` and ``completion``, then ``messages``.

    Args:
        row: The first row.
        task: Task of the model.
        given: The user's choice, by the same keys. With a ``target``, ``text`` of a causal language model is a prompt;
            a column ``text`` of lists is a conversation.

    Returns:
        Key -> column name.

    Raises:
        ConfigError: The row lacks a column that the task needs.

    Example:
        >>> columns_of({"sentence": "a", "label": 1}, "classification", {})
        {'text': 'sentence', 'label': 'label'}
        >>> columns_of({"prompt": "1 + 1 =", "completion": " 2"}, "causal-lm", {})
        {'text': 'prompt', 'target': 'completion'}
    """
    if task == "causal-lm":
        return _of_causal(row, given)
    names = _NAMES[task]
    found = {key: _column(row, key, names[key], given) for key in names if key != "pair"}
    if "pair" in names and (given.get("pair") is not None or any(name in row for name in _SECONDS)):
        found["pair"] = _column(row, "pair", _SECONDS, given)
    return found


def _of_causal(row: Mapping[str, Any], given: Mapping[str, str | None]) -> dict[str, str]:
    """Return the columns of a causal language model."""
    if given.get("target") is not None:
        return {
            "text": _column(row, "text", ("prompt", *_PROSE), given),
            "target": _column(row, "target", (), given),
        }
    if given.get("text") is None and "text" not in row:
        if "prompt" in row and "completion" in row:
            return {"text": "prompt", "target": "completion"}
        if "messages" in row:
            return {"messages": "messages"}
    name = _column(row, "text", _PROSE, given)
    return {"messages" if isinstance(row[name], list) else "text": name}


def _column(row: Mapping[str, Any], key: str, usual: Iterable[str], given: Mapping[str, str | None]) -> str:
    """Return the user's column for a key, or the first usual one that the row has.

    Raises:
        ConfigError: The row has none of them.
    """
    chosen = given.get(key)
    for name in usual if chosen is None else (chosen,):
        if name in row:
            return name
    raise ConfigError(f"a row must have a column for the {key}, found {', '.join(row)}; name it by --{key}-column")
