"""Tables, findings and pictures of the experiments on structures."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.experiments import drawing, structure_merges
from scripts.experiments.merging import HEADS
from scripts.experiments.runner import RESULTS, TIMINGS
from scripts.experiments.structure_merges import ROWS, STRUCTURES, mean, shown
from scripts.experiments.tables import Table, difference, mean_sd, spread

Cell = Mapping[str, Any]
RIVALS = ("ties", "task_arithmetic", "ota", "masked", "diagonal")
FEW = 3  # with fewer seeds, a finding is a first one
NAMES = {
    "ties": "tuned `ties`",
    "task_arithmetic": "tuned `task_arithmetic`",
    "ota": "OTA-merge",
    "masked": "the masked diagonal",
    "diagonal": "the diagonal",
    "linear": "the plain average",
}


def cells_of(report: Mapping[str, Any], **settings: Any) -> list[Cell]:
    """Return the cells with some settings."""
    return [one for one in report["cells"] if all(one["settings"].get(key) == value for key, value in settings.items())]


def by_start(report: Mapping[str, Any]) -> dict[str, list[Cell]]:
    """Return the cells of each start of the heads that has any, by its title."""
    found = {title: cells_of(report, heads=heads) for heads, title in HEADS.items()}
    return {title: cells for title, cells in found.items() if cells}


def means(cells: Sequence[Cell], row: str) -> list[float]:
    """Return the mean of a row over the tasks, for each cell."""
    return [mean(one["result"]["test"][row]) for one in cells]


def less(cells: Sequence[Cell], row: str, other: str) -> list[float]:
    """Return the points of a row above another, for each cell."""
    return [a - b for a, b in zip(means(cells, row), means(cells, other), strict=True)]


def seeds(cells: Sequence[Cell], report: Mapping[str, Any], groups: int) -> str:
    """Return the number of seeds as text, with the number planned while some are missing."""
    planned = report.get("planned", len(report["cells"])) // groups
    return number(cells) + ("" if len(cells) == planned else f" of {planned} planned")


def rest(report: Mapping[str, Any], name: str) -> list[str]:
    """Return a note with the command that runs the missing cells, if there are any."""
    missing = report.get("planned", len(report["cells"])) - len(report["cells"])
    command = f"python -m scripts.experiments.{name} --full"
    are = "cell is" if missing == 1 else "cells are"
    return [f"Unfinished: {missing} {are} missing, which `{command}` runs."] if missing else []


def number(cells: Sequence[Cell]) -> str:
    """Return the number of seeds as text."""
    return f"{len(cells)} seed{'s' if len(cells) != 1 else ''}"


def results(name: str) -> Any:
    """Return the report of another experiment, or None if it has not been run."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def compared(cells: Sequence[Cell], title: str, labels: Mapping[str, str] = ROWS, notes: Sequence[str] = ()) -> Table:
    """Return the table of means, worst tasks, paired differences and cost of each row, with the findings below."""
    rows = []
    for row, label in labels.items():
        if row not in cells[0]["result"]["test"]:
            continue
        worst = [min(one["result"]["test"][row].values()) for one in cells]
        gaps = [
            "" if row in ("single", other) else difference(less(cells, row, other)) for other in ("ties", "diagonal")
        ]
        rows.append((label, [mean_sd(means(cells, row)), mean_sd(worst), *gaps, cost(cells, row)]))
    columns = ["mean", "worst task", "less tuned `ties`", "less the diagonal", "CPU-s of a merge"]
    rivals = [rival for rival in RIVALS if rival in cells[0]["result"]["test"]]
    found = " ".join(findings(cells, rivals))
    made = [found, chosen(cells), *on_edge(cells), training(cells), *notes]
    return Table(title, columns, rows, [note for note in made if note])


def grouped(
    report: Mapping[str, Any],
    name: str,
    title: str,
    groups: Mapping[str, Sequence[Cell]],
    planned: int,
    labels: Mapping[str, str] = ROWS,
    without: tuple[str, str] | None = None,
) -> list[Table]:
    """Return the table of :func:`compared` for each group of cells.

    Args:
        report: Report of the experiment.
        name: Name of the experiment.
        title: Title of a table, with ``{}`` for the title of its group.
        groups: Title of a group -> its cells.
        planned: Number of groups that are planned.
        labels: Rows.
        without: Suffix and description of the rows that :func:`added` compares; None for none.
    """
    found = []
    for group, cells in groups.items():
        count = seeds(cells, report, planned)
        head = (
            f"**{title.format(group)}.** Accuracy in %, mean ± standard deviation over {count}, "
            f"{cells[0]['settings']['test']} held-out texts a task"
        )
        gained = [] if without is None else [added(cells, *without)]
        found.append(compared(cells, head, labels, [*gained, *rest(report, name)]))
    return found


def cost(cells: Sequence[Cell], row: str) -> str:
    """Return the CPU seconds of one merge, mean over the cells that have them."""
    found = [one["timings"]["merge"][row] for one in timed(cells) if row in one["timings"]["merge"]]
    return f"{spread(found)[0]:.1f}" if found else ""


def findings(cells: Sequence[Cell], rivals: Sequence[str] = RIVALS) -> list[str]:
    """Return one sentence for each structure with its defaults: against the best of the rivals, and its gap."""
    best = max(rivals, key=lambda rival: spread(means(cells, rival))[0])
    lines = []
    for kind in STRUCTURES:
        gaps = less(cells, kind, best)
        verdict = _verdict(gaps)
        single = difference(less(cells, kind, "single"))
        tuned = f"{kind}-tuned"
        by_tuning = (
            f"; tuning adds {difference(less(cells, tuned, kind))}" if tuned in cells[0]["result"]["test"] else ""
        )
        lines.append(
            f"`{kind}` with its defaults {verdict} {NAMES[best]}, the best without a structure: {difference(gaps)} "
            f"points, above 0 in {sum(gap > 0 for gap in gaps)} of {len(gaps)}, and {single} to the single models"
            f"{by_tuning}."
        )
    return lines


def _verdict(gaps: Sequence[float]) -> str:
    """Return the verb that the differences allow: above or below on every seed, or neither."""
    verb = "is" if len(gaps) >= FEW else "is so far"
    if all(gap > 0 for gap in gaps):
        return f"{verb} above"
    return f"{verb} below" if all(gap < 0 for gap in gaps) else "is on some seeds above, on some not above,"


def chosen(cells: Sequence[Cell], labels: Mapping[str, str] = ROWS) -> str:
    """Return the choices of each tuned row, seed by seed, with the labels of rows."""
    lines = [
        f"{labels[row].removesuffix(', tuned')} {'; '.join(shown(one['result']['chosen'][row]) for one in cells)}"
        for row in cells[0]["result"]["chosen"]
    ]
    return (
        f"Chosen on the validation texts, seed by seed: {' | '.join(lines)}. Differences: 95 % t intervals over seeds."
    )


def on_edge(cells: Sequence[Cell]) -> list[str]:
    """Return a note on the choices at an end of their lists, except a block as large as the matrix."""
    models = len(cells[0]["result"]["test"]["single"])
    lists = {name: row.lists for name, row in structure_merges.rows(models).items()}
    found = []
    for row, choice in cells[0]["result"]["chosen"].items():
        for option in choice:
            values = [value for value in lists[row][option] if not isinstance(value, str)]
            ends = {min(values), max(values)} - ({max(values)} if option == "block" else set()) if values else set()
            count = sum(one["result"]["chosen"][row][option] in ends for one in cells)
            found += [f"{ROWS[row].removesuffix(', tuned')} {option} {count} of {len(cells)}"] if count else []
    return [f"At an end of the list, so that a better value may be outside: {'; '.join(found)}."] if found else []


def added(cells: Sequence[Cell], suffix: str, other: str) -> str:
    """Return one sentence with the points of each structure above its row with a suffix, seed by seed.

    Args:
        cells: Cells with both rows of each structure.
        suffix: End of the keys of the other rows, after ``rows-``, ``columns-`` and ``kron-``.
        other: Description of the other rows.
    """
    gaps = ", ".join(f"`{kind}` {difference(less(cells, kind, f'{kind}-{suffix}'))}" for kind in STRUCTURES)
    return f"Points of a structure above the same {other}: {gaps}."


def timed(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells with CPU times, which those from a GPU lack."""
    return [one for one in cells if TIMINGS in one]


def training(cells: Sequence[Cell]) -> str:
    """Return the CPU time of fine-tuning, which experiments share, or nothing for cells from a GPU."""
    if not timed(cells):
        return ""
    found = spread([one["timings"]["training"] for one in timed(cells)])[0]
    return f"Fine-tuning the models of a seed takes {found:.0f} CPU-s, once for all experiments that use them."


def picture(
    groups: Mapping[str, Sequence[Cell]],
    rows: Sequence[str],
    labels: Mapping[str, str] = ROWS,
    *,
    width: float = 9,
    filled: Sequence[str] = STRUCTURES,
) -> bytes:
    """Return the picture of mean accuracies, one panel for each group, with the values of the seeds as points.

    Args:
        groups: Title of a panel -> its cells.
        rows: Keys of the rows, from the top.
        labels: Key of a row -> its label.
        width: Width in inches.
        filled: Keys of the rows with filled points.
    """
    figure = drawing.new(width, 0.6 + 0.24 * len(rows))
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (title, cells) in zip(panels, groups.items(), strict=True):
        for place, row in enumerate(rows):
            values = means(cells, row)
            average, deviation = spread(values)
            axes.plot(values, [place] * len(values), "|", color="0.6", markersize=7)
            face = "0.2" if row in filled else "white"
            axes.errorbar(average, place, xerr=deviation, fmt="o", color="0.2", markerfacecolor=face, markersize=5)
        axes.set_title(title, fontsize=9)
        axes.set_yticks(range(len(rows)), [labels[row].replace("`", "") for row in rows], fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    panels[0].invert_yaxis()
    figure.supxlabel("mean accuracy on held-out texts (%)", fontsize=8)
    return drawing.png(figure)
