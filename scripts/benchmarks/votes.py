"""Time whole merges with options of the vote on random Llamas, relative to the plain squisher.

The commands take turns in one run, each on one thread, because only ratios within a run are meaningful on a shared
machine. All but the plain merge read a third model, the base; one threshold for the whole model reads every tensor once
more. Anonymous memory excludes mapped files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.benchmarks.merge import BASE, MODELS, compare, comparison_parser, output_folder, parameters, recipe
from scripts.benchmarks.process import minima, run_measured, verdict
from scripts.experiments.tables import Table

PLAIN = "squisher"
CHANGE = {"density_by": "change", "density_scope": "model"}
OPTIONS: dict[str, dict[str, object]] = {
    PLAIN: {},
    "lambda": {"lambda": 1.5},
    "consensus: sign": {"consensus": "sign"},
    "density": {"density": 0.1},
    "density_scope: model": {"density": 0.1, "density_scope": "model"},
    "change, abstain": {"density": 0.1, "trimmed": "abstain", **CHANGE},
    "OTA-merge": {"density": 0.1, "trimmed": "abstain", "power": 0.5, **CHANGE},
    "write_fisher": {"write_fisher": True},
}
LABELS = {
    "change, abstain": "`density_by: change` of the model, `trimmed: abstain`",
    "OTA-merge": "OTA-merge, as options",
}
CPU_GOALS = {"consensus: sign": 1.25, "density_scope: model": 2.0}  # times squisher


def main(arguments: list[str] | None = None) -> int:
    """Make the models, time the commands, print the figures."""
    return compare(parse(arguments), "votes", bench, lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = comparison_parser(__doc__, repeat=3)
    parser.add_argument("--only", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    return parser.parse_args(arguments)


def command(name: str, work: Path) -> list[str]:
    """Return the command of one merge, which writes to ``work/out``."""
    models = [{"model": str(work / model), "parameters": {"weight": 0.5}} for model in MODELS]
    config = {"merge_method": "squisher", "dtype": "bfloat16", "models": models, "parameters": OPTIONS[name]}
    file = work / f"votes_{list(OPTIONS).index(name)}.yml"
    file.write_text(json.dumps(config | ({} if name == PLAIN else {"base_model": str(work / BASE)})))  # JSON is YAML
    program = str(Path(sys.executable).with_name("mergekit-yaml"))
    return [program, str(file), str(work / "out" / "merged"), "--no-write-model-card", "--no-copy-tokenizer"]


def bench(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run every command once a round; return all samples."""
    samples: dict[str, list[dict[str, float]]] = {}
    for number in range(options.repeat):
        for name in dict.fromkeys((PLAIN, *options.only)):
            print(f"round {number + 1} of {options.repeat}: {name} ...", file=sys.stderr, flush=True)
            with output_folder(work):
                samples.setdefault(name, []).append(run_measured(command(name, work)).figures())
    return {"recipe": recipe(options), "parameters": parameters(options), "samples": samples}


def lines(report: dict[str, Any]) -> list[str]:
    """Return the figures of each merge, with a verdict on each goal."""
    least = minima(report["samples"])
    found = [f"{report['parameters'] / 1e6:.0f} million weights"]
    for name, figures in least.items():
        ratio = figures["cpu_s"] / least[PLAIN]["cpu_s"]
        text = f"{name:<22} CPU {figures['cpu_s']:6.1f} s, {ratio:5.2f} x squisher"
        text += f", anonymous {figures['anonymous_gb']:.2f} GB"
        if name in CPU_GOALS:
            text += f" (goal <= {CPU_GOALS[name]:g}: {verdict(ratio <= CPU_GOALS[name])})"
        found.append(text)
    return found


def tables(measured: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return the table of CPU time and memory of each option."""
    (report,) = measured
    least = minima(report["samples"])
    rows = []
    for name, one in least.items():
        times = one["cpu_s"] / least[PLAIN]["cpu_s"]
        label = LABELS.get(name, f"`{name}`")
        rows.append((label, [f"{one['cpu_s']:.1f}", f"{times:.2f}", f"{one['anonymous_gb']:.2f}"]))
    rounds = min(map(len, report["samples"].values()))
    note = (
        f"Two random Llamas of {report['parameters'] / 1e6:.0f} million weights, Fishers in "
        f"{report['recipe']['fisher_dtype']}, one thread; the minimum of {rounds} round{'s' if rounds > 1 else ''} in "
        f"turns. All but `{PLAIN}` read a third model, the base; a share of the kept entries adds their masks."
    )
    columns = ["CPU s", f"times `{PLAIN}`", "anonymous GB"]
    return [Table("**Options of the vote.** Whole commands", columns, rows, [note])]


if __name__ == "__main__":
    raise SystemExit(main())
