r"""Measure the cost of a Fisher relative to a plain forward and backward pass, and its error against a slow reference.

Time: all methods take turns in one process on one thread. The table has the CPU time of a method's second call in a
row, as the ratio of medians to the plain pass over the same batch. Methods that cost more than five plain passes
run in three rounds. If a method takes chunks of the batch, the fastest chunk of the first round remains. Our method
compares two examples with autograd in calls 1, 2, 4, 8, ... A median hides these checks, so the table has the cost of
the first two calls as well. They count as memory.

Error: the reference is a loop over single examples (and over classes for exact labels) in float64. An error is the
largest difference, relative to the tensor's largest entry, or to 1e-12 of the model's largest entry where gradients
vanish by symmetry. A tensor with an error above 1e-4 is wrong. Sampled labels are compared for the labels that this
package draws from its seed; the labels that other packages draw are unknown.

Memory (--memory): each method runs in its own process. The benchmark measures how far the first call, and some later
calls, raise the peak above the memory of model and batch. Freed memory returns to the system at once, so the peak is
memory in use.

The benchmark measures other packages where they are installed. They declare torchvision, which would bring another
torch, but do not need it:

    pip install --no-deps backpack-for-pytorch==1.7.1 nngeometry==0.4 asdfghjkl==0.1a4 opacus==1.6.0 \
        einops==0.8.2 unfoldNd==0.2.3 opt-einsum==3.4.0
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import warnings
from pathlib import Path

import torch

from scripts.benchmarks.fisher_memory import MEMORY_MODELS, memory_report, memory_table
from scripts.benchmarks.fisher_models import MODELS
from scripts.benchmarks.fisher_others import OTHERS
from scripts.benchmarks.fisher_time import table, time_report
from scripts.benchmarks.report import write_report


def main() -> int:
    """Measure each model and print its table."""
    options = parse()
    warnings.simplefilter("ignore")  # warnings of the other packages
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # ratios and errors have to be those of float32
    if options.device == "cpu" and not options.memory:
        limit_memory()
    reports = []
    for name in options.models:
        if options.memory:
            reports.append(memory_report(name, options.device))
            rows = memory_table(reports[-1])
        else:
            reports.append(time_report(name, options.repeat, options.device))
            rows = table(reports[-1])
        print("\n".join(rows), flush=True)
    print(f"one thread, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    if options.json:
        write_report(options.json, reports, {method.package for method in OTHERS} - {""})
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), help="models to measure (default: all but llama-large)"
    )
    parser.add_argument(
        "--memory", action="store_true", help=f"measure peaks of memory, not times, of {', '.join(MEMORY_MODELS)}"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeat", type=int, default=9, help="number of rounds")
    parser.add_argument("--json", type=Path, help="JSON file for the measured numbers")
    options = parser.parse_args()
    default = MEMORY_MODELS if options.memory else [name for name in MODELS if name != "llama-large"]
    options.models = options.models or default
    return options


def limit_memory() -> None:
    """Limit this process to the memory of the machine, so that a method that needs more fails with an error."""
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_DATA, (everything, hard))


if __name__ == "__main__":
    sys.exit(main())
