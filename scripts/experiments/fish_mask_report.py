"""Tables and picture of ``fish_mask``, from its report only."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from scripts.experiments import drawing
from scripts.experiments.tables import Table, mean_sd

# Row -> Fisher and score.
ROWS = {
    "squisher": ("squisher", "fisher"),
    "fisher": ("fisher", "fisher"),
    "squisher, reset loss": ("squisher", "reset"),
    "fisher, reset loss": ("fisher", "reset"),
    "movement": (None, "movement"),
    "random": (None, "random"),
}
TRAINED = ("squisher", "random")
LABELS = {
    "squisher": "Squisher",
    "fisher": "Fisher",
    "squisher, reset loss": "Squisher x squared change",
    "fisher, reset loss": "Fisher x squared change",
    "movement": "change alone",
    "random": "random",
}
KINDS: dict[str, Sequence[str]] = {"reset": tuple(ROWS), "trained": TRAINED}
_TITLES = {
    "reset": "**After a reset**: the fine-tuned model, of which all but a share went back to pre-trained values",
    "trained": "**Trained inside the mask**: the pre-trained model, of which only a share was trained",
}
Cells = Sequence[Mapping[str, Any]]


def shares_of(report: Mapping[str, Any]) -> list[str]:
    """Return the shares of the report."""
    return list(report["cells"][0]["result"]["reset"]["random"])


def tasks_of(report: Mapping[str, Any]) -> dict[str, Cells]:
    """Return a mapping from tasks to cells, one for each seed."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for cell in report["cells"]:
        found.setdefault(cell["settings"]["task"], []).append(cell)
    return dict(found)


def accuracies(cells: Cells, kind: str, row: str, share: str) -> list[float]:
    """Return the accuracy of a row for each seed."""
    return [cell["result"][kind][row][share] for cell in cells]


def means(report: Mapping[str, Any], kind: str, row: str, share: str) -> list[float]:
    """Return the mean accuracy over the tasks for each seed."""
    by_task = [accuracies(cells, kind, row, share) for cells in tasks_of(report).values()]
    return [mean(one) for one in zip(*by_task, strict=True)]


def dense_of(report: Mapping[str, Any]) -> list[float]:
    """Return the mean accuracy of the dense models over the tasks for each seed."""
    by_task = [[cell["result"]["dense"] for cell in cells] for cells in tasks_of(report).values()]
    return [mean(one) for one in zip(*by_task, strict=True)]


def chance_of(report: Mapping[str, Any]) -> float:
    """Return the mean accuracy of a random guess over the tasks."""
    return mean(100 / cells[0]["result"]["classes"] for cells in tasks_of(report).values())


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return tables of means over the tasks, after a reset and after training inside the mask, and one by task."""
    shares, tasks = shares_of(report), tasks_of(report)
    made = []
    for kind, rows in KINDS.items():
        about = (
            f"mean accuracy (%) over {len(tasks)} tasks, mean ± standard deviation over "
            f"{len(next(iter(tasks.values())))} seeds; all of it fine-tuned: {mean_sd(dense_of(report))}; a guess: "
            f"{chance_of(report):.1f}"
        )
        listed = [(LABELS[row], [mean_sd(means(report, kind, row, share)) for share in shares]) for row in rows]
        note = _note(report) if kind == "reset" else _trained_note(report)
        made.append(Table(f"{_TITLES[kind]}: {about}", [f"{float(share):.1%}" for share in shares], listed, [note]))
    return [*made, _by_task(report)]


def _by_task(report: Mapping[str, Any]) -> Table:
    tasks = tasks_of(report)
    rows = [("all of it fine-tuned", [mean_sd([c["result"]["dense"] for c in cells]) for cells in tasks.values()])]
    for kind, names in KINDS.items():
        for share in shares_of(report):
            for name in names:
                label = f"{float(share):.1%} {'reset' if kind == 'reset' else 'trained inside'}, {LABELS[name]}"
                rows.append((label, [mean_sd(accuracies(cells, kind, name, share)) for cells in tasks.values()]))
    columns = [f"{task} ({cells[0]['result']['classes']})" for task, cells in tasks.items()]
    return Table("**By task** (and its number of classes): accuracy in %", columns, rows)


def wins(report: Mapping[str, Any], kind: str, row: str, share: str) -> tuple[int, int]:
    """Return the number of pairs (task, seed) in which a row is above the random mask, and the number of pairs."""
    pairs = [
        one > two
        for cells in tasks_of(report).values()
        for one, two in zip(accuracies(cells, kind, row, share), accuracies(cells, kind, "random", share), strict=True)
    ]
    return sum(pairs), len(pairs)


def gains(report: Mapping[str, Any], kind: str, row: str, share: str) -> list[float]:
    """Return the points of a row above the random mask, mean over the tasks, for each seed."""
    both = zip(means(report, kind, row, share), means(report, kind, "random", share), strict=True)
    return [one - other for one, other in both]


def _above(report: Mapping[str, Any], kind: str, row: str) -> str:
    """Return a note with the points of a row above the random mask at each share."""
    said = []
    for share in shares_of(report):
        won, of = wins(report, kind, row, share)
        said.append(f"{mean_sd(gains(report, kind, row, share))} at {float(share):.1%} (on {won} of {of})")
    return f"{LABELS[row]} {', '.join(said)}"


def _note(report: Mapping[str, Any]) -> str:
    """Return a note on the paper's order: Fisher and Squisher above a random mask, and near each other."""
    rows = "; ".join(_above(report, "reset", row) for row in ("squisher", "fisher", "squisher, reset loss"))
    verdicts = " ".join(_verdict(report, share) for share in shares_of(report))
    return f"Points above the random mask (and on how many tasks and seeds): {rows}. {verdicts}"


def _verdict(report: Mapping[str, Any], share: str) -> str:
    squisher, fisher, random = (mean(means(report, "reset", row, share)) for row in ("squisher", "fisher", "random"))
    label, apart, least = f"{float(share):.1%}", abs(squisher - fisher), min(squisher, fisher) - random
    if any(2 * won <= of for won, of in (wins(report, "reset", row, share) for row in ("squisher", "fisher"))):
        return (
            f"At {label} the paper's order is **not there** on most tasks and seeds: so few weights of so small a "
            f"model, whichever they are, leave next to nothing of a task ({squisher:.1f} %; a guess: "
            f"{chance_of(report):.1f} %)."
        )
    near = "nearer to each other than to it" if apart < least else "**but not near each other**"
    return f"At {label} it is: both are above it, {near} ({apart:.1f} points apart)."


def _trained_note(report: Mapping[str, Any]) -> str:
    """Return a note that compares training inside the Squisher's mask and inside a random mask."""
    shares, dense = shares_of(report), mean(dense_of(report))
    below = {share: mean(means(report, "trained", "squisher", share)) - dense for share in shares}
    differences = ", ".join(f"{value:+.1f} at {float(share):.1%}" for share, value in below.items())
    worse = [f"{float(share):.1%}" for share in shares if mean(gains(report, "trained", "squisher", share)) <= 0]
    note = (
        f"Points above the random mask (and on how many tasks and seeds): {_above(report, 'trained', 'squisher')}. "
        f"Points above the fully fine-tuned model: {differences}."
    )
    if worse:
        note += (
            f" At {', '.join(worse)} a random mask is **as good or better**: which weights a finished model cannot do "
            "without does not tell which to train, likely since F is large in few tensors, and weights from everywhere "
            "learn better. Tried: rates up and down for either mask; each has its best one of another seed (see below)."
        )
    return note


_STYLES = {
    "squisher": ("o", "-", "black"),
    "fisher": ("s", "-", "white"),
    "squisher, reset loss": ("^", "--", "black"),
    "fisher, reset loss": ("v", "--", "white"),
    "movement": ("D", ":", "0.6"),
    "random": ("x", "-.", "black"),
}


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the picture of mean accuracy by share, after a reset and after training inside the mask."""
    figure = drawing.new(9, 3.8)
    panels = figure.subplots(1, 2, sharey=True)
    shares = shares_of(report)
    percent = [100 * float(share) for share in shares]
    for axes, (kind, rows), title in zip(panels, KINDS.items(), ("reset", "trained inside the mask"), strict=True):
        for row in rows:
            values = [means(report, kind, row, share) for share in shares]
            drawing.curve(axes, percent, values, _STYLES[row], LABELS[row])
        axes.axhline(mean(dense_of(report)), color="0.5", linewidth=1, label="all weights fine-tuned")
        axes.axhline(chance_of(report), color="0.8", linewidth=1, label="a guess")
        axes.set_xscale("log")
        axes.set_xticks(percent, [f"{tick:g}" for tick in percent])
        axes.minorticks_off()
        axes.set_xlabel("share of the weights kept (%)")
        axes.set_title(title, fontsize=10)
        axes.grid(axis="y", color="0.93")
    panels[0].set_ylabel(f"accuracy, mean over {len(tasks_of(report))} tasks (%)")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return {"fish_mask.png": drawing.png(figure)}
