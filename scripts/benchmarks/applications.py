"""Measure time and memory of the commands that work on a model's files, against the memory bound of squisher extract.

The benchmark makes a random Llama and its Fisher, and runs each command in its own process. Anonymous memory excludes
mapped files, which the system can drop at any time. The bound is 0.7 GB plus the largest tensor in float32. Seconds are
those of the whole command, start included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from scripts.benchmarks.models import Recipe, make_model, shapes
from scripts.benchmarks.process import run_measured, work_folder
from scripts.benchmarks.report import write_report

MEMORY_GOAL = 0.7  # GB of anonymous memory on top of the largest tensor
RECIPES: dict[str, Recipe] = {
    "0.3B": {"hidden": 1024, "layers": 18, "intermediate": 2816, "vocab": 32000, "shards": 2},
    "tiny": {"hidden": 64, "layers": 2, "intermediate": 148, "vocab": 61, "shards": 2},
}
# Case -> arguments of `squisher`. {model} holds weights and Fisher, {base} is another model of the same shapes, {out}
# does not exist yet.
CASES: dict[str, list[str]] = {
    "prune": ["prune", "{model}", "--fisher", "{model}", "--sparsity", "0.75", "-o", "{out}"],
    "prune, all tensors": [
        *("prune", "{model}", "--fisher", "{model}", "--sparsity", "0.75", "-o", "{out}", "--no-default-ignore")
    ],
    "prune 2:4": ["prune", "{model}", "--fisher", "{model}", "--pattern", "2:4", "-o", "{out}"],
    "mask select": [
        *("mask", "select", "{model}", "--fisher", "{model}", "--keep", "0.005", "-o", "{out}/mask.safetensors")
    ],
    "mask select, reset": [
        *("mask", "select", "{model}", "--fisher", "{model}", "--base", "{base}", "--score", "reset"),
        *("--keep", "0.005", "-o", "{out}/mask.safetensors"),
    ],
    "mask reset": [
        *("mask", "reset", "{model}", "--base", "{base}", "--fisher", "{model}", "--keep", "0.005", "-o", "{out}")
    ],
    "mask reset, a half": [
        *("mask", "reset", "{model}", "--base", "{base}", "--fisher", "{model}", "--keep", "0.5", "-o", "{out}")
    ],
    "mask apply": ["mask", "apply", "{base}", "--difference", "{difference}", "-o", "{out}"],
    "mask apply, a half": ["mask", "apply", "{base}", "--difference", "{half}", "-o", "{out}"],
    "mask remove": ["mask", "remove", "{difference}", "--difference", "{difference}", "-o", "{out}"],
    "task2vec embed": ["task2vec", "embed", "{model}", "-o", "{out}"],
    "task2vec distance": ["task2vec", "distance", "{model}", "{base}"],
}
# Placeholder -> the case whose {out} it names; such a case runs once, and its output is kept.
PREPARED = {"{difference}": "mask reset", "{half}": "mask reset, a half"}


def main() -> int:
    """Make the model, run every case, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(RECIPES), default="0.3B")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="dtype of the weights")
    parser.add_argument(
        "--work", type=Path, help="folder that keeps the model between runs (default: a temporary folder)"
    )
    parser.add_argument("--json", type=Path, help="JSON file for the measured numbers")
    options = parser.parse_args()
    recipe = RECIPES[options.size] | {"dtype": options.dtype, "fisher_dtype": "float32"}
    with work_folder(options.work, "applications") as work:
        report = bench(work, recipe, options.cases)
    print("\n".join(table(report)))
    if options.json:
        write_report(options.json, [report])
    return 0


def bench(work: Path, recipe: Recipe, cases: list[str]) -> dict[str, Any]:
    """Measure the cases on one model."""
    model, base, out = work / "model", work / "base", work / "out"
    wanted = [model, base] if any("{base}" in CASES[name] for name in cases) else [model]
    for seed, folder in enumerate(wanted):
        done = folder / "recipe.json"
        if not done.exists() or json.loads(done.read_text()) != recipe:
            print(f"making {folder} ...", file=sys.stderr, flush=True)
            make_model(folder, seed, recipe)
    sizes = [4 * _entries(shape) for _, shape in shapes(recipe)]
    samples: dict[str, dict[str, Any]] = {}
    for name in cases:
        print(f"{name} ...", file=sys.stderr, flush=True)
        shutil.rmtree(out, ignore_errors=True)
        places = {"model": model, "base": base}
        for place, maker in PREPARED.items():
            if place in CASES[name]:
                places[place[1:-1]] = work / maker
                if not (work / maker).exists():
                    run_measured(_line(maker, places | {"out": work / maker}))
        samples[name] = run_measured(_line(name, places | {"out": out})).figures() | {"files": sizes_of(out)}
    shutil.rmtree(out, ignore_errors=True)
    return {
        "parameters": sum(sizes) // 4,
        "dtype": recipe["dtype"],
        "weights_bytes": sum(size for name, size in sizes_of(model).items() if name.startswith("model")),
        "limit_gb": MEMORY_GOAL + max(sizes) / 1e9,
        "cases": samples,
    }


def sizes_of(made: Path) -> dict[str, int]:
    """Return the bytes of the safetensors files of a folder, or of one file."""
    files = [made] if made.is_file() else sorted(made.glob("*.safetensors"))
    return {file.name: file.stat().st_size for file in files}


def _line(name: str, places: dict[str, Path]) -> list[str]:
    return [sys.executable, "-m", "squisher_mergekit", *(part.format(**places) for part in CASES[name]), "--quiet"]


def _entries(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def table(report: dict[str, Any]) -> list[str]:
    """Return one line for each case: seconds, memory, and the verdict on the bound."""
    rows = [
        f"{report['parameters'] / 1e6:.0f} million weights, {report['dtype']}; bound {report['limit_gb']:.2f} GB",
        f"{'':<22}{'wall s':>9}{'CPU s':>9}{'anonymous GB':>14}",
    ]
    for name, sample in report["cases"].items():
        verdict = "kept" if sample["anonymous_gb"] <= report["limit_gb"] else "broken"
        rows.append(
            f"{name:<22}{sample['wall_s']:>9.1f}{sample['cpu_s']:>9.1f}{sample['anonymous_gb']:>14.2f}  bound {verdict}"
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
