"""JSON file of a benchmark: measured numbers, command, versions and machine."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scripts.experiments.runner import cpu_seconds, versions, write_json


def write_report(file: Path, measured: Sequence[dict[str, Any]], modules: Iterable[str] = ()) -> None:
    """Write the measured numbers of a benchmark with the command line of this process.

    Args:
        file: JSON file to write.
        measured: One report for each part, such as a model.
        modules: Further modules; the file has the versions of their packages if they are installed.
    """
    installed = importlib.metadata.packages_distributions()
    others = {
        name: importlib.metadata.version(name) for module in sorted(modules) for name in installed.get(module, [])
    }
    name = Path(sys.argv[0]).stem
    report = {
        "bench": name,
        "command": shlex.join(["python", "-m", f"scripts.benchmarks.{name}", *sys.argv[1:]]),
        "versions": versions() | others,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "cpu_seconds": round(cpu_seconds(), 1),
        "measured": list(measured),
    }
    write_json(file, report)
