"""Measure squisher extract against a plain copy of the same number of bytes, in six layouts and two sizes.

The bytes are those of the second moments. The plain copy reads and writes them in blocks of 8 MiB. Both sync their
output to disk. Each runs in its own process, which first imports the same libraries. The clock starts after that; the
table lists the whole command as well. (Both have to wait equally long before they write: on a virtual machine,
memory that was free for some seconds is slower to write to.) ``unverified`` skips the checksums. Anonymous memory
excludes mapped files, which the system can drop at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts import ROOT
from scripts.benchmarks.process import minima, run_measured, verdict, work_folder
from scripts.benchmarks.states import OF_TRAINERS

SPEED_GOAL = 0.7  # of the plain copy's bytes per second
MEMORY_GOAL = 0.7  # GB of anonymous memory on top of the largest tensor
LAYOUTS = ("trainer", "fsdp", "deepspeed", *OF_TRAINERS)
SIZES = {
    "0.3B": {"hidden": 1024, "layers": 18, "intermediate": 2816, "vocab": 32000},
    "1B": {"hidden": 2048, "layers": 18, "intermediate": 5632, "vocab": 32000},
    "tiny": {"hidden": 64, "layers": 2, "intermediate": 147, "vocab": 61},
}
IMPORTS = """
import json, os, sys, time
import torch, transformers, transformers.models.llama.modeling_llama, transformers.core_model_loading
from squisher_mergekit.optimizers import load
torch.set_num_threads(1)
"""
COPY_CODE = f"""{IMPORTS}
began, cpu = time.perf_counter(), time.process_time()
with open(sys.argv[1], "rb", buffering=0) as source, open(sys.argv[2], "wb", buffering=0) as target:
    while block := source.read(8 << 20):
        target.write(block)
    os.fsync(target.fileno())
print(json.dumps([time.perf_counter() - began, time.process_time() - cpu]))
"""
EXTRACT_CODE = f"""{IMPORTS}
began, cpu = time.perf_counter(), time.process_time()
load.extract(sys.argv[1], sys.argv[2], sys.argv[4] or None, verify=sys.argv[3] == "True")
print(json.dumps([time.perf_counter() - began, time.process_time() - cpu]))
"""


def main() -> int:
    """Make the checkpoints, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, help="folder that keeps the checkpoints between runs (default: a temporary folder)"
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["0.3B", "1B"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--repeat", type=int, default=3, help="number of rounds; each runs everything once")
    parser.add_argument("--json", type=Path, help="JSON file for all samples")
    options = parser.parse_args()
    reports = []
    with work_folder(options.work, "extract") as work:
        for size in options.sizes:
            for layout in options.layouts:
                reports.append(bench(work, size, layout, options.repeat))
                print("\n".join(table(reports[-1])), flush=True)
                if options.work is None:
                    shutil.rmtree(work / f"{layout}-{size}", ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    return 0


def bench(work: Path, size: str, layout: str, repeat: int) -> dict[str, Any]:
    """Measure one checkpoint: the copy, the extraction, and the extraction without checksums, in turns."""
    folder, out = work / f"{layout}-{size}", work / "out"
    recipe = SIZES[size]
    done = folder / "recipe.json"
    if not done.exists() or json.loads(done.read_text()) != {**recipe, "dtype": "bfloat16", "shards": 1}:
        print(f"making {folder} ...", file=sys.stderr, flush=True)
        text = json.dumps({**recipe, "dtype": "bfloat16", "shards": 1})
        maker = [sys.executable, "-m", "scripts.benchmarks.states"]
        subprocess.run([*maker, str(folder.resolve()), layout, text], check=True, cwd=ROOT)
    same = work / f"same-{size}"
    samples: dict[str, list[dict[str, float]]] = {}
    for number in range(repeat):
        for name in ("extract", "unverified", "copy"):
            print(f"{size} {layout}, round {number + 1} of {repeat}: {name} ...", file=sys.stderr, flush=True)
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            model = str(folder) if layout in OF_TRAINERS else ""
            code = [EXTRACT_CODE, str(folder), str(out / "fisher"), str(name == "extract"), model]
            if name == "copy":
                code = [COPY_CODE, str(same), str(out / "copy")]
            samples.setdefault(name, []).append(measure([sys.executable, "-c", *code]))
            if name == "extract" and not same.exists():
                (out / "fisher" / "fisher.safetensors").rename(same)
    shutil.rmtree(out, ignore_errors=True)
    matrices = [recipe["vocab"], recipe["intermediate"]]
    if layout == "torch_dist":  # it stacks the layers, and fuses gate and up
        matrices.append(2 * recipe["layers"] * recipe["intermediate"])
    elif layout == "nanotron":
        matrices.append(2 * recipe["intermediate"])
    largest = max(matrices) * recipe["hidden"] * 4
    return {
        "size": size,
        "layout": layout,
        "bytes": same.stat().st_size,
        "largest_gb": largest / 1e9,
        "samples": samples,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }


def measure(command: list[str]) -> dict[str, float]:
    """Run a command that prints its own seconds, and add those of the whole process and its anonymous memory."""
    usage = run_measured(command)
    wall, cpu = json.loads(usage.output.splitlines()[-1])
    memory = {"anonymous_gb": usage.anonymous_gb, "rss_gb": usage.rss_gb}
    return {"wall_s": wall, "cpu_s": cpu, "whole_s": usage.wall_s, **memory}


def table(report: dict[str, Any]) -> list[str]:
    """Return the minima, the speed relative to the copy, and a verdict on each goal."""
    low = minima(report["samples"])
    size = report["bytes"] / 1e9
    rows = [
        f"{report['size']} {report['layout']}: {size:.2f} GB of second moments",
        f"  {'':<12}{'GB/s':>8}{'x copy':>8}{'CPU s':>8}{'whole s':>9}{'anonymous GB':>14}{'resident GB':>13}",
    ]
    for name, sample in low.items():
        share = low["copy"]["wall_s"] / sample["wall_s"]
        rows.append(
            f"  {name:<12}{size / sample['wall_s']:>8.2f}{share:>8.2f}{sample['cpu_s']:>8.2f}"
            f"{sample['whole_s']:>9.2f}{sample['anonymous_gb']:>14.2f}"
            f"{sample['rss_gb']:>13.2f}"
        )
    speed = low["copy"]["wall_s"] / low["extract"]["wall_s"]
    median = statistics.median(
        copy["wall_s"] / run["wall_s"]
        for copy, run in zip(report["samples"]["copy"], report["samples"]["extract"], strict=True)
    )
    limit = MEMORY_GOAL + report["largest_gb"]
    memory = max(run["anonymous_gb"] for run in report["samples"]["extract"])
    rows.append(
        f"  {speed:.2f} of the copy's speed, {median:.2f} in the median of rounds (goal {SPEED_GOAL}: "
        f"{verdict(speed >= SPEED_GOAL)}); {memory:.2f} GB of anonymous memory (goal {limit:.2f}: "
        f"{verdict(memory <= limit)}); load average {report['load_average']:.1f}"
    )
    return rows


if __name__ == "__main__":
    sys.exit(main())
