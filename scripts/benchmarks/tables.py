"""The README's tables of the benchmarks, from the JSON files that they write with ``--json``.

Times are CPU seconds of a machine that may have other work to do: ratios within one run mean something, seconds little.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from scripts.experiments.tables import Table

Measured = Sequence[Mapping[str, Any]]

# ---- bench_fisher

# As bench_fisher_models makes them.
MODELS = {
    "mlp": "MLP, 10 classes",
    "cnn": "CNN, 10 classes",
    "bert": "BERT, 3 classes, 64 tokens",
    "llama": "Llama, 64 tokens",
    "llama-large": "Llama, 64 tokens",
}
KINDS = {"empirical": "true labels", "sampled": "sampled", "exact": "exact"}
OURS = "ours"


def fisher_time(measured: Measured) -> list[Table]:
    """Return CPU time as a multiple of a plain pass: our kinds of Fisher, and other ways to that of the true labels."""
    columns = [
        f"{MODELS[one['model']]}, {one['parameters'] / 1e6:.2g} M weights, {one['examples']} examples"
        for one in measured
    ]
    by_method = [_by_method(one["rows"]) for one in measured]
    rows = [(title, [_time_cell(found.get(key)) for found in by_method]) for key, title in _titles(by_method)]
    title = "**What a Fisher costs.** CPU time on one thread, as a multiple of a plain forward and backward pass"
    return [Table(title, columns, rows, [_reading(measured), _others(measured), _checks(measured)])]


def _by_method(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return (kind, method without its chunk) -> its row; of several chunks that which needs least memory."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in rows:
        key = row["kind"], row["method"].partition(", chunks")[0]
        if key not in found or row.get("bytes", 0) < found[key].get("bytes", 0):
            found[key] = row
    return found


def _titles(by_method: Iterable[Mapping[tuple[str, str], Any]]) -> Iterable[tuple[tuple[str, str], str]]:
    """Return the rows of a table: ours of each kind, then others, of the true labels alone."""
    keys = list(dict.fromkeys(key for found in by_method for key in found))
    yield from (((kind, OURS), f"**ours, {title}**") for kind, title in KINDS.items())
    yield from ((key, f"`{key[1]}`" if "(" in key[1] else key[1]) for key in keys if _is_other(*key))


def _is_other(kind: str, method: str) -> bool:
    return kind == "empirical" and method != OURS


def _time_cell(row: Mapping[str, Any] | None) -> str:
    if row is None or row["problem"]:
        return _problem(row)
    ratio = row["ratio"]
    return ", ".join([f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}", *_flaws(row)])


def _flaws(row: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with what a method found, and what it lacks."""
    flaws = re.findall(r"(wrong|missing):? (\d+) of (\d+)", row["found"])
    return [f"{count} of {tensors} tensors {flaw}" for flaw, count, tensors in flaws]


def _problem(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return "not installed" if "not installed" in row["problem"] else "refuses"


def _reading(measured: Measured) -> str:
    rounds = sorted({one["rounds"] for one in measured})
    ours = [row for one in measured for row in one["rows"] if row["method"] == OURS]
    return (
        f"Medians of {_span(rounds, 0)} rounds in turns (of 3 where a method costs over 5 passes); of methods that "
        "take chunks of the batch, the fastest chunk. A tensor is wrong if it is off by more than 1e-4 of its largest "
        f"entry, beside single examples in float64; ours are off by at most {max(row['error'] for row in ours):.1e}."
    )


def _others(measured: Measured) -> str:
    found = []
    for one in measured:
        ratios = {
            method: row["ratio"]
            for (kind, method), row in _by_method(one["rows"]).items()
            if kind == "empirical" and not row["problem"] and not _flaws(row)
        }
        ours = ratios.pop(OURS)
        if ratios:
            method = min(ratios, key=ratios.__getitem__)
            found.append(f"{ratios[method] / ours:.1f} times ours ({MODELS[one['model']].partition(',')[0]}: {method})")
    return f"The cheapest other way that has all tensors right, of true labels: {', '.join(found)}."


def _checks(measured: Measured) -> str:
    true = [row for one in measured for row in one["rows"] if (row["kind"], row["method"]) == ("empirical", OURS)]
    first, second = ([row["checking"][number] for row in true] for number in (0, 1))
    return (
        f"The checks are not in these: with true labels the first batch takes {_span(first)} plain passes, the second, "
        f"fourth, eighth and so on {_span(second)}. So a handful of batches costs more than the table says; "
        "`verify=False` leaves the checks out."
    )


def _span(values: Sequence[float], digits: int = 1) -> str:
    """Return the least and the most, or one value if they read alike.

    Example:
        >>> _span([3.2, 4.94]), _span([7, 7], 0)
        ('3.2 to 4.9', '7')
    """
    least, most = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return least if least == most else f"{least} to {most}"


def fisher_memory(measured: Measured) -> list[Table]:
    """Return what each way to a Fisher adds to the peak of memory."""
    columns = [f"{MODELS[one['model']]}, {one['copy'] / 4e6:.0f} M weights" for one in measured]
    by_method = [_by_method(one["rows"]) for one in measured]
    rows = [("plain pass", [_memory_cell(found[("", "plain")]) for found in by_method])]
    rows += [
        (title, [_memory_cell(found.get(key)) for found in by_method])
        for key, title in _titles(by_method)
        if key != ("", "plain")
    ]
    copies = " and ".join(f"{one['copy'] / 1e6:.0f}" for one in measured)
    note = (
        f"Beside model and batch, each method in a process of its own; one copy of the weights takes {copies} MB. Of "
        "methods that take chunks of the batch, the chunk that needs least. What others get wrong or lack is said "
        "above."
    )
    return [Table("**What a Fisher takes of memory.** MB that the peak grows by", columns, rows, [note])]


def _memory_cell(row: Mapping[str, Any] | None) -> str:
    return _problem(row) if row is None or "problem" in row else f"{row['bytes'] / 1e6:.0f}"


# ---- bench_applications

COMMANDS = {
    "prune": "`prune --sparsity 0.75`",
    "prune, all tensors": "`prune --sparsity 0.75 --no-default-ignore`",
    "prune 2:4": "`prune --pattern 2:4`",
    "mask select": "`mask select --keep 0.005`",
    "mask select, reset": "`mask select --keep 0.005 --score reset`",
    "mask reset": "`mask reset --keep 0.005`",
    "mask reset, a half": "`mask reset --keep 0.5`",
    "mask apply": "`mask apply`, difference of 0.005",
    "mask apply, a half": "`mask apply`, difference of 0.5",
    "mask remove": "`mask remove`, difference of 0.005",
    "task2vec embed": "`task2vec embed`",
    "task2vec distance": "`task2vec distance`, of two",
}
# What is written beside a model (which is in shards).
FILES = {"mask.safetensors": "mask", "difference.safetensors": "difference", "model.safetensors": "embedding"}


def applications(measured: Measured) -> list[Table]:
    """Return CPU time, memory and the size of what is written, by command."""
    (report,) = measured
    whole = report["weights_bytes"]
    rows = [
        (
            COMMANDS[name],
            [f"{one['cpu_s']:.1f}", f"{one['anonymous_gb']:.2f}", _written(one["files"], whole)],
        )
        for name, one in report["cases"].items()
    ]
    most, bound = max(one["anonymous_gb"] for one in report["cases"].values()), report["limit_gb"]
    verdict = "all keep it" if most <= bound else "**not all keep it**"
    note = (
        f"A random Llama, {report['parameters'] / 1e6:.0f} million weights in {report['dtype']} "
        f"({whole / 1e6:.0f} MB), and a Fisher in float32. Seconds are those of the whole command, start included. "
        "Anonymous memory is what a process needs beyond mapped files, which the system can drop at any time; the "
        f"bound is that of `extract`, 0.7 GB and the largest tensor in float32, here {bound:.2f} GB: at most "
        f"{most:.2f} GB, {verdict}."
    )
    title = "**Commands that work on a model's files.** CPU time, memory, and what is written beside a model"
    return [Table(title, ["CPU s", "anonymous GB", "written"], rows, [note])]


def _written(files: Mapping[str, int], whole: int) -> str:
    """Return the files beside those of a model, with their bytes and the share of the weights' that these are."""
    return ", ".join(
        f"{FILES[name]} {_bytes(size)} ({100 * size / whole:.1f} % of the weights)"
        for name, size in files.items()
        if name in FILES
    )


def _bytes(size: int) -> str:
    """Return a size with its unit.

    Example:
        >>> _bytes(33_400), _bytes(12_000_000)
        ('33 kB', '12.0 MB')
    """
    return f"{size / 1e3:.0f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"


# ---- bench_merge


def merges(measured: Measured) -> list[Table]:
    """Return CPU time and memory of whole merges."""
    (report,) = measured
    low = {
        name: {key: min(run[key] for run in runs) for key in ("cpu_s", "anonymous_gb")}
        for name, runs in report["samples"].items()
    }
    titles = {"read+write": "reading and writing the same bytes, no more"} | {
        f"{name} trim": f"`{name}`, density {report['density']:g}" for name in ("squisher", "ties")
    }
    linear = low["linear"]
    rows = [
        (
            titles.get(name, f"`{name}`"),
            [f"{one['cpu_s']:.1f}", f"{one['cpu_s'] / linear['cpu_s']:.2f}", f"{one['anonymous_gb']:.2f}"],
        )
        for name, one in low.items()
    ]
    rounds = len(report["samples"]["linear"])
    note = (
        f"Two random Llamas of {report['parameters'] / 1e6:.0f} million weights in {report['recipe']['dtype']}, "
        f"Fishers in {report['recipe']['fisher_dtype']}; the least of {rounds} rounds in turns. `ubgm_squisher` takes "
        "one of the two as its base, a density below 1 a third model."
    )
    return [
        Table(
            "**Merging.** Whole commands of `mergekit-yaml`", ["CPU s", "times `linear`", "anonymous GB"], rows, [note]
        )
    ]


# ---- bench_average


def averages(measured: Measured) -> list[Table]:
    """Return what an average of Fishers adds to a run."""
    shares = list(measured[0]["added"])
    rows = [
        (
            f"{one['steps']} steps",
            [f"{one['plain_s']:.1f}", *(f"{100 * one['added'][share]:.1f} %" for share in shares)],
        )
        for one in measured
    ]
    columns = ["CPU s without", *(f"added by `FisherAverage(share={share})`" for share in shares)]
    note = (
        "A small BERT on batches of 16 times 64 tokens; the least of "
        f"{_span([one['rounds'] for one in measured], 0)} rounds. The check of the first batch is in it."
    )
    return [
        Table("**`FisherAverage` while training.** CPU time of the same run with and without it", columns, rows, [note])
    ]


TABLES: Mapping[str, Callable[[Measured], list[Table]]] = {
    "bench_fisher": fisher_time,
    "bench_fisher_memory": fisher_memory,
    "bench_applications": applications,
    "bench_merge": merges,
    "bench_average": averages,
}


def made_by(report: Mapping[str, Any]) -> str:
    """Return by which command a report was made, and on what machine."""
    return (
        f"`{report['command']}`: {report['cpu_seconds'] / 60:.0f} CPU-minutes on a machine with "
        f"{report['cores']} cores, at a load average of {report['load_average']}"
    )
