"""From a file or a dataset of the Hub to rows, and which of their columns is what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from squisher_mergekit.errors import ConfigError, NotFoundError

DataTask = Literal["causal-lm", "sequence-classification", "token-classification", "seq2seq", "masked-lm", "regression"]

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
# Names that columns usually have, in the order in which they are looked for.
_TEXTS = ("text", "sentence", "sentence1", "premise", "question", "source", "input", "document", "article")
_SECONDS = ("text_pair", "sentence2", "hypothesis")
_TARGETS = ("target", "summary", "highlights", "output", "answer")
_LABELS = ("label", "labels", "class")
# Of a row with more than one text, a language model would silently see only one: such rows need to be told what is
# what, so that names of questions, inputs and sources are not here.
_PROSE = ("text", "sentence", "document", "article")
_CLASSIFIED = {"text": _TEXTS, "label": _LABELS, "pair": _SECONDS}
_NAMES: dict[DataTask, dict[str, tuple[str, ...]]] = {
    "causal-lm": {"text": _PROSE},
    "masked-lm": {"text": _PROSE},
    "sequence-classification": _CLASSIFIED,
    "regression": _CLASSIFIED,
    "token-classification": {"text": ("tokens", "words"), "label": ("tags", "ner_tags", "labels")},
    "seq2seq": {"text": _TEXTS, "target": _TARGETS},
}


def read_rows(data: str, split: str = "train", limit: int | None = None) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a jsonl, json, csv, tsv, parquet or text file, or of a dataset on the Hub.

    Each may be compressed (``rows.jsonl.gz``), but for parquet, which compresses itself. Of a text file each line is
    a row, with the column ``text``.

    Args:
        data: The file, or the Hub's name of a dataset, ``org/name`` or ``org/name:configuration``.
        split: Of a dataset.
        limit: At most so many.

    Raises:
        NotFoundError: There is no such file, and no such dataset.
        ConfigError: The file's name does not say what it is.
    """
    import datasets

    path = Path(data).expanduser()
    try:
        if path.is_file():
            kind, options = _reader(path)
            rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)
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


def _reader(path: Path) -> tuple[str, dict[str, str]]:
    """Return the reader of :mod:`datasets` for a file, by its name, and the reader's options."""
    compressed = path.suffix == ".gz"
    suffix = path.with_suffix("").suffix if compressed else path.suffix
    kind = _READERS.get(suffix)
    if kind is None:
        raise ConfigError(f"{path} must end in one of {', '.join(_READERS)}, .gz may follow; convert it")
    if compressed and kind == "parquet":
        raise ConfigError(f"{path} must end in .parquet, which compresses itself; decompress it")
    return kind, {"sep": "\t"} if suffix == ".tsv" else {}


def columns_of(row: Mapping[str, Any], task: DataTask, given: Mapping[str, str | None]) -> dict[str, str]:
    """Return which column of a row is what: ``text``, and by task ``pair``, ``target`` and ``label``.

    For a causal language model that is one of three: ``text`` alone; ``text`` and ``target``, a prompt and its
    completion; or ``messages``, a conversation. Where the user names none, it is the column ``text`` if there is one,
    then ``prompt`` and ``completion``, then ``messages``.

    Args:
        row: The first one.
        task: What the model does.
        given: The user's choice, by the same keys. Naming a ``target`` makes ``text`` of a causal language model a
            prompt; a ``text`` that holds a list is a conversation.

    Raises:
        ConfigError: A column that is needed is not there.

    Example:
        >>> columns_of({"sentence": "a", "label": 1}, "sequence-classification", {})
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
    """Return the columns of a causal language model's row."""
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
    """Return the column that the user chose for a key, or the first of the usual ones that is there.

    Raises:
        ConfigError: There is none.
    """
    chosen = given.get(key)
    for name in usual if chosen is None else (chosen,):
        if name in row:
            return name
    raise ConfigError(f"a row must have a column for the {key}, found {', '.join(row)}; name it by --{key}-column")
