"""Ranking of source tasks for a target by distance, and the quality of a ranking where all transfers are known."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from squisher_mergekit.applications.task2vec.distances import ALPHA, Metric, Task, TaskNormalize, distance_matrix
from squisher_mergekit.applications.task2vec.embedding import Embedding
from squisher_mergekit.errors import ConfigError, CorruptFileError, MismatchError, NotFoundError
from squisher_mergekit.tensors.input_files import read_text, reading

MOST_TABLE = 100_000_000  # bytes

Scores = Mapping[str, float]
"""Source -> score on the target of a network that was trained on the source first; higher is better."""
Keys = Mapping[str, float]
"""Source -> sort key, such as a distance; the smallest comes first."""


@dataclass(frozen=True)
class Quality:
    """Quality of an order of sources.

    Attributes:
        reciprocal_rank: See :func:`reciprocal_rank`.
        ndcg: See :func:`ndcg`.
        best_rank: See :func:`best_rank`.
    """

    reciprocal_rank: float
    ndcg: float
    best_rank: float


def rank(
    target: Task,
    sources: Mapping[str, Task],
    metric: Metric = "cosine",
    normalize: TaskNormalize = "mean",
    alpha: float = ALPHA,
) -> list[tuple[str, float]]:
    """Return the sources with their distance to the target, the nearest first.

    Args:
        target: Task to learn.
        sources: Name -> task on which a network was trained.
        metric: As for :func:`~squisher_mergekit.applications.task2vec.distance`, from source to target.
        normalize: As for ``distance``.
        alpha: As for ``distance``.

    Returns:
        Name and distance of each source; sources at equal distance keep their order.

    Raises:
        RefusedError: As for ``distance``.

    Example:
        >>> from torch import tensor
        >>> order = rank(tensor([1.0, 3.0]), {"far": tensor([3.0, 1.0]), "near": tensor([1.0, 2.0])})
        >>> [name for name, _ in order]
        ['near', 'far']
    """
    names = list(sources)
    tasks: dict[str, Task] = {f"source {name}": sources[name] for name in names}
    column = distance_matrix({**tasks, "the target": target}, metric, normalize, alpha)[:-1, -1].tolist()
    return sorted(zip(names, column, strict=True), key=lambda pair: pair[1])


def reciprocal_rank(keys: Keys, scores: Scores) -> float:
    """Return 1 over the rank of the best source; the expectation over all orders of equal keys.

    Args:
        keys: Source -> sort key.
        scores: Source -> score; if several are best, the first in rank counts.

    Example:
        >>> reciprocal_rank({"a": 0.3, "b": 0.1, "c": 0.2}, {"a": 0.9, "b": 0.8, "c": 0.95})
        0.5
    """
    return sum(probability / place for place, probability in _ranks_of_best(keys, scores))


def best_rank(keys: Keys, scores: Scores) -> float:
    """Return the rank of the best source, from 1; the expectation over all orders of equal keys."""
    return sum(probability * place for place, probability in _ranks_of_best(keys, scores))


def ndcg(keys: Keys, scores: Scores) -> float:
    """Return the normalised discounted cumulative gain of an order.

    ``DCG = sum_r gain_r / log2(1 + r)`` over the ranks r = 1, 2, ..., divided by that of the best order. The gain of a
    source is its score minus the lowest score, so that the worst source counts 0 on any scale. If all scores are equal,
    the result is 1. Equal keys share the mean of their discounts.

    Source:
        Järvelin and Kekäläinen (2002), with shifted gains.

    Example:
        >>> round(ndcg({"a": 1, "b": 2, "c": 3}, {"a": 0.5, "b": 0.9, "c": 0.7}), 4)
        0.6697
    """
    low = min(scores[source] for source in keys)
    gains = {source: scores[source] - low for source in keys}
    best = sum(gain / math.log2(1 + place) for place, gain in enumerate(sorted(gains.values(), reverse=True), 1))
    if best == 0:
        return 1.0
    found = 0.0
    for first, group in _groups(keys):
        discount = sum(1 / math.log2(1 + first + offset) for offset in range(len(group))) / len(group)
        found += discount * sum(gains[source] for source in group)
    return found / best


def quality(keys: Keys, scores: Scores) -> Quality:
    """Return all measures of one order; equal keys stand for a random order."""
    return Quality(reciprocal_rank(keys, scores), ndcg(keys, scores), best_rank(keys, scores))


def mrr(keys: Mapping[str, Keys], scores: Mapping[str, Scores]) -> float:
    """Return the mean of :func:`reciprocal_rank` over targets.

    Args:
        keys: Target -> source -> sort key.
        scores: Target -> source -> score.

    Example:
        >>> mrr({"t": {"a": 1, "b": 2}, "u": {"a": 1, "b": 2}}, {"t": {"a": 5, "b": 3}, "u": {"a": 3, "b": 5}})
        0.75
    """
    return sum(reciprocal_rank(keys[target], scores[target]) for target in keys) / len(keys)


def assess(
    distances: Mapping[str, Keys], transfer: Mapping[str, Scores], sizes: Mapping[str, float] | None = None
) -> dict[str, dict[str, Quality]]:
    """Return the quality of three orders of sources: by distance, by size of the data (the largest first), at random.

    Args:
        distances: Target -> source -> distance.
        transfer: Target -> source -> score, for every pair.
        sizes: Task -> number of examples; None omits the order by size.

    Returns:
        Order (``distance``, ``size``, ``random``) -> target -> quality; the target ``mean`` has the mean over targets.
    """
    orders = {"distance": distances}
    if sizes is not None:
        orders["size"] = {target: {source: -sizes[source] for source in keys} for target, keys in distances.items()}
    orders["random"] = {target: dict.fromkeys(keys, 0.0) for target, keys in distances.items()}
    found = {}
    for order, targets in orders.items():
        rows = {target: quality(keys, transfer[target]) for target, keys in targets.items()}
        columns = zip(*(vars(row).values() for row in rows.values()), strict=True)
        found[order] = rows | {"mean": Quality(*(sum(column) / len(rows) for column in columns))}
    return found


def orders_of(matrix: Tensor, names: list[str], targets: list[str]) -> dict[str, dict[str, float]]:
    """Return target -> source -> distance from a matrix of distances between all names."""
    columns = {name: matrix[:, place].tolist() for place, name in enumerate(names)}
    return {
        target: {source: columns[target][place] for place, source in enumerate(names) if source != target}
        for target in targets
    }


def known_sizes(tasks: Mapping[str, Embedding]) -> dict[str, float] | None:
    """Return task -> number of examples of its Fisher; None if a Fisher does not record it."""
    found = {name: task.info.num_examples for name, task in tasks.items()}
    sizes = {name: float(size) for name, size in found.items() if size is not None}
    return sizes if len(sizes) == len(found) else None


def _groups(keys: Keys) -> Iterator[tuple[int, list[str]]]:
    """Yield the first rank and the sources of each key, in order of the keys."""
    place = 1
    for key in sorted(set(keys.values())):
        group = [source for source in keys if keys[source] == key]
        yield place, group
        place += len(group)


def _ranks_of_best(keys: Keys, scores: Scores) -> Iterator[tuple[int, float]]:
    """Yield each possible rank of the first best source, and its probability."""
    best = max(scores[source] for source in keys)
    first, group = next((first, group) for first, group in _groups(keys) if any(scores[s] == best for s in group))
    size, hits = len(group), sum(scores[source] == best for source in group)
    for offset in range(size - hits + 1):
        yield first + offset, math.comb(size - offset - 1, hits - 1) / math.comb(size, hits)


def read_transfer(path: Path, names: list[str], targets: list[str]) -> dict[str, dict[str, float]]:
    """Read a table of transfer results.

    Args:
        path: JSON, ``{target: {source: score}}`` or a list of ``{"target": ..., "source": ..., "score": ...}``; or CSV
            with the columns ``target``, ``source`` and ``score``.
        names: All tasks.
        targets: Tasks that need a score from every other task.

    Returns:
        Target -> source -> score, without the scores of a task from itself.

    Raises:
        NotFoundError: The file does not exist.
        CorruptFileError: The file is not such a table.
        MismatchError: The table names an unknown task, has a pair twice, or lacks a pair.
    """
    found: dict[str, dict[str, float]] = {}
    for target, source, score in _rows(path):
        for name in (target, source):
            if name not in names:
                raise MismatchError(
                    f"{path} must name the tasks that are given ({', '.join(names)}), found {name!r}; give that task "
                    "as well, or leave its rows out"
                )
        if source in found.setdefault(target, {}):
            raise MismatchError(f"{path} must have one score a pair, but it has two for {target} from {source}")
        found[target][source] = score
    for target in targets:
        for source in names:
            if source not in (target, *found.get(target, ())):
                raise MismatchError(f"{path} must have a score for every pair, but {target} from {source} is missing")
    return {target: {source: found[target][source] for source in names if source != target} for target in targets}


def read_sizes(path: Path, names: list[str]) -> dict[str, float]:
    """Read the number of examples of each task: JSON, ``{task: size}``, or CSV with the columns ``task`` and ``size``.

    Raises:
        NotFoundError: The file does not exist.
        CorruptFileError: The file is not such a table.
        MismatchError: The table lacks a task, or names an unknown one.
    """
    data = _read(path)
    if isinstance(data, dict):
        data = [{"task": task, "size": size} for task, size in data.items()]
    found = {_text(row, "task", path): _number(row, "size", path) for row in data}
    wrong = next((name for name in (*names, *found) if name not in found or name not in names), None)
    if wrong is not None:
        fault = "lacks" if wrong in names else "names, beside those,"
        raise MismatchError(
            f"{path} must have the size of the tasks given ({', '.join(names)}), but it {fault} {wrong}"
        )
    return found


def _rows(path: Path) -> Iterator[tuple[str, str, float]]:
    data = _read(path)
    if isinstance(data, dict):
        if not all(isinstance(scores, dict) for scores in data.values()):
            raise CorruptFileError(f'{path} must be JSON like {{"target": {{"source": 0.9}}}} or a list of rows')
        data = [{"target": t, "source": s, "score": score} for t, scores in data.items() for s, score in scores.items()]
    for row in data:
        yield _text(row, "target", path), _text(row, "source", path), _number(row, "score", path)


def _read(path: Path) -> Any:
    """Return the rows of a CSV file, or the object or list in a JSON file."""
    if not path.is_file():
        raise NotFoundError(f"a table must be a JSON or CSV file, but there is no {path}")
    with reading(path, "a table in JSON (.json) or CSV", "correct it"):
        text = read_text(path, MOST_TABLE)
        data = json.loads(text) if path.suffix.lower() == ".json" else list(csv.DictReader(text.splitlines()))
    if not isinstance(data, dict | list) or (isinstance(data, list) and not all(isinstance(r, dict) for r in data)):
        raise CorruptFileError(f"{path} must be a JSON object or a list of rows, found {type(data).__name__}")
    return data


def _text(row: Mapping[str, Any], key: str, path: Path) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise CorruptFileError(f"{path} must have a {key} in every row, found the row {dict(row)}")
    return value.strip()


def _number(row: Mapping[str, Any], key: str, path: Path) -> float:
    try:
        value = float(row[key])
    except (KeyError, TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{path} must have a finite {key} in every row, found the row {dict(row)}")
    return value
