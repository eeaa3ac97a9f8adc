"""Tables, primary comparison and pictures of ``merge_methods`` and ``merge_methods_language``."""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.experiments import structure_report
from scripts.experiments.merging import HEADS
from scripts.experiments.method_rows import MERGEKIT, OTA, ROWS, STRUCTURE, Method, methods
from scripts.experiments.runner import Experiment
from scripts.experiments.structure_merges import mean
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
    table = _searched(cell)
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
    """Return two tables for each group: results, and the chosen settings to open.

    The primary comparison stands below the first of ``merge_methods``, and missing cells below the last results.
    """
    found = groups(report)
    planned = {
        name: len(cells) for name, cells in groups({"cells": [{"settings": s} for s in experiment.full]}).items()
    }
    made = []
    for name, cells in found.items():
        first = [] if made or name == LANGUAGE else [_primary(report, planned)]
        missing = rest(report, experiment.name) if name == list(found)[-1] else []
        notes = [*first, _field_text(cells), training(cells), *missing]
        made += [
            _table(name, cells, planned[name], [note for note in notes if note]),
            choices(_searched(cells[0]), cells, TITLES[name]),
        ]
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


def _searched(cell: Cell) -> dict[str, Method]:
    """Return the methods with the settings that a cell tried."""
    return methods(len(cell["result"]["test"]["single"]), cell["settings"]["seed"], most=cell["settings"]["budget"])


def choices(table: Mapping[str, Method], cells: Sequence[Cell], title: str) -> Table:
    """Return the settings that the validation texts chose, to open; a row for each method with a choice.

    Args:
        table: The methods that were searched.
        cells: The cells, in the order of the seeds.
        title: Title of the group of cells.
    """
    rows = []
    for row, method in table.items():
        found = [one["result"]["chosen"][row] for one in cells]
        if any(found):
            options = dict.fromkeys(option for choice in found for option in choice)
            listed = (f"{option} {', '.join(_value(choice.get(option)) for choice in found)}" for option in options)
            rows.append((ROWS[row], ["; ".join(listed), "; ".join(_edges(method, found))]))
    return Table(
        "",
        ("chosen, seed by seed", "at an end of its list"),
        rows,
        ["A better value may be outside of a list that was chosen at its end."],
        summary=f"Settings that the validation texts chose: {title}",
    )


def _value(value: object) -> str:
    """Return a chosen value as text, a dash if the setting has no such option."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _edges(method: Method, choices: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return how often each number is at an end of its list; a block as large as the matrix is no end."""
    found = []
    for option in _numbers(method):
        values = {setting[option] for setting in method.settings if option in setting}
        ends = {min(values)} if option == "block" else {min(values), max(values)}
        count = sum(choice.get(option) in ends for choice in choices) if len(values) > 1 else 0
        found += [f"{option} {count} of {len(choices)}"] if count else []
    return found


def _numbers(method: Method) -> list[str]:
    """Return the options of a method that are numbers."""
    last = method.settings[-1]
    return [option for option, value in last.items() if not isinstance(value, (str, bool))]


def picture(report: Mapping[str, Any]) -> bytes:
    """Return the picture of mean accuracies, one panel for each group; structures have filled points."""
    panels = {TITLES[name]: cells for name, cells in groups(report).items()}
    filled = [row for row, method in methods(2, 0).items() if method.family == STRUCTURE]
    return structure_report.picture(panels, list(ROWS), ROWS, width=12, filled=filled)
