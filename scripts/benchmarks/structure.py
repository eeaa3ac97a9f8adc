"""Time whole merges with a structure on random Llamas, relative to the plain squisher, and compute larger models.

The commands take turns in one run, each on one thread, because only ratios within a run are meaningful on a shared
machine. The structures read a third model, the base. ``squisher merge`` also computes the report of the structure.
Anonymous memory excludes mapped files. A merge of the largest matrix alone, in a process of its own, shows its memory
without that of the output. The report ends with the operations of merges that are too large for this machine, computed
from their shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.benchmarks.merge import BASE, MODELS, compare, comparison_parser, output_folder, parameters, recipe
from scripts.benchmarks.process import run_measured, verdict

PLAIN = "squisher"
CPU_GOALS = {"rows": 2.0, "columns": 2.0, "kron": 10.0}  # times squisher
MEMORY_GOAL = 4.0  # matrices of the largest weight in float32, beyond squisher
BLOCK, STEPS = 128, 10
REPORTED = ", report"
MATRIX = """
import sys
import torch
from squisher_mergekit.merging.coupling.execution import Structure, merge_coupled
from squisher_mergekit.merging.execution import merge_squisher
from squisher_mergekit.merging.inputs import Input
kind, *shape = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
base, *thetas = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(3))
inputs = [Input(theta, torch.rand(shape)) for theta in thetas]
if kind == "squisher":
    merge_squisher(inputs, torch.bfloat16)
else:
    merge_coupled(base, inputs, Structure(kind, steps=2), torch.bfloat16)
"""
H100 = 30e12  # float32 operations a second: about half of the peak without tensor cores
# hidden, intermediate, layers, vocabulary, width of keys and values
LARGE = {"Llama-2 7B": (4096, 11008, 32, 32000, 4096), "Llama-2 70B": (8192, 28672, 80, 32000, 1024)}
LARGE_MODELS = 3


def main(arguments: list[str] | None = None) -> int:
    """Make the models, time the commands, print the figures."""
    return compare(parse(arguments), "structure", bench, lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = comparison_parser(__doc__, repeat=2)
    parser.add_argument("--kinds", nargs="+", default=list(CPU_GOALS), choices=list(CPU_GOALS))
    return parser.parse_args(arguments)


# ---- the commands


def commands(work: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """Return a mapping from names to commands, each of which writes to ``work/out``."""
    found = {}
    for name in (PLAIN, *(f"{kind}{end}" for kind in options.kinds for end in ("", REPORTED))):
        kind = name.removesuffix(REPORTED)
        config = work / f"structure_{kind}.yml"
        config.write_text(json.dumps(merge_config(kind, work)))  # JSON is YAML
        program = ["squisher", "merge"] if name.endswith(REPORTED) else ["mergekit-yaml"]
        paths = [str(config), str(work / "out" / "merged")]
        begin = [str(Path(sys.executable).with_name(program[0])), *program[1:], *paths]
        found[name] = [*begin, "--no-write-model-card", "--no-copy-tokenizer"]
    return found


def merge_config(kind: str, work: Path) -> dict[str, object]:
    """Return the configuration of one merge."""
    config: dict[str, object] = {"merge_method": "squisher", "dtype": "bfloat16", "base_model": str(work / BASE)}
    if kind != PLAIN:
        config["parameters"] = {"structure": kind, "block": BLOCK, "steps": STEPS}
    return config | {"models": [{"model": str(work / name), "parameters": {"weight": 0.5}} for name in MODELS]}


def bench(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run every command once a round; return all samples and the computed costs."""
    samples: dict[str, list[dict[str, float]]] = {}
    for number in range(options.repeat):
        known = commands(work, options)
        # The plain merge is measured before each structure: all ratios are relative to its minimum.
        turns = [turn for name in known for turn in ((PLAIN, name) if name in options.kinds else (name,))][1:]
        for name in turns:
            print(f"round {number + 1} of {options.repeat}: {name} ...", file=sys.stderr, flush=True)
            with output_folder(work):
                samples.setdefault(name, []).append(run_measured(known[name]).figures())
    largest = [max(options.vocab, options.intermediate), options.hidden]
    shapes = list(coupled_shapes(options.hidden, options.intermediate, options.layers, options.vocab, options.hidden))
    rates = {kind: rate(kind, shapes, samples) for kind in options.kinds}
    return {
        "recipe": recipe(options),
        "parameters": parameters(options),
        "largest": largest,
        "block": BLOCK,
        "steps": STEPS,
        "samples": samples,
        "matrices": {kind: matrices_beyond_plain(kind, largest) for kind in options.kinds},
        "rates": rates,
        "h100": H100,
        "large_models": LARGE_MODELS,
        "large": {
            name: {kind: cost(kind, list(coupled_shapes(*sizes)), rates[kind]) for kind in options.kinds}
            for name, sizes in LARGE.items()
        },
    }


def matrices_beyond_plain(kind: str, shape: list[int]) -> float:
    """Return the peak memory of a merge of one matrix beyond that of the plain merge, in float32 matrices."""
    peaks = [
        run_measured([sys.executable, "-c", MATRIX, name, *map(str, shape)]).anonymous_gb for name in (kind, PLAIN)
    ]
    return (peaks[0] - peaks[1]) * 1e9 / (4 * shape[0] * shape[1])


# ---- the computed costs


def coupled_shapes(hidden: int, wide: int, layers: int, vocab: int, keys: int) -> Iterator[tuple[int, int, int]]:
    """Yield rows, columns and number of the matrices of a Llama that a structure couples: all but the embedding."""
    yield hidden, hidden, 2 * layers
    yield keys, hidden, 2 * layers
    yield wide, hidden, 2 * layers
    yield hidden, wide, layers
    yield vocab, hidden, 1


def operations(kind: str, rows: int, columns: int, models: int, block: int = BLOCK, steps: int = STEPS) -> float:
    """Return the floating-point operations of the products and systems of one matrix; blocks divide it.

    ``rows``: a Gram matrix a model, a product for each model but one, a Cholesky factorisation and its systems.
    ``kron``: Gram matrices on both sides, an eigendecomposition of each block (9 b^3), and pairs of products, one on
    each side of a tile: M for the first residual, 2 into and out of the eigenbasis, M - 1 a step.
    """
    entries, others = rows * columns, models - 1
    if kind != "kron":
        size = rows if kind == "rows" else columns
        return 2 * block * entries * (models + others) + size * block**2 * (1 / 3 + 2 * others)
    pairs = models + 2 + steps * others
    blocks = (rows + columns) / block
    return 4 * block * entries * (models + pairs) + blocks * block**3 * (9 + 4 * others)


def rate(kind: str, shapes: list[tuple[int, int, int]], samples: dict[str, list[dict[str, float]]]) -> float:
    """Return the operations a second of one core, from the CPU time beyond the plain merge."""
    seconds = least(samples, kind, "cpu_s") - least(samples, PLAIN, "cpu_s")
    done = sum(count * operations(kind, rows, columns, len(MODELS)) for rows, columns, count in shapes)
    return done / max(seconds, 1e-3)


def cost(kind: str, shapes: list[tuple[int, int, int]], core_rate: float) -> dict[str, float]:
    """Return the operations of a merge, and its seconds on two cores and on an H100."""
    total = sum(count * operations(kind, rows, columns, LARGE_MODELS) for rows, columns, count in shapes)
    return {"flop": total, "two_cores_s": total / (2 * core_rate), "h100_s": total / H100}


def least(samples: dict[str, list[dict[str, float]]], kind: str, key: str) -> float:
    """Return the minimum of a figure over the rounds."""
    return float(min(run[key] for run in samples[kind]))


# ---- the report


def lines(report: dict[str, Any]) -> list[str]:
    """Return the figures of each structure, with a verdict on each goal, and the computed costs."""
    samples, found = report["samples"], []
    for name, runs in samples.items():
        cpu, memory = (least(samples, name, key) for key in ("cpu_s", "anonymous_gb"))
        ratio = cpu / least(samples, PLAIN, "cpu_s")
        median = statistics.median(run["cpu_s"] for run in runs)
        text = f"{name:<16} CPU {cpu:6.1f} s (median {median:.1f}), {ratio:5.2f} x squisher, anonymous {memory:.2f} GB"
        if name in CPU_GOALS:
            matrices = report["matrices"][name]
            text += f"; CPU <= {CPU_GOALS[name]:g} x {verdict(ratio <= CPU_GOALS[name])}, largest matrix "
            text += f"{matrices:.1f} matrices <= {MEMORY_GOAL:g} {verdict(matrices <= MEMORY_GOAL)}"
            text += f"; {report['rates'][name] / 1e9:.0f} GFLOP/s"
        found.append(text)
    for name, kinds in report["large"].items():
        for kind, one in kinds.items():
            found.append(
                f"{name}, {kind}: {one['flop']:.2g} FLOP, {one['two_cores_s']:.0f} s on two cores, "
                f"{one['h100_s']:.1f} s on an H100 at {H100 / 1e12:.0f} TFLOP/s"
            )
    return found


if __name__ == "__main__":
    sys.exit(main())
