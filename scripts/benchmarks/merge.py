"""Time whole merge commands on random Llama models: squisher and ubgm_squisher relative to mergekit's linear.

The commands take turns in one run, because only such ratios are meaningful on a shared machine. ``read+write`` reads
the bytes that ``squisher`` reads (weights and Fishers of two models) and writes the bytes of one model. ubgm_squisher
takes the first model as its base, so it reads the same files. ``--density`` adds squisher and mergekit's ties at that
density, both with a third model as their base. A thread polls the memory of each command. RSS includes mapped files,
which the system can drop at any time; anonymous memory does not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts import ROOT
from scripts.benchmarks.on_paper import FISHER_WIDTH
from scripts.benchmarks.process import minima, run_measured, verdict, work_folder
from scripts.benchmarks.report import write_report

CPU_GOAL = 1.15  # squisher / linear
MEMORY_GOAL = 0.2  # GB of anonymous memory above linear
MODELS = ("a", "b")
BASE = "base"
SIZES = {"hidden": 1024, "layers": 18, "intermediate": 2816, "vocab": 32000}  # about 300M parameters
# Sizes of a Llama by name, for --size; with log8 Fishers unless --fisher-dtype is given.
NAMED = {
    "300m": SIZES,
    "1b": {"hidden": 2048, "layers": 22, "intermediate": 5632, "vocab": 32000},
    "3b": {"hidden": 3200, "layers": 26, "intermediate": 8640, "vocab": 32000},
    "7b": {"hidden": 4096, "layers": 32, "intermediate": 11008, "vocab": 32000},
}
ROOM = 2e9  # bytes of disk that a run leaves free
MERGES = ("linear", "squisher", "ubgm_squisher")
TRIMMED = ("squisher trim", "ties trim")
COPY = "read+write"
COPY_CODE = """
import sys
out, size, files = open(sys.argv[1], "wb"), int(sys.argv[2]), sys.argv[3:]
for name in files:
    with open(name, "rb", buffering=0) as file:
        while block := file.read(8 << 20):
            part = block[: max(0, size)]
            size -= out.write(part)
"""

Bench = Callable[[Path, argparse.Namespace], dict[str, Any]]
Lines = Callable[[dict[str, Any]], list[str]]


def main(arguments: list[str] | None = None) -> int:
    """Make the models, time the commands, print the table."""
    options = parse(arguments)
    with work_folder(options.work, "merge") as work:
        check_disk(work, options)
        for seed, name in enumerate((*MODELS, BASE) if options.density is not None else MODELS):
            prepare_model(work / name, seed, options)
        report = bench(work, options)
    print("\n".join(table(report)))
    if options.json:
        write_report(options.json, [report])
    return 0


def compare(options: argparse.Namespace, name: str, bench: Bench, lines: Lines) -> int:
    """Make two models and their base, time the commands of another benchmark, print and keep the figures."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with work_folder(options.work, name) as work:
        for seed, model in enumerate((*MODELS, BASE)):
            prepare_model(work / model, seed, options)
        report = bench(work, options)
    print("\n".join(lines(report)))
    if options.json:
        write_report(options.json, [report])
    return 0


def comparison_parser(about: str | None, repeat: int) -> argparse.ArgumentParser:
    """Return the parser of a benchmark that uses :func:`compare`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder that keeps the models (default: a temporary folder)")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"size of the Llama (default: {default})")
    parser.add_argument("--repeat", type=int, default=repeat, help="number of rounds; each runs every command once")
    parser.add_argument("--json", type=Path, help="JSON file for all samples")
    parser.set_defaults(dtype="bfloat16", fisher_dtype="float32", shards=4, made_on="cpu")
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, help="folder that keeps the models between runs (default: a temporary folder)"
    )
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"size of the Llama (default: {default})")
    parser.add_argument("--size", choices=NAMED, help="sizes of a Llama of about so many parameters, log8 Fishers")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--fisher-dtype", choices=["float32", "bfloat16", "log8"], help="default: float32")
    parser.add_argument("--shards", type=int, default=4, help="number of weight files of a model")
    parser.add_argument("--made-on", default="cpu", help="device that draws the random models (default: cpu)")
    parser.add_argument("--repeat", type=int, default=3, help="number of rounds; each runs every command once")
    parser.add_argument("--threads", type=int, help="mergekit's -j (default: not given)")
    parser.add_argument("--options", default="", help="further options of mergekit-yaml, in one string")
    parser.add_argument("--density", type=float, help="run squisher and ties at this density as well")
    choices = [COPY, *MERGES, *TRIMMED]
    parser.add_argument("--only", nargs="+", choices=choices, help="run these commands and linear only")
    parser.add_argument("--json", type=Path, help="JSON file for all samples")
    options = parser.parse_args(arguments)
    options.fisher_dtype = options.fisher_dtype or ("log8" if options.size else "float32")
    for name, size in NAMED.get(options.size, {}).items():
        setattr(options, name, size)
    return options


# ---- the models


def disk_bytes(options: argparse.Namespace) -> float:
    """Return the bytes of disk that a run needs: the models, their Fishers, and one result."""
    models = len(MODELS) + (options.density is not None)
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[options.dtype]
    return parameters(options) * (models * (width + FISHER_WIDTH[options.fisher_dtype]) + width)


def check_disk(work: Path, options: argparse.Namespace) -> None:
    """Refuse a run for which the disk has no room; models that the folder keeps from an earlier run count as room.

    Raises:
        SystemExit: The message has the sizes and the cure.
    """
    kept = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    disk = next(folder for folder in (work, *work.resolve().parents) if folder.exists())
    needed, free = disk_bytes(options) + ROOM, shutil.disk_usage(disk).free + kept
    if needed > free:
        raise SystemExit(
            f"two models, their Fishers and a result must have {needed / 1e9:.0f} GB of disk, but {work} has "
            f"{free / 1e9:.0f} GB free; give a smaller --size, --fisher-dtype log8, or a larger disk by --work"
        )


def recipe(options: argparse.Namespace) -> dict[str, object]:
    """Return the settings that determine the models."""
    return {key: getattr(options, key) for key in ("dtype", "fisher_dtype", "shards", *SIZES)}


def prepare_model(folder: Path, seed: int, options: argparse.Namespace) -> None:
    """Make a model in another process unless the folder holds it; torch in this process would distort the timing."""
    done = folder / "recipe.json"
    if done.exists() and json.loads(done.read_text()) == recipe(options):
        return
    print(f"making {folder} ...", file=sys.stderr, flush=True)
    maker = [sys.executable, "-m", "scripts.benchmarks.models"]
    arguments = [str(folder.resolve()), str(seed), json.dumps(recipe(options)), options.made_on]
    subprocess.run([*maker, *arguments], check=True, cwd=ROOT)


def parameters(options: argparse.Namespace) -> int:
    """Return the number of parameters of a model."""
    layer = 4 * options.hidden**2 + 3 * options.hidden * options.intermediate + 2 * options.hidden
    return options.layers * layer + (2 * options.vocab + 1) * options.hidden


# ---- the commands


def commands(work: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """Return a mapping from names to commands, each of which writes to ``work/out``."""
    weights = [file for name in MODELS for file in sorted((work / name).glob("model*.safetensors"))]
    fishers = [file for name in MODELS for file in sorted((work / name).glob("fisher*.safetensors"))]
    size = sum(file.stat().st_size for file in weights) // len(MODELS)
    read = [str(file) for file in weights + fishers]
    found = {COPY: [sys.executable, "-S", "-c", COPY_CODE, str(work / "out" / "copy"), str(size), *read]}
    extra = ["--no-write-model-card", "--no-copy-tokenizer", *options.options.split()]
    extra += ["-j", str(options.threads)] if options.threads is not None else []
    program = str(Path(sys.executable).with_name("mergekit-yaml"))
    for method in (*MERGES, *TRIMMED) if options.density is not None else MERGES:
        config = work / f"{method.replace(' ', '_')}.yml"
        config.write_text(json.dumps(merge_config(method, work, options)))  # JSON is YAML
        found[method] = [program, str(config), str(work / "out"), *extra]
    wanted = {*(options.only or found), "linear"}
    return {name: command for name, command in found.items() if name in wanted}


def merge_config(method: str, work: Path, options: argparse.Namespace) -> dict[str, object]:
    """Return the configuration of one merge."""
    a, b = (str(work / name) for name in MODELS)
    config: dict[str, object] = {"merge_method": method, "dtype": options.dtype}
    if method == "ubgm_squisher":
        return config | {"base_model": a, "models": [{"model": b}]}
    share: dict[str, object] = {"parameters": {"weight": 0.5}}
    if method in TRIMMED:
        config |= {"merge_method": method.split()[0], "base_model": str(work / BASE)}
        share = {"parameters": {"weight": 0.5, "density": options.density}}
    return config | {"models": [{"model": a, **share}, {"model": b, **share}]}


def bench(work: Path, options: argparse.Namespace) -> dict[str, object]:
    """Run every command once a round and return all samples."""
    samples: dict[str, list[dict[str, float]]] = {}
    load = [os.getloadavg()[0]]
    for number in range(options.repeat):
        for name, command in commands(work, options).items():
            print(f"round {number + 1} of {options.repeat}: {name} ...", file=sys.stderr, flush=True)
            with output_folder(work):
                samples.setdefault(name, []).append(run_measured(command).figures())
            load.append(os.getloadavg()[0])
    return {
        "recipe": recipe(options),
        "parameters": parameters(options),
        "threads": options.threads,
        "options": options.options,
        "density": options.density,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_average": [min(load), max(load)],
        "samples": samples,
    }


@contextlib.contextmanager
def output_folder(work: Path) -> Iterator[None]:
    """Make an empty folder ``work/out``, and remove it when the block ends."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(out, ignore_errors=True)


# ---- the report


def table(report: dict[str, object]) -> list[str]:
    """Return the table of minima and medians, ratios to linear, and a verdict on each goal."""
    samples: dict[str, list[dict[str, float]]] = report["samples"]  # type: ignore[assignment]
    keys = ("wall_s", "cpu_s", "rss_gb", "anonymous_gb")
    low = minima(samples)
    mid = {name: {key: statistics.median(run[key] for run in runs) for key in keys} for name, runs in samples.items()}
    linear = low["linear"]
    titles = ("wall s", "user+sys s", "peak RSS GB", "anonymous GB")
    rows = [
        f"{'min / median':<14}"
        + "".join(f"{title:>17}" for title in titles)
        + f"{'wall x':>8}{'CPU x':>7}{'anon +GB':>10}"
    ]
    for name in samples:
        cells = "".join(f"{low[name][key]:>9.2f} /{mid[name][key]:>6.2f}" for key in keys)
        ratios = f"{low[name]['wall_s'] / linear['wall_s']:>8.2f}{low[name]['cpu_s'] / linear['cpu_s']:>7.2f}"
        rows.append(f"{name:<14}{cells}{ratios}{low[name]['anonymous_gb'] - linear['anonymous_gb']:>10.2f}")
    if "squisher" in low:
        cpu = low["squisher"]["cpu_s"] / linear["cpu_s"]
        memory = low["squisher"]["anonymous_gb"] - linear["anonymous_gb"]
        rows.append(
            f"squisher: CPU {cpu:.2f} x linear (goal <= {CPU_GOAL}: {verdict(cpu <= CPU_GOAL)}), anonymous memory "
            f"{memory:+.2f} GB (goal <= {MEMORY_GOAL:+}: {verdict(memory <= MEMORY_GOAL)})"
        )
    if "squisher" in low and TRIMMED[0] in low:
        ratios = [low[TRIMMED[0]]["cpu_s"] / low[name]["cpu_s"] for name in ("squisher", TRIMMED[1]) if name in low]
        rows.append(
            f"density: CPU {ratios[0]:.2f} x squisher without" + "".join(f", {x:.2f} x ties" for x in ratios[1:])
        )
    quiet, busy = report["load_average"]  # type: ignore[misc]
    rounds = len(samples["linear"])
    threads = report["threads"] or "not given"
    rows.append(
        f"{report['parameters'] / 1e6:.1f}M parameters a model, {rounds} rounds, -j {threads}, "  # type: ignore[operator]
        f"{report['cores']} cores, load average {quiet:.1f} to {busy:.1f}; ratios are of the minima"
    )
    return rows


if __name__ == "__main__":
    sys.exit(main())
