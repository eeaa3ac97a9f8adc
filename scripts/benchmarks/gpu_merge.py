"""Time merges on a GPU from their files to their files, without the start of Python, beside mergekit's linear.

One process runs all merges of two models from the page cache, with Fishers in float32, and with ``--log8`` in log8 too,
which takes some time to encode. ``pageable`` is the same merge with torch's own copies between host memory and the GPU,
in place of pinned buffers. A run takes the time until the output folder is complete; bytes are those of the files that
the merge reads, and of the files that it writes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.benchmarks.merge import MODELS, merge_config, output_folder, prepare_model
from scripts.benchmarks.merge import parse as parse_merge
from scripts.benchmarks.process import work_folder
from scripts.benchmarks.report import write_report
from squisher_mergekit.tensors.devices import transfer

WAYS = ("linear", "squisher", "squisher pageable", "ubgm_squisher")
LOG8 = ("squisher log8", "squisher log8 pageable")


@contextmanager
def pageable(wanted: bool) -> Iterator[None]:
    """Switch the pinned buffers off."""
    least = transfer.LEAST
    transfer.LEAST = 1 << 60 if wanted else least
    try:
        yield
    finally:
        transfer.LEAST = least


def compressed(work: Path) -> None:
    """Write the Fishers in log8 beside the models."""
    from squisher_mergekit import load_fisher

    for name in MODELS:
        if not (work / f"{name} log8").exists():
            load_fisher(work / name).save(work / f"{name} log8", compress="log8")


def seconds(way: str, work: Path, options: argparse.Namespace) -> float:
    """Return the time of one merge."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config: dict[str, Any] = merge_config(way.split()[0], work, options)
    if "log8" in way:
        for model in config["models"]:
            model["parameters"] = {**model["parameters"], "fisher": f"{model['model']} log8"}
    flags = MergeOptions(device=options.device, write_model_card=False, copy_tokenizer=False, quiet=True)
    with output_folder(work), pageable(way.endswith("pageable")):
        began = time.perf_counter()
        run_merge(MergeConfiguration.model_validate(config), str(work / "out"), flags)
        return time.perf_counter() - began


def bytes_of(way: str, work: Path) -> int:
    """Return the bytes of the files that a merge reads, and of its result."""
    weights = sum(file.stat().st_size for name in MODELS for file in (work / name).glob("model*.safetensors"))
    found = weights + weights // len(MODELS)
    if way != "linear":
        folders = [work / (f"{name} log8" if "log8" in way else name) for name in MODELS]
        found += sum(file.stat().st_size for folder in folders for file in folder.glob("fisher*.safetensors"))
    return found


def measure(work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every merge once a round, the first round for nothing but compilation, and return all samples."""
    if options.log8:
        compressed(work)
    samples: dict[str, list[float]] = {way: [] for way in (*WAYS, *(LOG8 if options.log8 else ()))}
    for number in range(options.repeat + 1):
        for way in samples:
            samples[way].append(seconds(way, work, options))
            print(f"round {number}: {way} {samples[way][-1]:.2f} s", file=sys.stderr, flush=True)
    found = []
    for way, (first, *others) in samples.items():
        least = min(others)
        rate = bytes_of(way, work) / least / 1e9
        median = statistics.median(others)
        found.append({"way": way, "first_s": first, "least_s": least, "median_s": median, "gb_per_s": rate})
    return found


def main(arguments: list[str] | None = None) -> int:
    """Make the models, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--log8", action="store_true", help="merge with Fishers in log8 as well")
    parser.epilog = "Further options are those of scripts.benchmarks.merge."
    own, rest = parser.parse_known_args(arguments)
    options = argparse.Namespace(**vars(parse_merge(rest)), device=own.device, log8=own.log8)
    with work_folder(options.work, "gpu_merge") as work:
        for seed, name in enumerate(MODELS):
            prepare_model(work / name, seed, options)
        found = measure(work, options)
    linear = found[0]["least_s"]
    print(f"{'merge':<24}{'first s':>9}{'least s':>9}{'x linear':>10}{'GB/s':>7}")
    for one in found:
        ratio = one["least_s"] / linear
        print(f"{one['way']:<24}{one['first_s']:>9.2f}{one['least_s']:>9.2f}{ratio:>10.2f}{one['gb_per_s']:>7.2f}")
    if options.json:
        write_report(options.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
