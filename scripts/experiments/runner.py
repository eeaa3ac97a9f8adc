"""Runner of experiments: it runs each cell, keeps its result, and writes one JSON file.

A cell is a part that needs no other part, such as one seed. Its result is kept as soon as the cell ends, so an
interrupted run resumes, and a run takes over the cells of the file that it writes, so one that was published in part
goes on elsewhere. With the same seed and versions a cell repeats its digits; only CPU seconds differ.
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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts import ROOT
from scripts.experiments import device

Settings = Mapping[str, Any]
Result = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
WORK = ROOT / ".experiments"
TIMINGS = "timings"  # key of a result for CPU seconds, kept beside it because they do not repeat; none from a GPU
_PACKAGES = ("torch", "transformers", "mergekit", "squisher-mergekit")


@dataclass(frozen=True)
class Experiment:
    """Experiment that consists of cells.

    Attributes:
        name: name of the module and of its results.
        about: description for the help text.
        cell: function from the settings of a cell and a folder for trained models to its result.
        full: settings of the cells of the published tables.
        quick: settings of a few small cells.
        revision: number to raise when ``cell`` changes, so that older results are not reused.
        repeats: True if a cell repeats its digits; seconds do not.
        gpu: True if it can run on a GPU.
    """

    name: str
    about: str
    cell: Callable[[Settings, Path], Result]
    full: Sequence[Settings]
    quick: Sequence[Settings]
    revision: int = 1
    repeats: bool = True
    gpu: bool = False


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> int:
    """Run an experiment as a command."""
    parser = _parser(experiment)
    options = parser.parse_args(arguments)
    tier = "full" if options.full else "quick"
    out = options.out or (RESULTS if options.full else options.work / "quick") / f"{experiment.name}.json"
    if options.check and not experiment.repeats:
        parser.error(f"{experiment.name} measures seconds, which do not repeat")
    if options.check and not out.is_file():
        parser.error(f"--check compares with {out}, which is not there; run without it first, or name a file by --out")
    if options.check and options.finished:
        parser.error("--check runs cells, but --finished runs none; leave one out")
    if options.device != "cpu" and not experiment.gpu:
        parser.error(f"--device must be cpu for {experiment.name}, found {options.device}")
    count = len(experiment.full if options.full else experiment.quick)
    if options.cells is not None and not all(0 <= number < count for number in options.cells):
        parser.error(f"--cells must be between 0 and {count - 1}, found {' '.join(map(str, options.cells))}")
    cells = () if options.finished else range(count) if options.cells is None else options.cells
    deterministic(options.device)
    log = logging.getLogger("squisher_mergekit")
    level = log.level
    log.setLevel(logging.ERROR)  # silences the warning about short runs
    try:
        if options.check:
            return check(experiment, tier, out, options.work, cells)
        report = run(experiment, tier, options.work, cells, fresh=options.fresh, published=out)
    finally:
        log.setLevel(level)
    if not report["cells"]:
        parser.error(f"--finished needs a finished cell of {experiment.name} below {options.work}, found none")
    write_json(out, report)
    print(f"{experiment.name}: {len(report['cells'])} cells, {report['cpu_seconds']:.0f} CPU-s -> {out}")
    return 0


def _parser(experiment: Experiment) -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        description=experiment.about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--full", action="store_true", help="run the cells of the published tables")
    size.add_argument("--quick", action="store_true", help="run a few small cells, to see that everything works")
    parser.add_argument("--out", type=Path, help="JSON file to write; by default in results/ (full) or --work (quick)")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of finished cells and trained models")
    parser.add_argument("--device", default="cpu", help="device of models and merges, such as cuda")
    parser.add_argument("--fresh", action="store_true", help="run all cells, also those that are finished")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--finished", action="store_true", help="run no cell; write the results of the cells that are finished"
    )
    chosen.add_argument(
        "--cells", type=int, nargs="+", metavar="N", help="run these cells alone, by their number from 0"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="run the cells again in an empty folder and compare them with --out, to the digit; write nothing",
    )
    return parser


def check(experiment: Experiment, tier: str, kept: Path, work: Path, cells: Collection[int]) -> int:
    """Run cells in an empty folder below ``work``, print those that differ, and return 1 if there are any."""
    planned = experiment.full if tier == "full" else experiment.quick
    again = json.loads(json.dumps([planned[number] for number in cells]))
    before = json.loads(kept.read_text(encoding="utf-8"))
    before["cells"] = [cell for cell in before["cells"] if cell["settings"] in again]
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".check.", dir=work) as folder:
        after = run(experiment, tier, Path(folder), cells)
    now = [(cell["settings"], cell["result"]) for cell in after["cells"]]
    differ = [cell["settings"] for cell in before["cells"] if (cell["settings"], cell["result"]) not in now]
    for settings in differ:
        print(f"not found again: {json.dumps(settings)}")
    if differ and before["versions"] != after["versions"]:
        print(f"made with {before['versions']}, here are {after['versions']}")
    same = len(before["cells"]) - len(differ)
    print(f"{experiment.name}: {same} of {len(before['cells'])} cells of {kept} found again, to the digit")
    return int(bool(differ))


def run(
    experiment: Experiment,
    tier: str,
    work: Path,
    numbers: Collection[int] | None = None,
    *,
    fresh: bool = False,
    quiet: bool = False,
    published: Path | None = None,
) -> Result:
    """Run cells of a tier that have no kept result, and return the report of all that have one.

    Args:
        experiment: Experiment to run.
        tier: ``full`` or ``quick``.
        work: Folder of finished cells and trained models.
        numbers: Numbers of the cells to run; None for all.
        fresh: If True, ignore the finished cells of an earlier run.
        quiet: If True, draw no progress bar.
        published: Report of an earlier run, whose cells count as finished if revision and versions are the same.
    """
    kept = work / "cells" / experiment.name
    if fresh:
        shutil.rmtree(kept, ignore_errors=True)
    elif published is not None:
        _take_over(experiment, published, kept)
    card = device.card()
    models = work if card is None else work / card.replace(" ", "-")  # models of two devices differ in their digits
    cells = []
    settings = experiment.full if tier == "full" else experiment.quick
    for number, one in enumerate(tqdm(settings, desc=experiment.name, unit="cell", disable=quiet)):
        file = kept / f"{_digest(experiment, one)}.json"
        if not file.is_file() and numbers is not None and number not in numbers:
            continue
        if not file.is_file():
            wall, cpu = time.perf_counter(), cpu_seconds()
            result = experiment.cell(one, models)
            spent = {"cpu_seconds": round(cpu_seconds() - cpu, 2), "seconds": round(time.perf_counter() - wall, 2)}
            timings = result.pop(TIMINGS, None)
            measured = {TIMINGS: timings} if timings is not None and card is None else {}
            write_json(file, {"settings": dict(one), "result": result} | spent | measured)
        cells.append(json.loads(file.read_text(encoding="utf-8")))
    return {
        "experiment": experiment.name,
        "about": experiment.about,
        "tier": tier,
        "revision": experiment.revision,
        "planned": len(settings),
        "versions": versions(),
        "cpu_seconds": round(sum(cell["cpu_seconds"] for cell in cells), 2),
        "cells": cells,
    }


def _take_over(experiment: Experiment, published: Path, kept: Path) -> None:
    """Keep the cells of an earlier report that are not kept yet."""
    if not published.is_file():
        return
    report = json.loads(published.read_text(encoding="utf-8"))
    if (report["revision"], report["versions"]) != (experiment.revision, versions()):
        return
    for cell in report["cells"]:
        file = kept / f"{_digest(experiment, cell['settings'])}.json"
        if not file.is_file():
            write_json(file, cell)


def cached(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return a folder, made on the first call under a temporary name, so that it is always complete.

    If two processes make it at once, both return the folder of the first.
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
    """Return a short name that identifies settings, for a cache."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_json(file: Path, data: object) -> None:
    """Write a JSON file under a temporary name, then rename it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def versions() -> dict[str, str]:
    """Return the versions of the packages that can change a result, and the GPU if one is used."""
    found = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}
    card = device.card()
    return found if card is None else {**found, "device": card}


def cpu_seconds() -> float:
    """Return the CPU time of this process and its ended children."""
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system


def deterministic(device_name: str = "cpu") -> None:
    """Choose the device and make torch deterministic: one thread, no operation with a random order of summation.

    On a GPU torch warns of an operation that has no other form.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which CUDA reads at its start
    device.use(device_name)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=device_name != "cpu")


def _digest(experiment: Experiment, settings: Settings) -> str:
    return key(experiment.name, experiment.revision, versions(), settings)
