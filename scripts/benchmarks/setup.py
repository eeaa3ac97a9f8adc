"""Measure CPU time and disk of both set-up commands, scripts/check and scripts/demo.

    python -m scripts.benchmarks.setup [--commands check demo] --json scripts/experiments/results/bench_setup.json

The file keeps its entries for commands that are not measured. An environment that is missing is installed first, which
counts as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from scripts import ROOT
from scripts.benchmarks.process import run_timed
from scripts.benchmarks.report import write_report

FOLDERS = {"check": ".venv", "demo": ".demo"}


def main() -> int:
    """Run the commands, and write their costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", nargs="+", choices=list(FOLDERS), default=list(FOLDERS))
    parser.add_argument("--json", type=Path, required=True, help="JSON file for the measured numbers")
    options = parser.parse_args()
    kept = json.loads(options.json.read_text(encoding="utf-8"))["measured"] if options.json.is_file() else []
    found = {one["command"]: one for one in kept} | {name: measure(name) for name in options.commands}
    write_report(options.json, [found[name] for name in FOLDERS if name in found])
    return 0


def measure(name: str) -> dict[str, Any]:
    """Run one command, and return its CPU seconds, exit code, and the bytes of its folder."""
    code, seconds = run_timed([str(ROOT / "scripts" / name)])
    return {"command": name, "exit_code": code, "cpu_s": seconds, "bytes": size_of(ROOT / FOLDERS[name])}


def size_of(folder: Path) -> int:
    """Return the bytes of the files below a folder, without links."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


if __name__ == "__main__":
    sys.exit(main())
