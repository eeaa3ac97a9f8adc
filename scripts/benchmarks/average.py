"""Measure the CPU time that ``FisherAverageCallback`` adds to a run of the Trainer.

Runs with and without the average take turns in one process on one thread. Ratios compare the fastest rounds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from scripts.benchmarks.report import write_report
from squisher_mergekit.training import FisherAverageCallback


def seconds(steps: int, share: float | None) -> float:
    """Return the CPU seconds of a run of a BERT (four layers of 256) on batches of 16 random texts of 64 tokens."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
        num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    rows = [{"input_ids": torch.randint(3, 1000, (64,)), "labels": torch.tensor(n % 3)} for n in range(16 * steps)]
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder, per_device_train_batch_size=16, max_steps=steps, save_strategy="no", use_cpu=True, report_to=[],
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        callbacks = [] if share is None else [FisherAverageCallback(share=share)]
        trainer = transformers.Trainer(model, args, train_dataset=rows, callbacks=callbacks)
        began = time.process_time()
        trainer.train()
        return time.process_time() - began


def measure(steps: int, shares: list[float], rounds: int) -> dict[str, Any]:
    """Return the CPU seconds of a plain run, and the share that each average adds."""
    fastest: dict[float | None, float] = {}
    for _ in range(rounds):
        for share in (None, *shares):
            fastest[share] = min(fastest.get(share, float("inf")), seconds(steps, share))
    plain = fastest[None]
    added = {f"{share:g}": fastest[share] / plain - 1 for share in shares}
    return {"steps": steps, "rounds": rounds, "plain_s": plain, "added": added}


def main() -> int:
    """Measure each length of a run with each share, and print one line for each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.05, 0.1, 0.25])
    parser.add_argument("--steps", nargs="+", type=int, default=[40, 120], help="steps of each run")
    parser.add_argument("--repeat", type=int, default=3, help="number of rounds")
    parser.add_argument("--json", type=Path, help="JSON file for the measured numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    reports = []
    for steps in options.steps:
        reports.append(measure(steps, options.shares, options.repeat))
        print(f"plain run of {steps} steps: {reports[-1]['plain_s']:.1f} s of CPU time")
        for share, more in reports[-1]["added"].items():
            print(f"share {share}: {100 * more:.1f} % more, {more / float(share):.2f} steps a batch looked at")
    if options.json:
        write_report(options.json, reports)
    return 0


if __name__ == "__main__":
    sys.exit(main())
