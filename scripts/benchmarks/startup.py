"""Measure the CPU time that the start-up hook adds to every start of Python.

Two environments take turns with ``python -c pass``; one has the compiled start-up files of an installation. The median
is the cost for a user; the minimum is free of the influence of other work on the machine.
"""

import argparse
import compileall
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from scripts import ROOT

PACKAGE = ROOT / "squisher_mergekit"
SWITCH = "SQUISHER_MERGEKIT_AUTOLOAD"
GOAL = 1.0


def make(root: Path, hook: bool) -> Path:
    """Make an environment, with start-up files and package if ``hook``, and return its interpreter."""
    venv.create(root, with_pip=False, symlinks=True)
    if hook:
        [packages] = root.glob("lib/python*/site-packages")
        for file in (PACKAGE / "_startup").glob("squisher_mergekit*"):
            shutil.copy(file, packages)
        shutil.copytree(PACKAGE, packages / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "_startup"))
        compileall.compile_dir(packages, quiet=2)
    return root / "bin" / "python"


def start(python: Path, switch: str | None) -> float:
    """Return the CPU milliseconds of one start."""
    environment = {key: value for key, value in os.environ.items() if key != SWITCH}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([python, "-c", "pass"], check=True, env=environment | ({} if switch is None else {SWITCH: switch}))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main() -> int:
    """Measure, print the table, and return 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=300, help="number of starts of each kind, in turns (default 300)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        hooked, bare = make(Path(folder, "hooked"), True), make(Path(folder, "bare"), False)
        kinds = {"no hook": (bare, None), f"{SWITCH}=0": (hooked, "0"), "hook": (hooked, None)}
        samples: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(options.starts):
            for kind, (python, switch) in kinds.items():
                samples[kind].append(start(python, switch))
    base = samples["no hook"]
    print(f"{'CPU of python -c pass':<30}{'median ms':>10}{'added':>8}{'least ms':>10}{'added':>8}")
    for kind, values in samples.items():
        median, least = statistics.median(values), min(values)
        more = median - statistics.median(base), least - min(base)
        print(f"{kind:<30}{median:>10.2f}{more[0]:>+8.2f}{least:>10.2f}{more[1]:>+8.2f}")
    added = statistics.median(samples["hook"]) - statistics.median(base)
    print(f"{options.starts} starts each, load average {os.getloadavg()[0]:.1f}; goal: the median grows by under "
          f"{GOAL:g} ms: {'met' if added < GOAL else 'missed'}")  # fmt: skip
    return int(added >= GOAL)


if __name__ == "__main__":
    sys.exit(main())
