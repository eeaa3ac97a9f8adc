"""Sweep: merges a grid of parameters, scores each model by a command, and keeps a table and the best model."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from squisher_mergekit.errors import ConfigError, CorruptFileError, RefusedError
from squisher_mergekit.recipes.grid import label
from squisher_mergekit.tensors.atomic import claimed_folder, write_json, write_whole
from squisher_mergekit.tensors.input_files import brief, read_text
from squisher_mergekit.tensors.temporary import cleaned_up, shortened

BEST, MODELS, TABLE, STATE = "best", "models", "sweep.csv", "sweep.json"
_WORK = ".merging"  # a killed sweep leaves it behind
_REPLACED = "replaced"  # in _WORK
# Files that a merge reads; others, such as logs, can change.
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp")
_CONFIGS = ("config.json", "adapter_config.json", "fisher_config.json")
# A number by itself: digits within a word, such as those of f1, 7b or a path run6, are none.
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?)(?![\w.]*\w)", re.IGNORECASE
)
_COMMA = re.compile(r"\d,(?:\d+|\d{3}\.\d*)$")
Merge = Callable[[Mapping[str, Any], Path], None]
Score = Callable[[Path], float]
Progress = Callable[[Sequence[Mapping[str, Any]]], Iterable[Mapping[str, Any]]]


@dataclass
class Sweep:
    """Finished points of a sweep in its folder; an interrupted sweep continues there.

    Attributes:
        folder: Folder of the sweep.
        points: Points of the grid.
        identity: Digest of configuration, grid and command; another sweep cannot continue in the folder.
        higher: True if the highest score is the best.
        keep_all: True to keep all models, not the best alone.
        inputs: Digest of the files that the merges read, see :func:`inputs_of`.
        scores: Label of a point -> score.
    """

    folder: Path
    points: Sequence[Mapping[str, Any]]
    identity: str
    higher: bool = True
    keep_all: bool = False
    inputs: str = ""
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> str | None:
        """Label of the best point; of equal ones the first. None before the first point."""
        if not self.scores:
            return None
        return (max if self.higher else min)(self.scores, key=self.scores.__getitem__)

    def resume(self) -> None:
        """Read the finished points of an earlier run.

        Raises:
            ConfigError: The folder belongs to another sweep, or has other files, or a model or a Fisher has changed.
            CorruptFileError: The state is damaged.
        """
        state = self.folder / STATE
        if not state.exists():
            if self.folder.is_dir() and any(item.name != _WORK for item in self.folder.iterdir()):
                raise ConfigError(
                    f"-o must be a new folder or that of a sweep, but {self.folder} has other files; choose another"
                )
            return
        try:
            kept = json.loads(read_text(state))
            identity, scores = kept["identity"], {str(key): float(value) for key, value in kept["scores"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(
                f"{state} must be the state of a sweep, found {brief(error)}; remove the folder"
            ) from None
        if identity != self.identity:
            raise ConfigError(
                f"{self.folder} must belong to this sweep, but its configuration, grid or command was another; choose "
                "another folder, or remove it"
            )
        if kept.get("inputs", self.inputs) != self.inputs:
            raise ConfigError(
                f"the models and Fishers must be those of the finished points in {self.folder}, but one of their files "
                "has changed since; choose another folder, or remove it"
            )
        self.scores = scores
        if self.best is None or (place := self.place(self.best)).is_dir():
            return
        replaced = self.folder / _WORK / _REPLACED
        if not replaced.is_dir():
            raise ConfigError(f"the best model so far must be at {place}, but is not; remove {self.folder}")
        replaced.rename(place)  # a process was killed between the two renames of _put

    def place(self, name: str) -> Path:
        """Return the folder of a finished point's model."""
        return self.folder / MODELS / self._file_name(name) if self.keep_all else self.folder / BEST

    def _file_name(self, name: str) -> str:
        """Return the name of a point's folder: its label; with a digest where another has that name, or it is long."""
        names = [label(point).replace("/", "_") for point in self.points]
        plain = name.replace("/", "_")
        if names.count(plain) <= 1 and shortened(plain) == plain:
            return plain
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return f"{shortened(plain)}~{digest}"

    def run(self, merge: Merge, score: Score, progress: Progress = iter) -> None:
        """Merge and score the points that are not finished, and keep the table after each.

        Args:
            merge: Function that merges a point into a folder.
            score: Function from the folder of a model to its score.
            progress: Function that yields the points and shows the progress.

        Raises:
            RefusedError: A merge or the command fails; the finished points are kept.
            OutputError: Another process runs a sweep in the folder.
        """
        work, is_new = self.folder / _WORK, not self.folder.exists()

        def clean_up() -> None:
            shutil.rmtree(work, ignore_errors=True)
            if is_new:
                with contextlib.suppress(OSError):  # it has finished points
                    self.folder.rmdir()

        work.mkdir(parents=True, exist_ok=True)
        with claimed_folder(work), cleaned_up(clean_up):
            for point in progress(self.points):
                if label(point) not in self.scores:
                    self._finish(point, merge, score, work)

    def _finish(self, point: Mapping[str, Any], merge: Merge, score: Score, work: Path) -> None:
        """Merge and score one point, and keep its score, and its model if it is the best or all are kept."""
        _empty(work)
        name, before = label(point), self.best
        place = self.place(name)
        made = work / place.name  # the model card has the name of the folder
        merge(point, made)
        self.scores[name] = score(made)
        if self.keep_all or self.best != before:
            place.parent.mkdir(parents=True, exist_ok=True)
            _put(made, place, work / _REPLACED)
        state = {"identity": self.identity, "inputs": self.inputs, "best": self.best, "scores": self.scores}
        write_json(self.folder / STATE, state)
        write_whole(self.folder / TABLE, table(self.points, self.scores).encode())


def _put(made: Path, place: Path, replaced: Path) -> None:
    """Move a model to its place, and the model that is there to another; an interrupt leaves the earlier model."""
    try:
        if place.exists():
            place.rename(replaced)
        made.rename(place)
    except BaseException:
        if replaced.exists() and not place.exists():
            replaced.rename(place)
        raise


def _empty(folder: Path) -> None:
    """Remove the contents of a folder."""
    for item in folder.iterdir():
        shutil.rmtree(item, ignore_errors=True)


def identity(document: Mapping[str, Any], grid: Mapping[str, Sequence[Any]], command: str, higher: bool) -> str:
    """Return the digest that identifies a sweep."""
    text = json.dumps([document, grid, command, higher], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def inputs_of(paths: Iterable[Path]) -> str:
    """Return the digest of size and time of change of the weights, Fishers and configurations below some paths.

    Args:
        paths: Folders of models, and files and folders of Fishers.
    """
    given = set(paths)
    found = {file for path in given for file in (path, *path.rglob("*"))}
    states = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for file in found
        if file.is_file() and (file in given or file.suffix in _ENDINGS or file.name in _CONFIGS)
    ]
    return hashlib.sha256(json.dumps(sorted(states)).encode()).hexdigest()


def table(points: Sequence[Mapping[str, Any]], scores: Mapping[str, float]) -> str:
    """Return the scores of the finished points as CSV.

    Example:
        >>> print(table([{"lambda": 1}, {"lambda": 2}], {"lambda=1": 81.5}), end="")
        lambda,score
        1,81.5
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*points[0], "score"])
    for point in points:
        if label(point) in scores:
            writer.writerow([*point.values(), scores[label(point)]])
    return text.getvalue()


def score_of(output: str) -> float | None:
    """Return the last number in the output of a command; None if there is none, or it is not finite.

    A comma between digits could be that of thousands, of decimals or of a table: ``1,234`` and ``81,5`` are none.

    Example:
        >>> score_of("accuracy on 200 texts: 0.815 (81.5 %)")
        81.5
        >>> score_of("0.62 (macro f1)")
        0.62
    """
    numbers = list(_NUMBER.finditer(output))
    if not numbers or _COMMA.search(output[: numbers[-1].end()]):
        return None
    value = float(numbers[-1][0])
    return value if math.isfinite(value) else None


def command_score(command: str, model: Path) -> float:
    """Run an evaluation command on a model, and return the last number on its standard output.

    Args:
        command: Shell command, with ``{model}`` for the folder of the model.
        model: The folder.

    Raises:
        RefusedError: The command fails, or prints no number.
    """
    done = subprocess.run(
        command.replace("{model}", shlex.quote(str(model))),
        shell=True,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise RefusedError(
            f"the command of --eval must succeed, but ended with code {done.returncode} for {model}; run it by itself "
            "on one of the models"
        )
    value = score_of(done.stdout)
    if value is None:
        raise RefusedError(
            "the command of --eval must print a score as its last number, but printed "
            f"{done.stdout.strip()[-80:]!r}; print the score last"
        )
    return value
