"""Damage real checkpoints, and verify that each is read right or refused.

Each trial takes a checkpoint from tests/fixtures/optimizer_states (all layouts), damages one of its files, and reads
all of it with load_fisher. The damage flips, cuts, inserts, overwrites or exchanges bytes; changes a pickle inside its
archive and updates the checksum; makes a pickle call code; or drops keys and gives tensors other shapes, types, strides
or devices. A trial passes if the reader returns the tensors that the training run had in memory (or some of them: a
dropped key is a parameter without a step), or raises an error of this package. A crash, a hang, a wrong tensor, another
exception, too much memory, or executed code is a failure; then the program exits with 1.

A format without checksums over its values (torch before 1.6) cannot reveal a flipped byte. Such trials count as
unchecked, and so do trials that exchange the index of a parameter in a pickle and update its checksum.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts import ROOT
from scripts.checkpoints.damage import MARKER, damage

STATES = ROOT / "tests" / "fixtures" / "optimizer_states"
SECONDS, GIGABYTE = 10, 1 << 30
MOST_ADDRESSES = 16 * GIGABYTE
ROUND = 250  # trials of one process, which then is replaced
WRONG = "FAILED: "
Worker = Callable[[int, range, str | None, Any], None]
OUTCOMES = ("right", "partly", "refused", "unchecked", "FAILED")


class Hang(BaseException):
    """Timeout of a trial; a BaseException, so that no handler of Exception catches it."""


class Case:
    """Checkpoint with its files, its base model and the second moments to find."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self.name = folder.name
        self.files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.name not in ("case.json", "expected.safetensors")
        }
        self.base = next((name for name in ("base", "base_config") if (folder / name).is_dir()), None)
        self.truth = load_file(folder / "expected.safetensors")
        self.tolerance = 1e-6 if "adafactor" in folder.name else 0.0
        # Files of the optimizer state; most trials damage one of these.
        weights = ("model.safetensors", "config.json", "trainer_state.json", "adapter_model.safetensors")
        self.states = sorted(name for name in self.files if not name.endswith(weights) and "base" not in name)


def legacy(content: bytes) -> bytes:
    """Convert a file of torch.save to the format of torch before 1.6, which has no checksums."""
    import torch

    out = io.BytesIO()
    torch.save(torch.load(io.BytesIO(content), weights_only=True), out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def load_cases() -> list[Case]:
    """Return all checkpoints with known second moments, and one more in torch's old format."""
    cases = [Case(path.parent) for path in sorted(STATES.glob("*/expected.safetensors"))]
    old = Case(STATES / "plain_adamw_named")
    old.name, old.files["optimizer.pt"] = "plain_adamw_named (old format)", legacy(old.files["optimizer.pt"])
    return [*cases, old]


# ---- one trial


def judge(case: Case, folder: Path) -> str:
    """Read a checkpoint and return the outcome."""
    import torch

    from squisher_mergekit import load_fisher
    from squisher_mergekit.errors import SquisherError
    from squisher_mergekit.fisher.values import check_values

    try:
        fisher = load_fisher(folder, base=folder / case.base if case.base else None)
        tensors = {name: fisher[name] for name in fisher}
        for name, tensor in tensors.items():
            check_values(tensor, name, fisher.location)
    except SquisherError as error:
        if "\n" in str(error):
            raise AssertionError(f"an error of several lines: {error!s:.300}") from error
        return "refused"
    for name, tensor in tensors.items():
        true = case.truth[name]
        if tensor.shape != true.shape:
            raise AssertionError(f"{name} has shape {list(tensor.shape)}, not {list(true.shape)}")
        true = true.to(tensor.dtype)  # a tensor saved in another dtype is rounded
        if not torch.allclose(tensor.double(), true.double(), rtol=case.tolerance, atol=0):
            same = (other for other, t in case.truth.items() if torch.equal(t.to(tensor.dtype), tensor))
            raise AssertionError(f"{name} differs from the truth{''.join(f': it is that of {o}' for o in same)}")
    return "right" if set(tensors) == set(case.truth) else "partly"


def trial(case: Case, chance: random.Random, folder: Path) -> tuple[str, str]:
    """Damage a copy of a checkpoint, judge it, and restore it; return the damage and the outcome."""
    states = case.states if chance.random() < 0.95 else sorted(case.files)
    name = chance.choice(states)
    way, content = damage(name, case.files[name], chance)
    way = f"{case.name}: {way} of {name}"
    file = folder / name
    file.write_bytes(content)
    outcome = guarded(lambda: judge(case, folder))
    if outcome.startswith(WRONG):
        # No reader can detect changed numbers or names in a file without checksums.
        unchecked = content[:2] != b"PK" and not name.endswith((".metadata", ".distcp")) and "differs" in outcome
        # No reader can detect an exchanged index of a parameter in a pickle with a valid checksum.
        unchecked = unchecked or (": pickle of" in way and "it is that of" in outcome)
        outcome = "unchecked" if unchecked else outcome
    file.unlink(missing_ok=True)
    file.write_bytes(case.files[name])
    if Path(MARKER).exists() or (folder / MARKER).exists():
        Path(MARKER).unlink(missing_ok=True)
        outcome = "FAILED: code was run"
    return way, outcome


def guarded(judged: Callable[[], str]) -> str:
    """Return the outcome of a trial; every exception but a refusal, and every hang, is a failure."""
    signal.alarm(SECONDS)
    try:
        return judged()
    except AssertionError as error:
        return f"{WRONG}{error}" if not _frames(error) else f"FAILED: AssertionError: {error!s:.300}{_frames(error)}"
    except Hang:
        return f"FAILED: longer than {SECONDS} s"
    except MemoryError:
        return "FAILED: out of memory"
    except Exception as error:  # any other exception is a failure
        return f"FAILED: {type(error).__module__}.{type(error).__name__}: {error!s:.300}{_frames(error)}"
    finally:
        signal.alarm(0)


def _frames(error: BaseException) -> str:
    """Return the last line of this package in a traceback; empty if there is none."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "squisher_mergekit/" in frame.filename]
    return f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""


def prepare() -> None:
    """Prepare the process of a worker: the alarm of a hang, one thread, and a limit on memory."""
    import torch

    def hang(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    torch.set_num_threads(1)
    # Far above the allowed memory: a trial that asks for everything gets an error before the system runs out.
    resource.setrlimit(resource.RLIMIT_AS, (MOST_ADDRESSES, MOST_ADDRESSES))


def work(seed: int, numbers: range, only: str | None, pipe: Any) -> None:
    """Run the trials of the given numbers, and report each before and after."""
    prepare()
    logging.disable(logging.WARNING)
    cases = [case for case in load_cases() if only is None or only in case.name]
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        folders = {case.name: Path(scratch) / str(number) for number, case in enumerate(cases)}
        for case in cases:
            for name, content in case.files.items():
                (folders[case.name] / name).parent.mkdir(parents=True, exist_ok=True)
                (folders[case.name] / name).write_bytes(content)
            if judge(case, folders[case.name]) != "right":
                raise AssertionError(f"{case.name} must be read right without damage")
        # The limit applies to memory on top of that of the libraries.
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for number in numbers:
            chance = random.Random(f"{seed}/{number}")
            pipe.send((number, None, None))
            way, outcome = trial(chance.choice(cases), chance, folders[chance_case(cases, seed, number).name])
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            if grown > GIGABYTE:
                outcome, before = f"FAILED: {grown / GIGABYTE:.1f} GB of memory", before + grown
            pipe.send((number, way, outcome))
    pipe.close()


def chance_case(cases: list[Case], seed: int, number: int) -> Case:
    """Return the case of a trial, the first choice of its generator."""
    return random.Random(f"{seed}/{number}").choice(cases)


def run(
    seed: int, numbers: range, only: str | None, report: Callable[[int, str, str], None], worker: Worker = work
) -> None:
    """Run trials in another process, and replace a process that dies."""
    context = multiprocessing.get_context("spawn")
    while numbers:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=worker, args=(seed, numbers[:ROUND], only, theirs))
        process.start()
        theirs.close()
        last, pending = numbers[0] - 1, None
        while True:
            try:
                number, way, outcome = ours.recv()
            except EOFError:
                break
            pending = number if outcome is None else None
            if outcome is not None:
                last = number
                report(number, way, outcome)
        process.join()
        if pending is not None:
            report(pending, "?", f"FAILED: the process died with {process.exitcode}")
            last = pending
        elif process.exitcode:
            raise SystemExit(f"a process ended with {process.exitcode}")
        numbers = range(last + 1, numbers.stop)


def main(worker: Worker = work, description: str | None = __doc__, trials: int = 20_000) -> int:
    """Run all trials and print a table.

    Args:
        worker: Function that runs the trials of one process.
        description: Help text.
        trials: Default number of trials.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--trials", type=int, default=trials, help=f"number of trials (default {trials})")
    parser.add_argument("--seed", type=int, default=0, help="seed; trial I of a seed is always the same")
    parser.add_argument("--first", type=int, default=0, help="number of the first trial, to repeat a trial")
    parser.add_argument("--only", help="take only checkpoints whose name contains this")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="JSON file for counts and failures")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    counts: Counter[str] = Counter()
    per_case: dict[str, Counter[str]] = {}
    failures: list[str] = []
    bar = tqdm(total=options.trials, unit="trial", smoothing=0.05, disable=not sys.stderr.isatty())
    began = time.monotonic()

    def report(number: int, way: str, outcome: str) -> None:
        kind = outcome.partition(":")[0]
        counts[kind] += 1
        per_case.setdefault(way.partition(":")[0], Counter())[kind] += 1
        if kind == "FAILED":
            failures.append(f"trial {number}, {way}: {outcome}")
            bar.write(failures[-1])
        bar.update()

    end = options.first + options.trials
    share = -(-options.trials // options.processes)
    parts = [range(start, min(start + share, end)) for start in range(options.first, end, share)]
    with ThreadPoolExecutor(options.processes) as pool:
        for done in [pool.submit(run, options.seed, part, options.only, report, worker) for part in parts]:
            done.result()
    bar.close()
    width = max(map(len, per_case))
    print(f"{'checkpoint':{width}}  " + "  ".join(f"{name:>9}" for name in OUTCOMES))
    for name in sorted(per_case):
        print(f"{name:{width}}  " + "  ".join(f"{per_case[name][kind]:9}" for kind in OUTCOMES))
    print(f"{'all':{width}}  " + "  ".join(f"{counts[kind]:9}" for kind in OUTCOMES))
    print(f"{sum(counts.values())} trials in {time.monotonic() - began:.0f} s, seed {options.seed}")
    for failure in failures:
        print(failure)
    if options.json:
        options.json.write_text(json.dumps({"counts": counts, "failures": failures}, indent=2) + "\n")
    return 1 if failures or sum(counts.values()) != options.trials else 0


if __name__ == "__main__":
    sys.exit(main())
