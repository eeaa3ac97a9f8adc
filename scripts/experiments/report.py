"""Writes what experiments and benchmarks found into the README: tables and pictures, from the files in results/ alone.

    scripts/experiments/report.py            # rewrite the README's blocks and the pictures
    scripts/experiments/report.py --check    # say whether they are what the JSON files tell

A block of the README lies between ``<!-- results: NAME -->`` and ``<!-- end of results: NAME -->``.
"""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.experiments import benchmarks
from scripts.experiments.runner import RESULTS, ROOT

README = ROOT / "README.md"
PICTURES = Path(__file__).parent / "pictures"
# Module of this package, whose ``tables(report)`` and ``pictures(report)`` say what is shown.
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
)
BENCHMARKS = tuple(benchmarks.TABLES)


def found(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """Return the report of an experiment; None if it has not been run."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def block(name: str, report: Mapping[str, Any]) -> str:
    """Return the text of the block of an experiment or a benchmark."""
    if name in BENCHMARKS:
        tables, made = benchmarks.TABLES[name](report["measured"]), benchmarks.made_by(report)
    else:
        tables = importlib.import_module(f"scripts.experiments.{name}").tables(report)
        count, minutes = len(report["cells"]), report["cpu_seconds"] / 60
        made = f"`python -m scripts.experiments.{name} --full`: {count} cells, {minutes:.0f} CPU-minutes on one thread"
    versions = ", ".join(f"{key} {value}" for key, value in report["versions"].items())
    last = f"<sub>{made}; {versions}; raw results in scripts/experiments/results/{name}.json</sub>"
    return "\n\n".join([*(table.markdown() for table in tables), last])


def written(text: str, blocks: Mapping[str, str]) -> str:
    """Return the README with its blocks replaced.

    Raises:
        ValueError: A block has no place in it.
    """
    for name, content in blocks.items():
        begin, end = f"<!-- results: {name} -->", f"<!-- end of results: {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"the README has no place for {name}: it needs {begin} and {end}")
        text = pattern.sub(lambda _, whole=f"{begin}\n{content}\n{end}": whole, text, count=1)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the README, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the README differs")
    options = parser.parse_args(arguments)
    reports = {name: report for name in EXPERIMENTS + BENCHMARKS if (report := found(name)) is not None}
    before = README.read_text(encoding="utf-8")
    after = written(before, {name: block(name, report) for name, report in reports.items()})
    if options.check:
        print("the README says what the results say" if after == before else "the README differs from the results")
        return int(after != before)
    README.write_text(after, encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    for name in (one for one in reports if one not in BENCHMARKS):
        for file, data in importlib.import_module(f"scripts.experiments.{name}").pictures(reports[name]).items():
            (PICTURES / file).write_bytes(data)
            print(f"{PICTURES / file}: {len(data) / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
