"""Command line of the demo."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from scripts import ROOT
from scripts.demo_tasks.assets import DemoError
from scripts.demo_tasks.processes import Progress
from scripts.demo_tasks.report import as_text
from scripts.demo_tasks.run import Run
from scripts.demo_tasks.settings import FOUR_TASKS, SHARED_HEAD

HOME = ROOT / ".demo"


def main(arguments: list[str] | None = None) -> int:
    """Run a setting and print its table."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument(
        "--ubgm", action="store_true", help="run the setting of three sentiment domains with a base and one shared head"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of split, heads, dropout and order (default 0)")
    parser.add_argument(
        "--own-seeds", action="store_true", help="give each run its own seed, so that the heads start apart"
    )
    parser.add_argument(
        "--out", type=Path, default=HOME, help="folder for checkpoints, merges and logs (default .demo)"
    )
    parser.add_argument(
        "--packages", type=Path, default=HOME / "packages", help="folder of the archives (default .demo/packages)"
    )
    parser.add_argument("--json", type=Path, help="JSON file for the measured numbers")
    options = parser.parse_args(arguments)
    setting = SHARED_HEAD if options.ubgm else FOUR_TASKS
    if options.own_seeds:
        setting = dataclasses.replace(setting, seed_stride=1000)
    out = options.out.resolve()
    progress = Progress(Run.weight(setting))
    try:
        result = Run(setting, options.seed, out, options.packages.resolve(), progress)()
    except DemoError as error:
        progress.close()
        print(f"demo: {error}", file=sys.stderr)
        return 1
    progress.close()
    print(as_text(result))
    print(f"\nCheckpoints, configurations and merged models are in {out / setting.name}")
    if options.json:
        options.json.write_text(json.dumps(result.as_json(), indent=2) + "\n", encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
