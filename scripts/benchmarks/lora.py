"""Time a merge of two LoRAs by their lifted Fishers on a random Llama, relative to mergekit's linear.

``linear`` merges the same ``BASE+ADAPTER`` as mergekit does: it adds each LoRA to a copy of the whole model first.
``linear of copies`` starts from the copies. ``squisher`` lifts the Fisher from ``optimizer.pt`` and adds the LoRA to
each tensor as it is read. The commands take turns in one run, each on one thread, because only ratios within a run are
meaningful on a shared machine. Anonymous memory excludes mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts import ROOT
from scripts.benchmarks.merge import BASE, comparison_parser, output_folder, parameters, prepare_model, recipe
from scripts.benchmarks.process import minima, run_measured, verdict, work_folder
from scripts.benchmarks.report import write_report

ADAPTERS = ("lora-a", "lora-b")
LINEAR, COPIES, LIFTED = "linear", "linear of copies", "squisher"
CPU_GOAL = 1.2  # squisher / linear
MEMORY_GOAL = 0.2  # GB of anonymous memory above linear
STEPS = 100


def main(arguments: list[str] | None = None) -> int:
    """Make the models, time the commands, print the figures; or make an adapter in a process of its own."""
    options = parse(arguments)
    if options.make is not None:
        make_adapter(options.make, options.work, options.rank)
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"
    with work_folder(options.work, "lora") as work:
        prepare_model(work / BASE, 0, options)
        for name in ADAPTERS:  # torch in this process would distort the timing
            if not (work / name / "optimizer.pt").exists():
                command = [
                    sys.executable,
                    "-m",
                    "scripts.benchmarks.lora",
                    "--make",
                    name,
                    "--work",
                    str(work.resolve()),
                ]
                subprocess.run([*command, "--rank", str(options.rank)], check=True, cwd=ROOT)
        report = bench(work, options)
    print("\n".join(lines(report)))
    if options.json:
        write_report(options.json, [report])
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = comparison_parser(__doc__, repeat=3)
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRAs (default: 16)")
    parser.add_argument("--make", choices=ADAPTERS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def make_adapter(name: str, work: Path, rank: int) -> None:
    """Write a random LoRA of all linear layers, and the state of AdamW that its run would leave."""
    import peft
    import torch
    import transformers
    from safetensors.torch import save_file

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(work / BASE))
        lora = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", base_model_name_or_path=str(work / BASE)
        )
        adapted = peft.get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(1 + ADAPTERS.index(name))
    shapes = {key: p.shape for key, p in adapted.named_parameters() if p.requires_grad}
    factors = {key: torch.randn(shape, generator=generator) / 100 for key, shape in shapes.items()}
    moments = [torch.rand(shape, generator=generator) / 1e4 for shape in shapes.values()]
    state = {
        i: {"step": torch.tensor(float(STEPS)), "exp_avg": torch.zeros_like(v), "exp_avg_sq": v}
        for i, v in enumerate(moments)
    }
    group = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0] | {"params": list(state)}
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    adapted.peft_config["default"].save_pretrained(str(folder))
    save_file(
        {key.replace(".default", ""): factor for key, factor in factors.items()}, folder / "adapter_model.safetensors"
    )
    torch.save({"state": state, "param_groups": [group]}, folder / "optimizer.pt")


def command(name: str, work: Path) -> list[str]:
    """Return the command of one merge, which writes to ``work/out``."""
    models = [{"model": f"{work / BASE}+{work / lora}", "parameters": {"weight": 0.5}} for lora in ADAPTERS]
    method = name.split()[0]
    file = work / f"{method}_lora.yml"
    file.write_text(json.dumps({"merge_method": method, "dtype": "bfloat16", "models": models}))  # JSON is YAML
    program = str(Path(sys.executable).with_name("mergekit-yaml"))
    extra = [] if method == LIFTED else ["--lora-merge-cache", str(work / "copies")]
    return [program, str(file), str(work / "out"), "--no-write-model-card", "--no-copy-tokenizer", *extra]


def bench(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run every command once a round; return all samples."""
    samples: dict[str, list[dict[str, float]]] = {}
    load = [os.getloadavg()[0]]
    for number in range(options.repeat):
        shutil.rmtree(work / "copies", ignore_errors=True)
        for name in (LINEAR, COPIES, LIFTED):
            print(f"round {number + 1} of {options.repeat}: {name} ...", file=sys.stderr, flush=True)
            with output_folder(work):
                samples.setdefault(name, []).append(run_measured(command(name, work)).figures())
            load.append(os.getloadavg()[0])
    shutil.rmtree(work / "copies", ignore_errors=True)
    sizes = {"recipe": recipe(options), "parameters": parameters(options), "rank": options.rank}
    return sizes | {"load_average": [min(load), max(load)], "samples": samples}


def lines(report: dict[str, Any]) -> list[str]:
    """Return the figures of each merge, with the verdicts on the goals."""
    least = minima(report["samples"])
    found = [f"{report['parameters'] / 1e6:.0f} million weights, two LoRAs of rank {report['rank']}"]
    for name, figures in least.items():
        found.append(f"{name:<18} CPU {figures['cpu_s']:6.1f} s, anonymous {figures['anonymous_gb']:.2f} GB")
    for name in (LINEAR, COPIES):
        ratio = least[LIFTED]["cpu_s"] / least[name]["cpu_s"]
        more = least[LIFTED]["anonymous_gb"] - least[name]["anonymous_gb"]
        found.append(
            f"squisher against {name}: CPU {ratio:.2f} x (goal <= {CPU_GOAL}: {verdict(ratio <= CPU_GOAL)}), memory "
            f"{more:+.2f} GB (goal <= {MEMORY_GOAL:+}: {verdict(more <= MEMORY_GOAL)})"
        )
    quiet, busy = report["load_average"]
    found.append(f"load average {quiet:.1f} to {busy:.1f}; minima of {len(report['samples'][LINEAR])} rounds")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
