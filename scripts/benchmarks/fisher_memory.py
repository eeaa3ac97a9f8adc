"""Peak memory of each method for a Fisher: the part of ``fisher`` that ``--memory`` runs.

``python -m scripts.benchmarks.fisher_memory MODEL KIND METHOD CHUNK DEVICE`` measures one method in this process, and
prints the bytes of its first call and of later calls.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts import ROOT
from scripts.benchmarks.fisher_methods import METHODS, kinds_of, offered, plain
from scripts.benchmarks.fisher_models import Batch, build, labels_of, one
from scripts.benchmarks.fisher_others import OTHERS, require

MEMORY_MODELS = ("bert", "llama-large")
MARGIN = 1.25  # goal, relative to a plain step plus one copy of the parameters
PLAIN = "plain"
LATER = 4  # further calls, which show memory that a call does not free
# One heap. Blocks above 64 KiB are mapped, and return to the system as soon as they are freed.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


def memory_report(name: str, device: str) -> dict[str, Any]:
    """Measure all methods on one model, each in its own process."""
    model, batch = build(name, "cpu")
    size, copy = len(labels_of(batch)), sum(p.numel() * 4 for p in model.parameters())
    rows = [peak_of(name, "", PLAIN, 0, device)]
    for kind in kinds_of(batch):
        failed = set()  # methods that need no second attempt with other chunks
        for method in offered([*METHODS, *OTHERS], kind, size):
            if method.name not in failed:
                row = peak_of(name, kind, method.name, method.chunk, device)
                rows.append(row if "problem" in row else row | {"method": method.title(size)})
                failed.update({method.name} if "problem" in row else ())
    return {"model": name, "device": device, "copy": copy, "goal": (rows[0]["bytes"] + copy) * MARGIN, "rows": rows}


def peak_of(name: str, kind: str, method: str, chunk: int, device: str) -> dict[str, Any]:
    """Measure one method; return a problem if it failed."""
    command = [sys.executable, "-m", "scripts.benchmarks.fisher_memory", name, kind, method, str(chunk), device]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        first, later = json.loads(done.stdout)
        return {"kind": kind, "method": method, "first": first, "bytes": max(first, later), "later": later}
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return {"kind": kind, "method": method, "problem": last[:100]}


def memory_table(report: dict[str, Any]) -> list[str]:
    """Return the table of one model."""
    lines = [
        f"{report['model']}: growth of the peak in MB ({report['device']}); one copy of the parameters is "
        f"{report['copy'] / 1e6:.0f}, so the goal, {MARGIN:g} x (plain + copy), is {report['goal'] / 1e6:.0f}",
        f"  {'':<40}{'1st call':>9}{'later':>8}",
    ]
    for row in report["rows"]:
        title = f"  {row['kind']:<11}{row['method']:<29}"
        if "problem" in row:
            lines.append(f"{title}{'-':>9}{'-':>8}  {row['problem']}")
            continue
        met = "met" if row["bytes"] <= report["goal"] else "missed"
        line = f"{title}{row['first'] / 1e6:>9.0f}{row['later'] / 1e6:>8.0f}"
        lines.append(f"{line}  goal {report['goal'] / 1e6:.0f}: {met}" if row["method"] == "ours" else line)
    return lines


# ---- in the process that measures


def grown(model: nn.Module, batch: Batch, kind: Any, name: str, chunk: int) -> tuple[int, int]:
    """Return the bytes by which the first call of a method and later calls raise the peak."""
    run: Any = functools.partial(plain, model, batch)
    if name != PLAIN:
        [method] = [method for method in [*METHODS, *OTHERS] if (method.name, method.chunk) == (name, chunk)]
        require(method)
        run = method.prepare(model, batch, kind, chunk)
    plain(model, one(batch, 0))  # loads everything that any pass loads
    model.zero_grad(set_to_none=True)
    gc.collect()
    device = next(model.parameters()).device
    before = reset_peak(device)
    run()
    first = peak(device) - before
    reset_peak(device)
    for _ in range(LATER):
        run()
    return first, peak(device) - before


def reset_peak(device: torch.device) -> int:
    """Reset the peak, and return the bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to the memory in use
    return peak(device)


def peak(device: torch.device) -> int:
    """Return the peak in bytes since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model_name, kind_name, method_name, chunk_size, device_name = sys.argv[1:]
    print(json.dumps(grown(*build(model_name, device_name), kind_name, method_name, int(chunk_size))))
