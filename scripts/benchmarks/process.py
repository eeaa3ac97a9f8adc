"""Measured processes and their work folders."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.005
_PEAKS = ("VmHWM", "RssAnon")


@dataclass(frozen=True)
class Usage:
    """Time and memory of a process that has ended.

    Attributes:
        wall_s: seconds from its start to its end.
        cpu_s: seconds of user and system time.
        rss_gb: peak of resident memory, mapped files included.
        anonymous_gb: peak of anonymous memory, which excludes mapped files.
        output: its standard output.
    """

    wall_s: float
    cpu_s: float
    rss_gb: float
    anonymous_gb: float
    output: str

    def figures(self) -> dict[str, float]:
        """Return the four measured numbers by name."""
        return {name: getattr(self, name) for name in ("wall_s", "cpu_s", "rss_gb", "anonymous_gb")}


def run_measured(command: Sequence[str]) -> Usage:
    """Run a command and return its time and memory.

    Raises:
        SystemExit: The command failed; the message has the end of its output.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        with _peaks(process.pid) as peaks:
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        printed, complained = (_text(file) for file in (output, errors))
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:1000]}\nfailed:\n{(printed + complained)[-3000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return Usage(wall, cpu, peaks["VmHWM"] / 1e6, peaks["RssAnon"] / 1e6, printed)


def run_timed(command: Sequence[str]) -> tuple[int, float]:
    """Run a command with its output on this terminal; return its exit code and CPU seconds, children included."""
    before = os.times()
    code = subprocess.run(command, check=False).returncode
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return code, used


def _text(file: tempfile._TemporaryFileWrapper[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


@contextlib.contextmanager
def _peaks(pid: int) -> Iterator[dict[str, int]]:
    """Yield the peaks in kB of a process' status (proc(5)); a thread updates them until the block ends."""
    peaks = dict.fromkeys(_PEAKS, 0)
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(POLL_SECONDS):
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except OSError:
                return
            for line in lines:
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]))

    poller = threading.Thread(target=poll)
    poller.start()
    try:
        yield peaks
    finally:
        ended.set()
        poller.join()


@contextlib.contextmanager
def work_folder(given: Path | None, name: str) -> Iterator[Path]:
    """Yield the given folder, which is kept, or a temporary one, which is removed at the end."""
    folder = (given or Path(tempfile.mkdtemp(prefix=f"bench-{name}-"))).resolve()
    try:
        yield folder
    finally:
        if given is None:
            shutil.rmtree(folder, ignore_errors=True)


def minima(samples: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the smallest value of each figure over the runs of each command.

    Example:
        >>> minima({"linear": [{"cpu_s": 3.0}, {"cpu_s": 2.0}]})
        {'linear': {'cpu_s': 2.0}}
    """
    return {name: {key: min(run[key] for run in runs) for key in runs[0]} for name, runs in samples.items()}


def verdict(met: bool) -> str:
    """Return the word for a goal that is met or missed."""
    return "met" if met else "missed"
