"""Time whole merges with and without read-ahead, with the files of the models out of the page cache and in it.

The commands take turns in one run. Before a cold command the pages of all files of the models are dropped. The time of
reading the same bytes one after another, cold, is the floor of the disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from scripts.benchmarks.merge import MODELS, commands, output_folder, parameters, prepare_model, recipe
from scripts.benchmarks.merge import parse as parse_merge
from scripts.benchmarks.process import run_measured, work_folder
from scripts.benchmarks.report import write_report
from squisher_mergekit.tensors.read_ahead import SWITCH

OFF = "0"


def main(arguments: list[str] | None = None) -> int:
    """Make the models, time the merges, print the table."""
    options = parse(arguments)
    with work_folder(options.work, "read_ahead") as work:
        for seed, name in enumerate(MODELS):
            prepare_model(work / name, seed, options)
        report = bench(work, options)
    print("\n".join(table(report)))
    if options.json:
        write_report(options.json, [report])
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line: the options of ``merge``, and the budgets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", default=["256"], help="read-ahead in MB; 0 is always among them")
    parser.add_argument("--warm", action="store_true", help="also time merges of files in the page cache")
    parser.epilog = "Further options are those of scripts.benchmarks.merge."
    own, rest = parser.parse_known_args(arguments)
    return argparse.Namespace(**vars(parse_merge(rest)), budgets=[OFF, *own.budgets], warm=own.warm)


def bench(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run every command once a round and return all samples."""
    files = [file for name in MODELS for file in sorted((work / name).glob("*.safetensors"))]
    command = commands(work, options)["squisher"]
    samples: dict[str, list[dict[str, float]]] = {"reading": []}
    load = [os.getloadavg()[0]]
    for number in range(options.repeat):
        evict(files)
        samples["reading"].append({"wall_s": read_seconds(files)})
        for state in ("cold", "warm") if options.warm else ("cold",):
            # The order alternates: the other work of the machine changes slowly.
            for budget in options.budgets[:: -1 if number % 2 else 1]:
                print(f"round {number + 1} of {options.repeat}: {state}, {budget} MB ...", file=sys.stderr, flush=True)
                os.environ[SWITCH] = budget
                if state == "cold":
                    evict(files)
                with output_folder(work):
                    samples.setdefault(f"{state}, {budget} MB", []).append(run_measured(command).figures())
        load.append(os.getloadavg()[0])
    return {
        "recipe": recipe(options),
        "parameters": parameters(options),
        "bytes": sum(file.stat().st_size for file in files),
        "cores": os.cpu_count(),
        "load_average": [min(load), max(load)],
        "samples": samples,
    }


def evict(files: list[Path]) -> None:
    """Drop the pages of files from the page cache."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # a page that is not written yet stays
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(files: list[Path]) -> float:
    """Return the time of reading files one after another, in pieces of 8 MB."""
    begin, buffer = time.perf_counter(), bytearray(8 << 20)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - begin


def table(report: dict[str, Any]) -> list[str]:
    """Return the table of minima and medians."""
    rows = [f"{'min / median':<16}{'wall s':>17}{'user+sys s':>17}{'anonymous GB':>17}"]
    for name, runs in report["samples"].items():
        cells = ""
        for key in ("wall_s", "cpu_s", "anonymous_gb"):
            values = [run[key] for run in runs if key in run]
            cells += f"{min(values):>9.2f} /{statistics.median(values):>6.2f}" if values else f"{'':>17}"
        rows.append(f"{name:<16}{cells}")
    quiet, busy = report["load_average"]
    rows.append(
        f"{report['parameters'] / 1e6:.0f}M parameters a model, {report['bytes'] / 1e9:.2f} GB read, "
        f"{report['cores']} cores, load average {quiet:.1f} to {busy:.1f}"
    )
    return rows


if __name__ == "__main__":
    sys.exit(main())
