"""Write tables and pictures of the experiments and benchmarks into the README files, from the JSON files in results/.

    python -m scripts.experiments.report            # rewrite the blocks and the pictures
    python -m scripts.experiments.report --check    # compare the blocks with the JSON files; exit with 1 if one differs

A block stands between ``<!-- BEGIN NAME -->`` and ``<!-- END NAME -->``. Tables of experiments are in the README.md of
this folder, tables of benchmarks in that of scripts/, and the blocks ``gain`` and ``setup`` in the top README.md, if it
has the marks.
"""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts import ROOT
from scripts.benchmarks import gpu_table
from scripts.benchmarks import tables as benchmarks
from scripts.experiments import gain
from scripts.experiments.runner import RESULTS

README = ROOT / "README.md"
EVIDENCE = ROOT / "scripts" / "experiments" / "README.md"
COMMANDS = ROOT / "scripts" / "README.md"
PICTURES = Path(__file__).parent / "pictures"
# Modules of this package; the ``tables(report)`` and ``pictures(report)`` of each make a block.
EXPERIMENTS = (
    "merging",
    "gradient_matching",
    "pruning",
    "fish_mask",
    "fish_rates",
    "transfer",
    "forgetting",
    "cost",
    "questions",
    "structure",
    "structure_controls",
    "structure_counts",
    "structure_domains",
    "structure_language",
    "structure_adapters",
    "structure_optimizers",
    "merge_methods",
    "merge_methods_counts",
    "merge_methods_language",
    "merge_methods_wider",
    "lora_rank",
    "lora_merging",
    "lora_language",
)
BENCHMARKS = tuple(benchmarks.TABLES)
GAIN, SETUP, GPU, CHECKED = "gain", "setup", "check_gpu", "fisher_gpu"
BLOCK = re.compile(r"<!-- BEGIN (\w+) -->.*?<!-- END \1 -->", re.DOTALL)


def found(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """Return the report of an experiment or benchmark, or None if it has not been run."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def block(name: str, report: Mapping[str, Any]) -> str:
    """Return the text of the block of an experiment or a benchmark."""
    if name in BENCHMARKS:
        tables, made = benchmarks.TABLES[name](report["measured"]), benchmarks.made_by(report)
    else:
        tables = importlib.import_module(f"scripts.experiments.{name}").tables(report)
        made = _made(name, report)
    versions = ", ".join(f"{key} {value}" for key, value in report["versions"].items())
    last = f"<sub>{made}; {versions}; raw results in scripts/experiments/results/{name}.json</sub>"
    return "\n\n".join([*(table.markdown() for table in tables), last])


def _made(name: str, report: Mapping[str, Any]) -> str:
    """Return the command of an experiment, with the number of its cells and their CPU time."""
    command, cells = f"python -m scripts.experiments.{name} --full", f"{len(report['cells'])} cells"
    if "device" in report["versions"]:
        return f"`{command} --device cuda`: {cells}"
    return f"`{command}`: {cells}, {report['cpu_seconds'] / 60:.0f} CPU-minutes on one thread"


def blocks() -> dict[Path, dict[str, str]]:
    """Return the text of every block, by the README file that holds it."""
    reports = {name: report for name in EXPERIMENTS + BENCHMARKS if (report := found(name)) is not None}
    placed = {
        EVIDENCE: {name: block(name, reports[name]) for name in EXPERIMENTS if name in reports},
        COMMANDS: {name: block(name, reports[name]) for name in BENCHMARKS if name in reports},
    }
    if (report := found(GPU)) is not None:
        parts = [*(table.markdown() for table in gpu_table.tables(report)), gpu_table.made_by(report)]
        if (report := found(CHECKED)) is not None:
            parts += [gpu_table.checked(report).markdown(), gpu_table.checked_by(report)]
        placed[COMMANDS][GPU] = "\n\n".join(parts)
    placed[README] = {}
    marks = BLOCK.findall(README.read_text(encoding="utf-8"))
    if GAIN in marks:
        placed[README][GAIN] = gain.block(reports[gain.SOURCE])
    if SETUP in marks and "bench_setup" in reports:
        placed[README][SETUP] = "\n".join(
            table.markdown() for table in benchmarks.setup(reports["bench_setup"]["measured"])
        )
    return placed


def written(text: str, contents: Mapping[str, str], file: str = "README.md") -> str:
    """Return the text of a README file with its blocks replaced.

    Raises:
        ValueError: The file has no marks for a block.
    """
    for name, content in contents.items():
        begin, end = f"<!-- BEGIN {name} -->", f"<!-- END {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{file} must have a place for the block {name}; add the lines {begin} and {end}")
        text = pattern.sub(lambda _, whole=f"{begin}\n{content}\n{end}": whole, text, count=1)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the README files and the pictures, or check the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a file differs")
    options = parser.parse_args(arguments)
    differing = []
    for file, contents in blocks().items():
        before = file.read_text(encoding="utf-8")
        after = written(before, contents, str(file.relative_to(ROOT)))
        if before != after:
            differing.append(str(file.relative_to(ROOT)))
            if not options.check:
                file.write_text(after, encoding="utf-8")
    if options.check:
        print(f"differing from the results: {', '.join(differing)}" if differing else "all blocks match the results")
        return int(bool(differing))
    _draw()
    return 0


def _draw() -> None:
    """Write the pictures of all experiments that were run."""
    PICTURES.mkdir(exist_ok=True)
    for name in EXPERIMENTS:
        report = found(name)
        if report is not None:
            module = importlib.import_module(f"scripts.experiments.{name}")
            drawn = module.pictures(report) | (gain.pictures(report) if name == gain.SOURCE else {})
            for file, data in drawn.items():
                (PICTURES / file).write_bytes(data)
                print(f"{PICTURES / file}: {len(data) / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
