"""Tables, primary comparison and pictures of ``merge_methods`` and ``merge_methods_language``."""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.experiments import structure_report
from scripts.experiments.merging import HEADS
from scripts.experiments.method_rows import MERGEKIT, OTA, ROWS, STRUCTURE, Method, methods
from scripts.experiments.runner import Experiment
from scripts.experiments.structure_merges import mean, shown
from scripts.experiments.structure_report import Cell, cells_of, cost, less, means, number, rest, timed, training
from scripts.experiments.tables import Table, difference, half_width, mean_sd, spread

PRIMARY, DOMAINS, LANGUAGE = "kron", "domains", "general"
TITLES = {
    **HEADS,
    DOMAINS: "four sentiment domains, one shared head",
    LANGUAGE: "four tasks as prompts of a generative model",
}
COLUMNS = ("mean", "worst task", "largest loss", "less the field", "less `ties`", "less `squisher`", "CPU-s of a merge")


def groups(report: Mapping[str, Any]) -> dict[str, list[Cell]]:
    """Return the cells of each start of the heads, domains and generative model, without those that have none."""
    found: dict[str, list[Cell]] = {heads: cells_of(report, heads=heads) for heads in HEADS}
    found |= {name: [one for one in report["cells"] if name in one["settings"]] for name in (DOMAINS, LANGUAGE)}
    return {name: cells for name, cells in found.items() if cells}


def field(cell: Cell) -> str:
    """Return the method of mergekit, or OTA-merge, whose chosen setting is best on the validation texts."""
    table = methods(len(cell["result"]["test"]["single"]), cell["settings"]["seed"])
    rivals = [row for row, method in table.items() if method.family in (MERGEKIT, OTA)]
    return max(rivals, key=cell["result"]["validation"].__getitem__)


def less_field(cells: Sequence[Cell], row: str) -> list[float]:
    """Return the points of a row above the field, for each cell."""
    return [a - mean(one["result"]["test"][field(one)]) for a, one in zip(means(cells, row), cells, strict=True)]


def holds(report: Mapping[str, Any], planned: int) -> bool:
    """Return True if the primary comparison allows a recommendation.

    Args:
        report: Report of the experiment.
        planned: Number of seeds.
    """
    found = groups(report)
    if any(len(found.get(heads, ())) < planned for heads in HEADS):
        return False
    gaps = [less_field(found[heads], PRIMARY) for heads in HEADS]
    return all(spread(values)[0] > half_width(values) for values in gaps)


def tables(report: Mapping[str, Any], experiment: Experiment) -> list[Table]:
    """Return a table for each group; the primary comparison stands below the first of ``merge_methods``."""
    found = groups(report)
    planned = {
        name: len(cells) for name, cells in groups({"cells": [{"settings": s} for s in experiment.full]}).items()
    }
    made = []
    for name, cells in found.items():
        first = [] if made or name == LANGUAGE else [_primary(report, planned)]
        notes = [*first, _field_text(cells), _chosen(cells), _edges(cells), training(cells)]
        made.append(_table(name, cells, planned[name], [note for note in notes if note]))
    last = made[-1]
    made[-1] = Table(last.title, last.columns, last.rows, [*last.notes, *rest(report, experiment.name)])
    return made


def _table(name: str, cells: Sequence[Cell], planned: int, notes: Sequence[str]) -> Table:
    of = "" if len(cells) == planned else f" of {planned} planned"
    title = (
        f"**Every merge method, {TITLES[name]}.** Accuracy in %, mean ± standard deviation over {number(cells)}{of}, "
        f"{_texts(cells[0])}"
    )
    columns = COLUMNS if timed(cells) else COLUMNS[:-1]
    rows = [(label, _row(cells, row)[: len(columns)]) for row, label in ROWS.items()]
    return Table(title, columns, rows, notes)


def _row(cells: Sequence[Cell], row: str) -> list[str]:
    """Return the cells of a row: means, worst task, largest loss of a task, paired differences, cost."""
    tests = [one["result"]["test"] for one in cells]
    worst = [min(test[row].values()) for test in tests]
    lost = [max(test["single"][task] - value for task, value in test[row].items()) for test in tests]
    if row == "single":
        return [mean_sd(means(cells, row)), mean_sd(worst), "", difference(less_field(cells, row)), "", "", ""]
    pairs = ["" if row == other else difference(less(cells, row, other)) for other in ("ties", "squisher")]
    gap = difference(less_field(cells, row))
    return [mean_sd(means(cells, row)), mean_sd(worst), mean_sd(lost), gap, *pairs, cost(cells, row)]


def _texts(cell: Cell) -> str:
    """Return the number of held-out texts as text."""
    settings = cell["settings"]
    if DOMAINS not in settings:
        return f"{settings['test']} held-out texts a task"
    counts = ", ".join(f"{count} {name}" for name, (_, count) in settings[DOMAINS].items())
    return f"held-out texts: {counts}"


def _primary(report: Mapping[str, Any], planned: Mapping[str, int]) -> str:
    """Return the primary comparison with its verdict."""
    parts = []
    for heads in HEADS:
        cells = groups(report).get(heads, [])
        if cells:
            gaps = less_field(cells, PRIMARY)
            above = sum(gap > 0 for gap in gaps)
            parts.append(f"{HEADS[heads]}: {difference(gaps)} points, above 0 in {above} of {len(gaps)}")
    if any(len(groups(report).get(heads, [])) < planned[heads] for heads in HEADS):
        verdict = "Seeds are missing, so no recommendation follows yet."
    elif holds(report, planned[next(iter(HEADS))]):
        verdict = "Both intervals are above 0: `structure: kron` with a base is recommended for different tasks."
    else:
        verdict = "Not both intervals are above 0: no recipe is recommended."
    return f"Primary comparison, {ROWS[PRIMARY]} less the field; {'; '.join(parts)}. {verdict}"


def _field_text(cells: Sequence[Cell]) -> str:
    names = "; ".join(ROWS[field(one)] for one in cells)
    return (
        f"The field is the best method of mergekit, or OTA-merge, on the validation texts, seed by seed: {names}. "
        "Largest loss: of a task, to its single model. Differences: 95 % t intervals over seeds."
    )


def _chosen(cells: Sequence[Cell]) -> str:
    """Return the choices of each method, seed by seed."""
    lines = []
    for row, choice in cells[0]["result"]["chosen"].items():
        if choice:
            lines.append(f"{ROWS[row]} {'; '.join(shown(one['result']['chosen'][row]) for one in cells)}")
    return f"Chosen on the validation texts, seed by seed: {' | '.join(lines)}."


def _edges(cells: Sequence[Cell]) -> str:
    """Return a note on choices at an end of their lists, except a block as large as the matrix."""
    found = []
    for row, method in methods(len(cells[0]["result"]["test"]["single"]), 0).items():
        for option in _numbers(method):
            values = {setting[option] for setting in method.settings if option in setting}
            ends = {min(values), max(values)} - ({max(values)} if option == "block" else set())
            count = sum(one["result"]["chosen"][row].get(option) in ends for one in cells)
            found += [f"{ROWS[row]} {option} {count} of {len(cells)}"] if count else []
    return f"At an end of the list, so that a better value may be outside: {'; '.join(found)}." if found else ""


def _numbers(method: Method) -> list[str]:
    """Return the options of a method that are numbers."""
    last = method.settings[-1]
    return [option for option, value in last.items() if not isinstance(value, (str, bool))]


def picture(report: Mapping[str, Any]) -> bytes:
    """Return the picture of mean accuracies, one panel for each group; structures have filled points."""
    panels = {TITLES[name]: cells for name, cells in groups(report).items()}
    filled = [row for row, method in methods(2, 0).items() if method.family == STRUCTURE]
    return structure_report.picture(panels, list(ROWS), ROWS, width=12, filled=filled)
