"""Time the fused kernel on a GPU against a device copy of the same number of bytes.

A call of ``merge_squisher`` or ``merge_ubgm`` is timed with its report (shares, entries without information, invalid
entries). It is timed twice: by CUDA events while calls queue up, and replayed as a CUDA graph, which leaves Python out.
The inputs of each measurement are larger than the L2 cache, and two sets take turns. ``--first`` prints the seconds of
first calls in this process, the import of Triton included; start it with an empty ``TRITON_CACHE_DIR``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts.benchmarks.report import write_report
from squisher_mergekit.merging import fused
from squisher_mergekit.merging.execution import merge_squisher, merge_ubgm
from squisher_mergekit.merging.inputs import Input, Outcome

SHAPE = (4096, 14336)
COUNTS = (2, 4, 8)
METHODS = ("squisher", "ubgm", "ubgm prior")
RATIO_GOAL = 1.15
FIRST_GOAL = 2.0
MEMORY_GOAL = 0.05
# Blocks, tiles and threads to try, besides those of the package.
GRIDS = [fused.Grid(tile, block // tile, threads) for tile, block, threads in (
    (1024, 4096, 128), (1024, 16384, 128), (512, 8192, 128), (2048, 8192, 256), (1024, 8192, 256),
)]  # fmt: skip


class Setting(NamedTuple):
    """Measurement of a method: number of models, shape of the weight, and device."""

    method: str
    count: int
    shape: tuple[int, ...] = SHAPE
    device: str = "cuda"

    def inputs(self, seed: int) -> list[Input]:
        """Return random models: bfloat16 weights, float32 Fishers over ten orders of magnitude, one in eight 0."""
        generator = torch.Generator(self.device).manual_seed(seed)
        draw: dict[str, Any] = {"generator": generator, "device": self.device}
        models = []
        for number in range(self.count + (self.method != "squisher")):
            fisher = torch.rand(self.shape, **draw).mul_(-23).exp_()
            fisher.mul_(torch.rand(self.shape, **draw) > 0.125)
            weight = 1.0 + 0.1 * number
            models.append(Input(torch.randn(self.shape, **draw).bfloat16(), fisher, weight, 1e-3 * weight))
        return models

    def merge(self, inputs: Sequence[Input]) -> Outcome:
        """Merge the models into bfloat16; the first is the base of ``ubgm``."""
        if self.method == "squisher":
            return merge_squisher(inputs, torch.bfloat16)
        return merge_ubgm(inputs[0], inputs[1:], 0.1 if self.method == "ubgm prior" else 0.0, torch.bfloat16)

    def bytes(self) -> int:
        """Return the bytes to move if each input is read once and the output written once."""
        models = self.count + (self.method != "squisher")
        return torch.Size(self.shape).numel() * (models * (2 + 4) + 2)

    def floor(self) -> float:
        """Return the bytes that the method must move, as a multiple of ``bytes``.

        A prior is relative to the mean of the Fishers over the tensor, which is known only after they were all read:
        larger tensors than the L2 cache are read twice.
        """
        models = self.count + (self.method != "squisher")
        again = models * 4 if self.method == "ubgm prior" else 0
        return 1 + again / (models * (2 + 4) + 2)


def measure(setting: Setting, rounds: int) -> dict[str, Any]:
    """Return times in ms, their ratios to the copy, and the memory that one call takes beyond its output."""
    sets = [setting.inputs(seed) for seed in range(2)]
    source = torch.empty(setting.bytes() // 2, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    turns = itertools.cycle(sets)
    setting.merge(sets[0])
    calls = {"copy": lambda: target.copy_(source), "call": lambda: setting.merge(next(turns))}
    times = {name: statistics.median(queued(call, rounds, setting.device)) for name, call in calls.items()}
    if setting.device == "cuda":
        replays = itertools.cycle([graph(lambda inputs=inputs: setting.merge(inputs)) for inputs in sets])
        times["graph"] = statistics.median(queued(lambda: next(replays).replay(), rounds, setting.device))
    return {
        **setting._asdict(),
        "gigabytes": setting.bytes() / 1e9,
        "copy_tb_per_s": setting.bytes() / times["copy"] / 1e9,
        "ms": times,
        "floor": setting.floor(),
        "ratio": {name: one / times["copy"] for name, one in times.items() if name != "copy"},
        "memory_beyond": memory_beyond(setting, sets[0]),
        "kernel": not fused.gave_up(),
    }


def queued(call: Callable[[], object], rounds: int, device: str) -> list[float]:
    """Return the milliseconds of each queued call, by events on a GPU."""
    for _ in range(3):
        call()
    if device != "cuda":
        marks = [time.perf_counter()]
        for _ in range(rounds):
            call()
            marks.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def graph(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of a call."""
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        call()
    return captured


def memory_beyond(setting: Setting, inputs: Sequence[Input]) -> float | None:
    """Return the peak of memory beyond inputs and output, as a share of the output; None on the CPU."""
    if setting.device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outcome = setting.merge(inputs)
    peak = torch.cuda.max_memory_allocated() - before
    return peak / outcome.values.nbytes - 1


def first_calls(settings: Sequence[Setting]) -> dict[str, float]:
    """Return the seconds of the first call of each setting, in this order, in this process."""
    seconds = {}
    for setting in settings:
        inputs = setting.inputs(0)
        _wait(setting.device)
        began = time.perf_counter()
        setting.merge(inputs)
        _wait(setting.device)
        seconds[f"{setting.method} {setting.count}"] = time.perf_counter() - began
    return seconds


def sweep(settings: Sequence[Setting], rounds: int) -> Iterator[dict[str, Any]]:
    """Time other divisions of the work."""
    chosen = fused.grid
    try:
        for one in GRIDS:
            fused.grid = lambda fishers, work, one=one: one
            for setting in settings:
                yield {"grid": one._asdict(), **measure(setting, rounds)}
    finally:
        fused.grid = chosen


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---- the command


def main(arguments: list[str] | None = None) -> int:
    """Measure and print a table."""
    options = parse(arguments)
    settings = [Setting(m, n, tuple(options.shape), options.device) for m in options.methods for n in options.counts]
    if options.first:
        print(json.dumps(first_calls(settings)))
        return 0
    measured = [measure(setting, options.rounds) for setting in settings]
    print("\n".join(table(measured)), flush=True)
    if options.sweep:
        swept = list(sweep([s for s in settings if s.method != "ubgm prior"], options.rounds))
        print("\n".join(table(swept)), flush=True)
        measured += swept
    if options.json:
        write_report(options.json, measured)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", type=int, nargs="+", default=list(SHAPE), help="of the weight")
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="numbers of models")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--first", action="store_true", help="only the first calls, printed as JSON")
    parser.add_argument("--sweep", action="store_true", help="also other divisions of the work")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    return parser.parse_args(arguments)


def table(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line for each measurement."""
    lines = [
        f"{'method':<12}{'M':>3}{'copy TB/s':>11}{'copy ms':>9}{'call ms':>9}"
        f"{'ratio':>7}{'graph':>7}{'floor':>7}{'memory':>8}"
    ]
    for one in measured:
        ms, ratio, memory = one["ms"], one["ratio"], one["memory_beyond"]
        lines.append(
            f"{one['method']:<12}{one['count']:>3}{one['copy_tb_per_s']:>11.2f}{ms['copy']:>9.3f}{ms['call']:>9.3f}"
            f"{ratio['call']:>7.2f}{ratio.get('graph', float('nan')):>7.2f}{one['floor']:>7.2f}"
            + ("" if memory is None else f"{memory:>8.1%}")
            + (f"  {one['grid']}" if "grid" in one else "")
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
