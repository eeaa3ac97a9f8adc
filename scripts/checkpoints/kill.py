"""Kill every verb at random file operations, and verify that no part of an output and no loss of an older one remains.

A trial forks a process, which runs a verb and dies of SIGKILL, SIGTERM or SIGINT just before a random file operation.
OUT is new, an empty folder, or has an older output. A trial passes if

* under the final name is the older output, unchanged, or the complete new one;
* after SIGTERM and SIGINT no temporary file remains;
* the same call afterwards gives the result of an uninterrupted run, and removes all temporary files.

    python -m scripts.checkpoints.kill --trials 300 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.checkpoints.kill_verbs import Verb, make_world, verbs

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STATES = ("new", "empty", "existing")
FAILURES = ("part under final name", "older output lost", "temporary left", "rerun differs")
_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.chmod", "os.chown", "shutil.")
Contents = dict[str, str]


@dataclass
class Operations:
    """Counter of the file operations below a folder, which kills the process before one of them.

    Attributes:
        folder: The folder; None counts nothing.
        count: Operations until now.
        at: Operation to die before; None for no death.
        signal: The signal.
    """

    folder: str | None = None
    count: int = 0
    at: int | None = None
    signal: int = signal.SIGKILL

    def tick(self) -> None:
        """Count one operation."""
        if self.folder is None:
            return
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), self.signal)

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that counts one operation before each call."""

        def counted(*arguments: Any) -> Any:
            self.tick()
            return function(*arguments)

        return counted

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count an operation that Python reports."""
        if self.folder is not None and event.startswith(_OPERATIONS):
            named = any(isinstance(item, str | Path) and self.folder in str(item) for item in arguments)
            if named or event in ("os.link", "os.rename"):
                self.tick()


def contents(out: Path) -> Contents:
    """Return name -> digest of the files of an output; readers of a Fisher see a replacement under way."""
    from squisher_mergekit.fisher.write import fisher_files
    from squisher_mergekit.tensors.folder_moves import settled

    if out.is_file():
        return {"": digest(out)}
    files = [path for path in out.rglob("*") if path.is_file() and not hidden(path, out)] if out.is_dir() else []
    place = settled(out)
    if place != out:
        files = [path for path in files if not path.name.startswith("fisher")] + fisher_files(out)
    return {str(path.relative_to(place if place in path.parents else out)): digest(path) for path in files}


def digest(file: Path) -> str:
    """Return a hash of a file; the order of the keys in a safetensors header does not count."""
    data = file.read_bytes()
    with contextlib.suppress(ValueError):
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        data = json.dumps(header, sort_keys=True).encode() + data[8 + size :]
    return hashlib.sha256(data).hexdigest()


def hidden(path: Path, out: Path) -> bool:
    """Return True for a file in a temporary folder."""
    return any(".squisher" in part for part in path.relative_to(out).parts)


def left_over(folder: Path) -> list[str]:
    """Return the temporary files below a folder."""
    return [str(path) for path in folder.rglob("*") if ".squisher" in path.name]


def forked(work: Callable[[], Any]) -> int:
    """Run a function in a child process without output, and return the child's status: 0, 1, or minus the signal."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    code = 1
    with contextlib.suppress(BaseException):
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        work()
        code = 0
    os._exit(code)


def died_early(operations: Operations, run: Callable[[], Any]) -> Callable[[], Any]:
    """Return the function with the handlers of the command line, whose signals clean up."""
    from squisher_mergekit.tensors.temporary import ENDINGS, cleaned_up_at_signals

    def work() -> None:
        with cleaned_up_at_signals(ENDINGS):
            run()

    return work


def prepare(verb: Verb, state: str, place: Path) -> Path:
    """Make the folder of a trial, and return OUT in it."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    out = place / ("out.safetensors" if verb.is_file else "out")
    if state == "empty":
        out.mkdir()
    if state == "existing" and verb.older is not None:
        verb.older(out)
    return out


def judge(verb: Verb, now: Contents, before: Contents, whole: Contents) -> str | None:
    """Return the failure that the contents of OUT after a kill show, if any."""
    if now in (before, whole):
        return None
    if verb.replaces and not verb.entry:
        return FAILURES[0]
    older = {name: now.get(name) for name in before}
    lost = [name for name, digest in before.items() if older[name] not in (digest, whole.get(name))]
    if lost:
        return FAILURES[1]
    entries = verb.entry or tuple(whole)
    made = [name for name in now if name in entries and now[name] != before.get(name)]
    # mergekit itself writes the config after the tensors.
    alone: Iterable[str] = made if verb.separate else entries if verb.entry == ("model.safetensors",) else whole
    judged = {name: whole[name] for name in alone}
    complete = all(now.get(name) == digest for name, digest in judged.items())
    return FAILURES[0] if made and not complete else None


@dataclass(frozen=True)
class Expected:
    """Uninterrupted run of a verb.

    Attributes:
        before: Contents of OUT before it.
        whole: Contents after it.
        operations: Number of its file operations.
    """

    before: Contents
    whole: Contents
    operations: int


def counted_operations() -> Operations:
    """Return the counter of this process's file operations, hooked into Python and into the writer of tensors."""
    from squisher_mergekit.tensors.writer import SafetensorsWriter

    operations = Operations()
    sys.addaudithook(operations.hook)
    os.fsync = operations.before(os.fsync)
    SafetensorsWriter._write = operations.before(SafetensorsWriter._write)  # type: ignore[method-assign]
    return operations


def cases_of(known: Mapping[str, Verb]) -> list[tuple[str, str]]:
    """Return the pairs of a verb and a state of OUT that make sense."""
    return [
        (name, state)
        for name, verb in known.items()
        for state in STATES
        if not (verb.is_file and state == "empty") and not (state == "existing" and verb.older is None)
    ]


def uninterrupted(verb: Verb, state: str, place: Path, operations: Operations) -> Expected:
    """Run a verb to its end."""
    out = prepare(verb, state, place)
    before = contents(out)
    operations.folder, operations.count = str(place), 0
    with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        verb.run(out)
    operations.folder = None
    if left_over(place):
        print(f"an uninterrupted run leaves {left_over(place)}")
    return Expected(before, contents(out), operations.count)


def trial(
    verb: Verb, state: str, place: Path, expected: Expected, operations: Operations, chance: random.Random
) -> tuple[Counter[str], str]:
    """Kill a verb before one operation, run it again, and return the counts and a description of the kill."""
    out = prepare(verb, state, place)
    ending, at = chance.choice(SIGNALS), chance.randint(1, expected.operations)

    def run(at: int | None) -> None:
        operations.folder, operations.count = str(place), 0
        operations.at, operations.signal = at, ending
        died_early(operations, lambda: verb.run(out))()

    status = forked(lambda: run(at))
    now, left = contents(out), left_over(place)
    row = Counter(trials=1, killed=int(status == -ending))
    failure = judge(verb, now, expected.before, expected.whole)
    if failure:
        row[failure] += 1
    if ending != signal.SIGKILL and left:
        row[FAILURES[2]] += 1
    if now == expected.whole and not verb.replaces:
        row["complete"] += 1
    else:
        forked(lambda: run(None))
        if contents(out) != expected.whole or left_over(place):
            row[FAILURES[3]] += 1
    told = f"OUT {state}, {ending.name} before operation {at} of {expected.operations} ({status})"
    return row, f"{told}; before {sorted(expected.before)}, now {sorted(now)}, left {left}"


def print_table(table: Mapping[str, Counter[str]]) -> Counter[str]:
    """Print the counts of each verb and their sum; return the sum."""
    columns = ("trials", "killed", "complete", *FAILURES)
    print("verb".ljust(16), *(column.rjust(max(len(column), 6)) for column in columns))
    total: Counter[str] = sum(table.values(), Counter())
    for name, row in [*table.items(), ("all", total)]:
        print(name.ljust(16), *(str(row[column]).rjust(max(len(column), 6)) for column in columns))
    return total


def main() -> int:
    """Run the trials, print the table, and return 1 after a failure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, begin = random.Random(options.seed), time.monotonic()
    import tqdm

    tqdm.tqdm.monitor_interval = 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with SIGINT ignored
    operations = counted_operations()
    table: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory(prefix="squisher-kill-") as folder:
        root = Path(folder).resolve()
        make_world(root)
        known, place = verbs(root), root / "trial"
        cases = cases_of(known)
        expected = {case: uninterrupted(known[case[0]], case[1], place, operations) for case in cases}
        print(f"{len(cases)} cases, {time.monotonic() - begin:.0f} s", flush=True)
        for number in range(options.trials):
            name, state = cases[number % len(cases)]
            row, told = trial(known[name], state, place, expected[name, state], operations, chance)
            table.setdefault(name, Counter()).update(row)
            if failures := [failure for failure in FAILURES if row[failure]]:
                print(f"{name}: {failures}: {told}", flush=True)
    print(f"seed {options.seed}, {time.monotonic() - begin:.0f} s")
    total = print_table(table)
    return int(any(total[failure] for failure in FAILURES))


if __name__ == "__main__":
    sys.exit(main())
