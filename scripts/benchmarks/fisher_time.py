"""CPU time and error of each method for a Fisher: the benchmark ``fisher`` without ``--memory``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from scripts.benchmarks.fisher_methods import METHODS, OURS, Kind, Method, Run, compare, kinds_of, offered, plain, truth
from scripts.benchmarks.fisher_models import Batch, build, labels_of
from scripts.benchmarks.fisher_others import OTHERS, require
from scripts.benchmarks.process import verdict

BERT_GOALS = {"empirical": 1.25, "sampled": 1.35, "exact": 1 + 0.75 * (3 - 1)}
GOALS: dict[str, dict[str, float]] = {  # kind -> highest ratio to the plain pass that meets the goal
    "mlp": {"empirical": 1.2, "sampled": 1.3, "exact": 3.2},
    "cnn": {"empirical": 1.4, "sampled": 1.5},
    "bert": BERT_GOALS,
    "bert-small-vocab": BERT_GOALS,
}
SLOW = 5  # plain passes
SLOW_ROUNDS = 3


@dataclass
class Row:
    """Row of the table.

    Attributes:
        kind: kind of Fisher.
        method: label of the method.
        ratio: CPU time relative to the plain pass, or None.
        error: largest error, or None.
        found: text of the comparison with the reference.
        problem: reason for a method that failed, or an empty string.
        checking: ratios of our first two calls, which compare examples with autograd.
    """

    kind: Kind
    method: str
    ratio: float | None = None
    error: float | None = None
    found: str = ""
    problem: str = ""
    checking: tuple[float, ...] = ()


@dataclass
class Entry:
    """Method that is timed, with the seconds of its calls."""

    method: Method
    row: Row
    run: Run
    seconds: list[float]


def time_report(name: str, repeat: int, device: str) -> dict[str, Any]:
    """Measure all methods on one model."""
    model, batch = build(name, device)
    plain_seconds = [seconds(lambda: plain(model, batch), device, warm=True) for _ in range(2)][1:]
    entries, rows = enter(model, batch)
    for number in range(repeat):
        plain_seconds.append(seconds(lambda: plain(model, batch), device, warm=True))
        for entry in entries:
            slow = bool(entry.seconds) and entry.seconds[0] > SLOW * plain_seconds[0]
            if not slow or number < SLOW_ROUNDS:
                entry.seconds.append(seconds(entry.run, device, warm=not slow))
        if number == 0:
            dropped = {id(entry.row) for entry in slower_chunks(entries)}
            entries = [entry for entry in entries if id(entry.row) not in dropped]
            rows = [row for row in rows if id(row) not in dropped]
    basis = statistics.median(plain_seconds)
    for entry in entries:
        entry.row.ratio = statistics.median(entry.seconds) / basis
        if entry.method == OURS:
            fresh = OURS.prepare(model, batch, entry.row.kind, 0)
            entry.row.checking = tuple(seconds(fresh, device, warm=False) / basis for _ in range(2))
    return {
        "model": name,
        "device": device,
        "parameters": sum(p.numel() for p in model.parameters()),
        "examples": len(labels_of(batch)),
        "plain_ms": basis * 1e3,
        "rounds": repeat,
        "rows": [asdict(row) for row in rows],
    }


def enter(model: nn.Module, batch: Batch) -> tuple[list[Entry], list[Row]]:
    """Call each method once and compare it with the reference; return entries to time, and the rows of all methods."""
    entries, rows = [], []
    size = len(labels_of(batch))
    for kind in kinds_of(batch):
        expected = truth(model, batch, kind)
        failed = set()  # methods that need no second attempt with other chunks
        for method in offered([*METHODS, *OTHERS], kind, size):
            if method.name in failed:
                continue
            row = Row(kind, method.title(size))
            rows.append(row)
            try:
                require(method)
                run = method.prepare(model, batch, kind, method.chunk)
                found = run()
            except Exception as problem:  # a failure of another package is a result
                row.method, row.problem = method.name, one_line(problem)
                failed.add(method.name)
                continue
            if kind == "sampled" and method.package:
                row.found = "not compared"
            else:
                comparison = compare(found, expected)
                row.error, row.found = comparison.error, str(comparison)
            entries.append(Entry(method, row, run, []))
    return entries, rows


def slower_chunks(entries: list[Entry]) -> list[Entry]:
    """Return the entries whose method was faster with another chunk in the last round."""
    best: dict[tuple[str, str], Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry.seconds[-1]):
        best.setdefault((entry.row.kind, entry.method.name), entry)
    kept = {id(entry) for entry in best.values()}
    return [entry for entry in entries if id(entry) not in kept]


def seconds(run: Callable[[], Any], device: str, warm: bool) -> float:
    """Return the CPU seconds of a call, or those between CUDA events; if ``warm``, of the second of two calls."""
    if warm:
        run()
    if device == "cpu":
        began = time.process_time()
        run()
        return time.process_time() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


# ---- the report


def one_line(problem: Exception) -> str:
    """Return an exception as one short line."""
    text = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def table(report: dict[str, Any]) -> list[str]:
    """Return the table of one model, with a verdict on each goal."""
    goals = GOALS.get(report["model"], {})
    lines = [
        f"{report['model']}: {report['parameters'] / 1e6:.2f}M parameters, {report['examples']} examples, "
        f"plain forward and backward {report['plain_ms']:.1f} ms ({report['device']}), {report['rounds']} rounds",
        f"  {'':<40}{'x plain':>8}",
    ]
    for row in report["rows"]:
        title = f"  {row['kind']:<11}{row['method']:<29}"
        if row["problem"]:
            lines.append(f"{title}{'-':>8}  {row['problem']}")
            continue
        line = f"{title}{row['ratio']:>8.2f}  {row['found']}"
        goal = goals.get(row["kind"]) if row["method"] == "ours" else None
        line += "" if goal is None else f"; goal {goal:g}: {verdict(row['ratio'] <= goal)}"
        if row["checking"]:
            line += "; first calls " + ", ".join(f"{ratio:.2f}" for ratio in row["checking"])
        lines.append(line)
    return lines
