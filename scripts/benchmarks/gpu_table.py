"""Tables of check_gpu.json and fisher_gpu.json for scripts/README.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scripts.benchmarks.fisher_gpu import CHECKED
from scripts.experiments.tables import Table

SMALL = {"cnn": "CNN", "bert": "BERT, 4 layers", "llama": "Llama, 4 layers"}
WAYS = {"to": "`tensor.to`", "mapped": "mapped file, pinned buffers", "read": "`pread` into pinned buffers"}


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return the tables of the kernel, the estimator and the ways from a file to the GPU."""
    steps = report["steps"]
    return [_kernel(steps), _estimator(steps["estimator"]["report"]), _feed(steps["feed"]["report"]["measured"])]


def made_by(report: Mapping[str, Any]) -> str:
    """Return command and machine as text."""
    machine = report["machine"]
    names = ("python", "torch", "triton", "transformers", "mergekit")
    versions = ", ".join(f"{name} {machine[name]}" for name in names if machine.get(name))
    return (
        f"<sub>`./scripts/check_gpu` on one {machine['card']}, driver {machine.get('driver', 'unknown')}, "
        f"{machine['cores']} cores; "
        f"{versions}; raw results in scripts/experiments/results/check_gpu.json</sub>"
    )


def _kernel(steps: Mapping[str, Any]) -> Table:
    measured = steps["kernel"]["report"]["measured"]
    counts = sorted({one["count"] for one in measured})
    rows = []
    for method in dict.fromkeys(one["method"] for one in measured):
        by_count = {one["count"]: one for one in measured if one["method"] == method}
        rows.append((f"`{method}`", [f"{by_count[count]['ratio']['call']:.2f}" for count in counts]))
    first = [steps[f"first call {method}"]["seconds_of_first_call"] for method in ("squisher", "ubgm prior")]
    calls = [seconds for found in first for seconds in found.values()]
    beyond = max(one["memory_beyond"] for one in measured)
    note = (
        f"Memory beyond inputs and result: at most {beyond:.1%}. A first call, in a new process or for a new number of "
        f"models, takes {min(calls):.1f} to {max(calls):.1f} s. A prior reads the Fishers twice: its floor is 1.6."
    )
    title = "**Merge of one tensor.** 4096 x 14336, weights in bf16, Fishers in float32: time relative to a device copy"
    return Table(title, [f"{count} models" for count in counts], rows, [note])


def _estimator(found: Mapping[str, Any]) -> Table:
    columns = ["true labels", "sampled", "checked batch", "first batch"]
    rows = []
    for dtype, figures in found["large"].items():
        true, sampled = figures["true"], figures["sampled"]
        checked = max(true["checked_ratio"], sampled["checked_ratio"])
        first = max(true["first_ratio"], sampled["first_ratio"])
        cells = [true["ratio"], sampled["ratio"], checked, first]
        rows.append((f"Llama, 1.1 B weights, 8 x 512 tokens, {dtype}", _numbers(cells)))
    for name, title in SMALL.items():
        for kind, label in (("eager", "no graph"), ("graph", "CUDA graph")):
            figures = found["small"][f"{name} float32"][kind]
            cells = [figures["ratio"], None, figures["checked_ratio"], figures["first_ratio"]]
            rows.append((f"{title}, float32, {label}", _numbers(cells)))
    note = (
        "Checked are the second batch, the fourth, the eighth and so on; the first batch is compared with a loop over "
        "single examples and compiles the kernels. The plain pass is launched kernel by kernel."
    )
    title = "**Time of a Fisher on a GPU.** Relative to a plain forward and backward pass"
    return Table(title, columns, rows, [note])


def checked(found: Mapping[str, Any]) -> Table:
    """Return the table of checked batches from a report of ``scripts.benchmarks.fisher_gpu``."""
    large, rows = found["large"]["bfloat16"], []
    for kind, label in (("true", "true labels"), ("sampled", "sampled")):
        rows.append((f"Llama, 1.1 B weights, bfloat16, {label}", large[kind], large["plain"]["ms"]))
    for name, title in SMALL.items():
        figures = found["small"][f"{name} float32"]
        rows.append((f"{title}, float32", figures["graph"], figures["plain_ms"]))
    cells = [
        (title, _numbers([figures["all_ms"][number] / plain for number in CHECKED])) for title, figures, plain in rows
    ]
    note = (
        "The check of a batch that a CUDA graph adds, from the fourth batch on, runs on a second stream beside the "
        "graph."
    )
    title = "**Checked batches, with a second stream.** Relative to a plain forward and backward pass"
    return Table(title, ["second batch", "fourth", "eighth"], cells, [note])


def checked_by(found: Mapping[str, Any]) -> str:
    """Return command and machine of the table of checked batches as text."""
    machine = found["environment"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "triton", "transformers"))
    return (
        f"<sub>`python -m scripts.benchmarks.fisher_gpu --device cuda` on one {machine['card']}, driver "
        f"{machine['driver']}; {versions}; raw results in scripts/experiments/results/fisher_gpu.json</sub>"
    )


def _numbers(values: list[float | None]) -> list[str]:
    """Return ratios as text."""
    return ["" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in values]


def _feed(measured: list[Mapping[str, Any]]) -> Table:
    threads = sorted({one["threads"] for one in measured})
    rows = []
    for way, title in WAYS.items():
        by_threads = {one["threads"]: one for one in measured if one["way"] == way}
        cells = [f"{by_threads[count]['gb_per_s']:.1f}" if count in by_threads else "" for count in threads]
        rows.append((title, cells))
    note = "A merge takes the mapped file and four threads, for tensors of 32 MB and more."
    title = "**From a file in the page cache to the GPU.** GB/s, by threads"
    return Table(title, [str(count) for count in threads], rows, [note])
