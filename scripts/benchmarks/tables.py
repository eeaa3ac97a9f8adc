"""Tables of the benchmarks for scripts/README.md, from their JSON files.

Times are CPU seconds of a machine that may have other work to do: compare ratios within a run, not seconds.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from scripts.benchmarks import votes
from scripts.benchmarks.process import minima
from scripts.experiments.tables import Table

Measured = Sequence[Mapping[str, Any]]

# ---- bench_fisher

# Labels of the models in fisher_models.
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
    """Return CPU time relative to a plain pass: each kind of ours, and other methods for true labels."""
    columns = [
        f"{MODELS[one['model']]}, {one['parameters'] / 1e6:.2g} M weights, {one['examples']} examples"
        for one in measured
    ]
    by_method = [_by_method(one["rows"]) for one in measured]
    rows = [(title, [_time_cell(found.get(key)) for found in by_method]) for key, title in _titles(by_method)]
    title = "**Time of a Fisher.** CPU time on one thread, relative to a plain forward and backward pass"
    return [Table(title, columns, rows, [_reading(measured), _others(measured), _checks(measured)])]


def _by_method(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return a mapping from (kind, method) to a row; of several chunks, the row with the least memory."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in rows:
        key = row["kind"], row["method"].partition(", chunks")[0]
        if key not in found or row.get("bytes", 0) < found[key].get("bytes", 0):
            found[key] = row
    return found


def _titles(by_method: Iterable[Mapping[tuple[str, str], Any]]) -> Iterable[tuple[tuple[str, str], str]]:
    """Yield the keys and labels of the rows: each kind of ours, then other methods for true labels."""
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
    """Return the counts of wrong and missing tensors as text."""
    flaws = re.findall(r"(wrong|missing):? (\d+) of (\d+)", row["found"])
    return [f"{count} of {tensors} tensors {flaw}" for flaw, count, tensors in flaws]


def _problem(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return "not installed" if "not installed" in row["problem"] else "refuses"


def _reading(measured: Measured) -> str:
    rounds = sorted({one["rounds"] for one in measured})
    error = max(row["error"] for one in measured for row in one["rows"] if row["method"] == OURS)
    return (
        f"Medians of {_span(rounds, 0)} rounds in turns (of 3 where a method costs over 5 passes). If a method takes "
        "chunks of the batch, the table has the fastest chunk. A tensor is wrong if it differs from single examples "
        f"in float64 by more than 1e-4 of its largest entry; ours differ by at most {error:.1e}."
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
    return f"The cheapest other method with all tensors right, for true labels: {', '.join(found)}."


def _checks(measured: Measured) -> str:
    true = [row for one in measured for row in one["rows"] if (row["kind"], row["method"]) == ("empirical", OURS)]
    first, second = ([row["checking"][number] for row in true] for number in (0, 1))
    return (
        f"The table does not include the checks: with true labels the first batch takes {_span(first)} plain passes, "
        f"the second, fourth, eighth and so on {_span(second)}. So a handful of batches costs more than in the table; "
        "`verify=False` skips the checks."
    )


def _span(values: Sequence[float], digits: int = 1) -> str:
    """Return the minimum and the maximum, or one value if both have the same text.

    Example:
        >>> _span([3.2, 4.94]), _span([7, 7], 0)
        ('3.2 to 4.9', '7')
    """
    least, most = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return least if least == most else f"{least} to {most}"


def fisher_memory(measured: Measured) -> list[Table]:
    """Return the growth of the memory peak for each method."""
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
        f"Without model and batch, each method in its own process; one copy of the weights takes {copies} MB. If a "
        "method takes chunks of the batch, the table has the chunk with the least memory. The table of times says "
        "which tensors are wrong or missing."
    )
    return [Table("**Memory of a Fisher.** Growth of the peak in MB", columns, rows, [note])]


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
# Files that a command writes in addition to a model (which is in shards).
FILES = {"mask.safetensors": "mask", "difference.safetensors": "difference", "model.safetensors": "embedding"}


def applications(measured: Measured) -> list[Table]:
    """Return CPU time, memory and output size of each command."""
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
    verdict = "all commands stay below it" if most <= bound else "**not all commands stay below it**"
    note = (
        f"A random Llama, {report['parameters'] / 1e6:.0f} million weights in {report['dtype']} "
        f"({whole / 1e6:.0f} MB), and a Fisher in float32. Seconds are those of the whole command, start included. "
        "Anonymous memory excludes mapped files, which the system can drop at any time. The bound is that of "
        f"`extract`, 0.7 GB plus the largest tensor in float32, here {bound:.2f} GB; the highest peak is "
        f"{most:.2f} GB: {verdict}."
    )
    title = "**Commands that work on a model's files.** CPU time, memory, and files in addition to a model"
    return [Table(title, ["CPU s", "anonymous GB", "written"], rows, [note])]


def _written(files: Mapping[str, int], whole: int) -> str:
    """Return the files in addition to a model, with their bytes, absolute and relative to the weights."""
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
    low = minima(report["samples"])
    titles = {"read+write": "only reading and writing the same bytes"}
    if report["density"] is not None:
        titles |= {f"{name} trim": f"`{name}`, density {report['density']:g}" for name in ("squisher", "ties")}
    linear = low["linear"]
    rows = [
        (
            titles.get(name, f"`{name}`"),
            [
                f"{one['wall_s']:.1f}",
                f"{one['cpu_s']:.1f}",
                f"{one['cpu_s'] / linear['cpu_s']:.2f}",
                f"{one['anonymous_gb']:.2f}",
            ],
        )
        for name, one in low.items()
    ]
    rounds = len(report["samples"]["linear"])
    note = (
        f"Two random Llamas of {report['parameters'] / 1e6:.0f} million weights in {report['recipe']['dtype']}, "
        f"Fishers in {report['recipe']['fisher_dtype']}; "
        f"{f'the minimum of {rounds} rounds in turns' if rounds > 1 else 'one round'}."
    )
    if "ubgm_squisher" in low:
        note += " `ubgm_squisher` takes one of the two as its base, a density below 1 a third model."
    columns = ["wall s", "CPU s", "CPU, times `linear`", "anonymous GB"]
    return [Table("**Merging.** Whole commands of `mergekit-yaml`", columns, rows, [note])]


# ---- bench_structure

PROGRAMS = {"": "`mergekit-yaml`", ", report": "`squisher merge`, with the report"}


def structures(measured: Measured) -> list[Table]:
    """Return CPU time and memory of merges with a structure, and the computed costs of larger models."""
    (report,) = measured
    low = minima(report["samples"])
    rows = []
    for name, one in low.items():
        kind, comma, _ = name.partition(",")
        label = f"`{kind}`, {PROGRAMS[name.removeprefix(kind)]}" if kind in report["rates"] else f"`{kind}`"
        times = one["cpu_s"] / low["squisher"]["cpu_s"]
        known = kind in report["matrices"] and not comma
        beyond = f"{max(report['matrices'][kind], 0):.1f}" if known else ""
        rows.append((label, [f"{one['cpu_s']:.1f}", f"{times:.2f}", f"{one['anonymous_gb']:.2f}", beyond]))
    rounds, (tall, wide) = min(map(len, report["samples"].values())), report["largest"]
    note = (
        f"Two random Llamas of {report['parameters'] / 1e6:.0f} million weights in {report['recipe']['dtype']} and a "
        f"base, Fishers in {report['recipe']['fisher_dtype']}, blocks of {report['block']}, {report['steps']} steps, "
        f"one thread; the minimum of {rounds} round{'s' if rounds > 1 else ''} in turns, with `squisher` before each "
        "structure. The last column is the peak "
        f"of anonymous memory beyond `squisher` when the largest weight, {tall} x {wide}, is merged alone, in copies "
        "of it in float32."
    )
    columns = ["CPU s", "times `squisher`", "anonymous GB", "largest weights"]
    first = Table("**Merging with a structure.** Whole commands", columns, rows, [note])
    return [first, _large_structures(report)]


def _large_structures(report: Mapping[str, Any]) -> Table:
    rows = [
        (
            f"{model}, `{kind}`",
            [f"{one['flop']:.1e}", _duration(one["two_cores_s"]), _duration(one["h100_s"])],
        )
        for model, kinds in report["large"].items()
        for kind, one in kinds.items()
    ]
    rates = ", ".join(f"{rate / 1e9:.0f} (`{kind}`)" for kind, rate in report["rates"].items())
    note = (
        f"Computed from the shapes, for {report['large_models']} models and blocks of {report['block']}: matrix "
        "products, systems and eigendecompositions beyond a plain merge, without reading and writing. The rate of a "
        f"core is that of the run above, element-wise operations included: {rates} GFLOP/s. The rate of an H100 is "
        f"assumed: {report['h100'] / 1e12:.0f} TFLOP/s, about half of its peak in float32 without tensor cores."
    )
    columns = ["FLOP", "two of these cores", "an H100"]
    return Table("**Larger models.** Cost of a structure, on paper", columns, rows, [note])


def _duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours.

    Example:
        >>> _duration(3.21), _duration(300), _duration(9000)
        ('3.2 s', '5 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# ---- bench_average


def averages(measured: Measured) -> list[Table]:
    """Return the CPU time that an average of Fishers adds to a run."""
    shares = list(measured[0]["added"])
    rows = [
        (
            f"{one['steps']} steps",
            [f"{one['plain_s']:.1f}", *(f"{100 * one['added'][share]:.1f} %" for share in shares)],
        )
        for one in measured
    ]
    columns = ["CPU s without", *(f"added by `FisherAverageCallback(share={share})`" for share in shares)]
    note = (
        "A small BERT on batches of 16 x 64 tokens; the minimum of "
        f"{_span([one['rounds'] for one in measured], 0)} rounds. The check of the first batch is included."
    )
    return [
        Table(
            "**`FisherAverageCallback` while training.** CPU time of the same run with and without it",
            columns,
            rows,
            [note],
        )
    ]


# ---- bench_setup

SETUP = {"check": "fast half of the tests, lint and types", "demo": "four fine-tunings, three merges and their scores"}


def setup(measured: Measured) -> list[Table]:
    """Return CPU time and disk of both set-up commands."""
    rows = [
        (
            f"`./scripts/{one['command']}`",
            [SETUP[one["command"]], f"{one['cpu_s'] / 60:.0f}", f"{one['bytes'] / 1e9:.1f}"],
        )
        for one in measured
    ]
    note = (
        "CPU time of all processes; two idle cores take about half of it. The disk is that of the CPU build of torch, "
        "in `.venv` and `.demo`. The first run downloads all packages as well."
    )
    return [Table("", ["runs", "CPU-minutes", "GB on disk"], rows, [note])]


TABLES: Mapping[str, Callable[[Measured], list[Table]]] = {
    "bench_fisher": fisher_time,
    "bench_fisher_memory": fisher_memory,
    "bench_applications": applications,
    "bench_merge": merges,
    "bench_merge_7b": merges,
    "bench_votes": votes.tables,
    "bench_structure": structures,
    "bench_average": averages,
    "bench_setup": setup,
}


def made_by(report: Mapping[str, Any]) -> str:
    """Return the command and the machine of a report as text."""
    return (
        f"`{report['command']}`: {report['cpu_seconds'] / 60:.0f} CPU-minutes on a machine with "
        f"{report['cores']} cores, at a load average of {report['load_average']}"
    )
