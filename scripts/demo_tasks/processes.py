"""Child processes with a progress bar: workers that fine-tune and score, and mergekit's command."""

import contextlib
import json
import os
import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from scripts import ROOT
from scripts.demo_tasks.assets import DemoError


@dataclass(frozen=True)
class Timed:
    """Result of a child process, with its wall and CPU seconds."""

    result: Any
    seconds: float
    cpu: float


class Progress:
    """Progress bar over all stages, in expected seconds.

    Args:
        total: Sum of the expected seconds of all stages.
        file: Stream for the bar; stderr by default.
    """

    def __init__(self, total: float, file: Any = None) -> None:
        file = file or sys.stderr
        form = "{desc:<28} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        seldom = 0.2 if file.isatty() else 15.0
        self._bar = tqdm(total=total, file=file, bar_format=form, mininterval=seldom, maxinterval=seldom)
        self._lock = threading.Lock()
        self._ends = threading.Event()
        if file.isatty():
            threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        while not self._ends.wait(1.0):
            with self._lock:
                self._bar.refresh()

    @contextlib.contextmanager
    def stage(self, label: str, weight: float) -> Iterator[Callable[[float], None]]:
        """Show the label of a stage, and yield a function that moves the bar by a share of the stage."""
        left = weight

        def advance(share: float) -> None:
            nonlocal left
            with self._lock:
                step = min(left, share * weight)
                left -= step
                self._bar.update(step)

        with self._lock:
            self._bar.set_description(label)
        yield advance
        advance(1.0)

    def close(self) -> None:
        """Stop the bar and go to the next line."""
        self._ends.set()
        with self._lock:
            self._bar.close()


def environment() -> dict[str, str]:
    """Return the environment of the children: one thread each, no network, this package importable."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}
    return {**os.environ, **fixed}


class Workers:
    """Worker processes of ``scripts.demo_tasks.worker``, for use in a ``with`` statement.

    Args:
        count: Number of processes.
        log: File for their output.
    """

    def __init__(self, count: int, log: Path) -> None:
        self._log = log
        self._all: list[subprocess.Popen[str]] = []
        self._free: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        with log.open("a") as output:
            for _ in range(count):
                process = subprocess.Popen(
                    [sys.executable, "-m", "scripts.demo_tasks.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    text=True,
                    env=environment(),
                )
                self._all.append(process)
                self._free.put(process)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._all:
            if kind is not None:
                process.kill()
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
            process.wait()

    def wait(self) -> None:
        """Wait until every worker has imported its modules."""
        for process in self._all:
            self._next(process, "ready")

    def run(self, jobs: list[dict[str, Any]], advance: Callable[[float], None]) -> list[Timed]:
        """Run jobs on free workers, and return the results in the order of the jobs."""

        def one(job: dict[str, Any]) -> Timed:
            process = self._free.get()
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
                event = self._next(process, "result", lambda share: advance(share / len(jobs)))
            finally:
                self._free.put(process)
            return Timed(event["result"], event["seconds"], event["cpu"])

        with ThreadPoolExecutor(len(self._all)) as threads:
            return list(threads.map(one, jobs))

    def _next(
        self, process: "subprocess.Popen[str]", wanted: str, advance: Callable[[float], None] | None = None
    ) -> dict[str, Any]:
        assert process.stdout is not None
        for line in process.stdout:
            event: dict[str, Any] = json.loads(line)
            if wanted in event:
                return event
            if "error" in event:
                raise DemoError(f"a worker failed: {event['error']} ({self._log} has more)")
            if advance is not None:
                advance(event["share"])
        raise DemoError(f"a worker ended early with exit code {process.wait()} ({self._log} has more)")


def mergekit_yaml(config: Path, out: Path, advance: Callable[[float], None], expected: float) -> Timed:
    """Run the stock ``mergekit-yaml`` of this environment on a configuration.

    Args:
        config: YAML file.
        out: Output folder.
        advance: Function that moves the bar; by time, because mergekit reports no share.
        expected: Seconds after which the bar stops.

    Returns:
        The output, with wall and CPU seconds.

    Raises:
        DemoError: The command exits with another code than 0.
    """
    program = Path(sys.executable).with_name("mergekit-yaml")
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with out.with_suffix(".log").open("w+") as log:
        process = subprocess.Popen(
            [program, config, out, "--no-write-model-card"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
                    break
                advance(0.1 / expected)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        printed = log.read()
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise DemoError(f"mergekit-yaml {config} ended with exit code {process.returncode}:\n{printed[-2000:]}")
    return Timed(printed, seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
