"""Peak memory of an estimate by dtype of the model, measured on a small Llama beside the calculation of ``on_paper``.

Each dtype runs in a process of its own. The figures are bytes a parameter beyond the interpreter: weights,
accumulators, the gradients of the first batch, and activations of short examples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from scripts import ROOT
from scripts.benchmarks.on_paper import WIDTH, Shape, estimate_memory
from scripts.benchmarks.report import write_report

SMALL = Shape(hidden=512, layers=6, wide=1376, vocab=8000, keys=512)
EXAMPLES, TOKENS = 2, 16
DTYPES = ("fp32", "bf16")
# One heap. Blocks above 64 KiB are mapped, and return to the system as soon as they are freed.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


def main(arguments: list[str] | None = None) -> int:
    """Measure each dtype, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all numbers there")
    options = parser.parse_args(arguments)
    found = [measure(dtype) for dtype in DTYPES]
    print("\n".join(lines(found)))
    if options.json:
        write_report(options.json, found)
    return 0


def measure(dtype: str) -> dict[str, Any]:
    """Return the bytes a parameter of an estimate in a process of its own, measured and on paper."""
    command = [sys.executable, "-m", "scripts.benchmarks.estimate_memory", "--in-this-process", dtype]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    paper = estimate_memory(SMALL, dtype, examples=EXAMPLES, tokens=TOKENS)
    # One gradient in float32 at a time is added on the CPU.
    expected = (paper.device + 4 * SMALL.largest) / SMALL.parameters
    return {"dtype": dtype, "parameters": SMALL.parameters, "paper": expected, **json.loads(done.stdout)}


def lines(found: list[dict[str, Any]]) -> list[str]:
    """Return the table."""
    rows = [f"{'bytes a parameter':<20}{'weights':>9}{'peak':>8}{'on paper':>10}"]
    for one in found:
        rows.append(f"{one['dtype']:<20}{one['weights']:>9.2f}{one['peak']:>8.2f}{one['paper']:>10.2f}")
    return [*rows, f"a Llama of {found[0]['parameters'] / 1e6:.0f}M parameters, {EXAMPLES} examples of {TOKENS} tokens"]


def bytes_of(dtype: str) -> dict[str, float]:
    """Return the bytes a parameter of the weights, and of weights and estimate at the peak, in this process."""
    import torch
    import transformers

    from scripts.benchmarks.fisher_memory import peak, reset_peak
    from squisher_mergekit.estimators.accumulator import FisherAccumulator
    from squisher_mergekit.estimators.dataset.load_model import MODEL_DTYPES

    torch.set_num_threads(1)
    device = torch.device("cpu")

    def estimate(shape: Shape) -> float:
        config = transformers.LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.wide,
            num_hidden_layers=shape.layers,
            num_attention_heads=8,
            use_cache=False,
        )
        model = transformers.LlamaForCausalLM(config).to(MODEL_DTYPES[dtype])  # type: ignore[index, arg-type]
        ids = torch.randint(shape.vocab, (EXAMPLES, TOKENS))
        weights = float(sum(parameter.nbytes for parameter in model.parameters()))
        before = reset_peak(device)
        accumulator = FisherAccumulator(model, task="causal-lm")
        accumulator.add({"input_ids": ids, "labels": ids})
        return weights + peak(device) - before

    estimate(Shape(64, 1, 64, 100, 64))  # loads everything that any pass loads
    return {"weights": float(WIDTH[dtype]), "peak": estimate(SMALL) / SMALL.parameters}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-this-process"]:
        warnings.simplefilter("ignore")
        print(json.dumps(bytes_of(sys.argv[2])))
        sys.exit(0)
    sys.exit(main())
