r"""Measure what a Fisher costs beside a plain forward and backward pass, and how far it is from the slow truth.

Time: all methods take turns in one process on one thread, and the CPU time of a method's second call in a row is
compared, as the ratio of medians to the plain pass over the same batch. Methods that cost more than five plain passes
run in three rounds. Of methods that take chunks of the batch, the chunk that was fastest in the first round is kept.
Ours holds two examples against autograd, again and again but ever more seldom: in calls 1, 2, 4, 8, ... A median does
not show that, so that what the first two cost is printed as well; they count as memory.

Errors are against a loop over single examples (and classes, of exact) in float64: the largest difference, as a share of
the tensor's largest entry, or of 1e-12 of the model's, where gradients vanish by symmetry. Beyond 1e-4 a tensor is
wrong. Sampled is compared for the labels that the package draws from its seed; those of others are not known.

Memory (--memory): each method runs in a process of its own. What counts is by how much its first call, and some later
ones, raise the peak over what model and batch take. Memory is given back to the system when it is freed, so that the
peak is that of what is in use.

Other packages are measured where they are installed. They declare torchvision, which would bring another torch, and do
not need it:

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
    """Measure, and print a table for each model."""
    options = parse()
    warnings.simplefilter("ignore")  # what the other packages warn of
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # ratios and errors are those of float32
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
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="default: all but llama-large")
    parser.add_argument("--memory", action="store_true", help=f"peaks, not times; of {', '.join(MEMORY_MODELS)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeat", type=int, default=9, help="rounds")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    options = parser.parse_args()
    default = MEMORY_MODELS if options.memory else [name for name in MODELS if name != "llama-large"]
    options.models = options.models or default
    return options


def limit_memory() -> None:
    """Make a method that asks for more memory than the machine has fail, rather than end this process."""
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_DATA, (everything, hard))


if __name__ == "__main__":
    sys.exit(main())
