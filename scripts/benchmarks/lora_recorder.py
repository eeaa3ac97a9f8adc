"""Measure the CPU time that a recorder of a LoRA's merged weights adds to a step of training.

Steps of two equal models, one with a recorder, take turns in one process on one thread, in a random order in each pair.
The share is the median over the pairs of the difference, divided by the median of a plain step.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from scripts.benchmarks.process import verdict
from scripts.benchmarks.report import write_report
from squisher_mergekit.training import LoraRecorder

GOAL = 0.05


def adapted(width: int, layers: int, rank: int) -> Any:
    """Return a LoRA on all linear layers of a random BERT, in training mode."""
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        intermediate_size=4 * width, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "key", "value", "dense"])
    with warnings.catch_warnings():
        # peft calls a deprecated function of transformers.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return peft.get_peft_model(model, lora).train()


def measure(width: int, layers: int, rank: int, texts: int, tokens: int, pairs: int) -> dict[str, Any]:
    """Return the median CPU seconds of a plain step, and the share that the recorder adds.

    Args:
        width: Hidden size of the model.
        layers: Its number of layers.
        rank: Rank of the LoRA.
        texts: Texts of a step.
        tokens: Tokens of a text.
        pairs: Number of pairs of steps, after one that does not count.
    """
    torch.manual_seed(0)
    models = {recorded: adapted(width, layers, rank) for recorded in (False, True)}
    optimizers = {
        recorded: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for recorded, model in models.items()
    }
    recorders = {False: None, True: LoraRecorder(models[True])}
    batch = {"input_ids": torch.randint(3, 1000, (texts, tokens)), "labels": torch.arange(texts) % 3}
    order, plain, added = random.Random(0), [], []
    for pair in range(pairs + 1):
        seconds = {}
        for recorded in order.sample([False, True], 2):
            seconds[recorded] = step(models[recorded], optimizers[recorded], batch, recorders[recorded])
        if pair:
            plain.append(seconds[False])
            added.append(seconds[True] - seconds[False])
    settings = {"width": width, "layers": layers, "rank": rank, "texts": texts, "tokens": tokens, "pairs": pairs}
    found = statistics.median(plain)
    return settings | {"plain_s": found, "added": statistics.median(added) / found}


def step(
    model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor], recorder: LoraRecorder | None
) -> float:
    """Take one step, and return its CPU seconds."""
    began = time.process_time()
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if recorder is not None:
        recorder.update()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - began


def main() -> int:
    """Measure one size of model, print the share, and return 1 if it is above the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384, help="hidden size of the model")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--texts", type=int, default=16, help="texts of a step")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a text")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps with and without the recorder")
    parser.add_argument("--json", type=Path, help="JSON file for the measured numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = {key: value for key, value in vars(options).items() if key != "json"}
    report = measure(**given)
    met = report["added"] <= GOAL
    print(
        f"plain step: {1000 * report['plain_s']:.0f} ms of CPU time; the recorder adds {100 * report['added']:.1f} % "
        f"(goal at most {100 * GOAL:.0f} %: {verdict(met)})"
    )
    if options.json:
        write_report(options.json, [report], ["peft"])
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
