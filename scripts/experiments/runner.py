"""Runs an experiment cell by cell, keeps what each found, and writes one JSON file.

A cell is a part that needs no other, such as one seed. Its result is kept as soon as it is there, so a run that was
stopped goes on where it was. With the same seed and versions a cell gives the same digits; CPU seconds alone differ.
"""

import argparse
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts import ROOT

Settings = Mapping[str, Any]
Result = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
WORK = ROOT / ".experiments"
_PACKAGES = ("torch", "transformers", "mergekit", "squisher-mergekit")


@dataclass(frozen=True)
class Experiment:
    """One setting of the paper.

    ``cell``: from a cell's settings and a folder for what may be kept (trained models, archives) to what it found.
    ``full`` and ``quick``: the settings of all cells. ``revision``: to be raised when ``cell`` changes, so that nothing
    that an older one found is taken. ``repeats``: whether a cell gives the same digits each time; seconds do not.
    """

    name: str
    about: str
    cell: Callable[[Settings, Path], Result]
    full: Sequence[Settings]
    quick: Sequence[Settings]
    revision: int = 1
    repeats: bool = True


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> int:
    """Run an experiment as a command."""
    parser = argparse.ArgumentParser(
        description=experiment.about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--full", action="store_true", help="the cells of the README's tables")
    size.add_argument("--quick", action="store_true", help="a few small cells, to see that all of it works")
    parser.add_argument("--out", type=Path, help="JSON file to write; by default in results/ (full) or --work (quick)")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of cells done and models trained")
    parser.add_argument("--fresh", action="store_true", help="do not take up cells of an earlier run")
    parser.add_argument(
        "--check",
        action="store_true",
        help="run all cells again in an empty folder and compare them with --out, to the digit; write nothing",
    )
    options = parser.parse_args(arguments)
    tier = "full" if options.full else "quick"
    out = options.out or (RESULTS if options.full else options.work / "quick") / f"{experiment.name}.json"
    if options.check and not experiment.repeats:
        parser.error(f"{experiment.name} measures seconds, which do not repeat")
    if options.check and not out.is_file():
        parser.error(f"--check compares with {out}, which is not there; run without it first, or name a file by --out")
    deterministic()
    log = logging.getLogger("squisher_mergekit")
    level = log.level
    log.setLevel(logging.ERROR)  # that these runs are short is known
    try:
        if options.check:
            return check(experiment, tier, out, options.work)
        report = run(experiment, tier, options.work, fresh=options.fresh)
    finally:
        log.setLevel(level)
    write_json(out, report)
    print(f"{experiment.name}: {len(report['cells'])} cells, {report['cpu_seconds']:.0f} CPU-s -> {out}")
    return 0


def check(experiment: Experiment, tier: str, kept: Path, work: Path) -> int:
    """Run all cells in an empty folder below ``work`` and say which find other than what is kept; returns 0 if none."""
    before = json.loads(kept.read_text(encoding="utf-8"))
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".check.", dir=work) as folder:
        after = run(experiment, tier, Path(folder))
    now = [(cell["settings"], cell["result"]) for cell in after["cells"]]
    differ = [cell["settings"] for cell in before["cells"] if (cell["settings"], cell["result"]) not in now]
    for settings in differ:
        print(f"not found again: {json.dumps(settings)}")
    if differ and before["versions"] != after["versions"]:
        print(f"made with {before['versions']}, here are {after['versions']}")
    same = len(before["cells"]) - len(differ)
    print(f"{experiment.name}: {same} of {len(before['cells'])} cells of {kept} found again, to the digit")
    return int(bool(differ))


def run(experiment: Experiment, tier: str, work: Path, *, fresh: bool = False, quiet: bool = False) -> Result:
    """Run all cells of a tier, or take them up, and return the report.

    Args:
        experiment: What to run.
        tier: ``full`` or ``quick``.
        work: Folder of cells done and models trained.
        fresh: Do not take up cells of an earlier run.
        quiet: No progress bar.
    """
    kept = work / "cells" / experiment.name
    if fresh:
        shutil.rmtree(kept, ignore_errors=True)
    cells = []
    settings = experiment.full if tier == "full" else experiment.quick
    for one in tqdm(settings, desc=experiment.name, unit="cell", disable=quiet):
        file = kept / f"{_digest(experiment, one)}.json"
        if not file.is_file():
            wall, cpu = time.perf_counter(), cpu_seconds()
            result = experiment.cell(one, work)
            spent = {"cpu_seconds": round(cpu_seconds() - cpu, 2), "seconds": round(time.perf_counter() - wall, 2)}
            write_json(file, {"settings": dict(one), "result": result} | spent)
        cells.append(json.loads(file.read_text(encoding="utf-8")))
    return {
        "experiment": experiment.name,
        "about": experiment.about,
        "tier": tier,
        "revision": experiment.revision,
        "versions": versions(),
        "cpu_seconds": round(sum(cell["cpu_seconds"] for cell in cells), 2),
        "cells": cells,
    }


def cached(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return a folder that is made once: under another name first, so that half of it is never found there.

    Of two processes that make it at once, the first one's is kept, and both return it.
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            made = Path(scratch) / folder.name
            made.mkdir()
            make(made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    return folder


def key(*parts: object) -> str:
    """Return a short name for settings: what is cached under it was made with the same."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_json(file: Path, data: object) -> None:
    """Write a JSON file beside its final name, then rename it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    beside.replace(file)


def versions() -> dict[str, str]:
    """Return the versions that a result can depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that ended."""
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system


def deterministic() -> None:
    """Let torch do the same each time: one thread, and no operation that may sum in another order."""
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def _digest(experiment: Experiment, settings: Settings) -> str:
    return key(experiment.name, experiment.revision, versions(), settings)
