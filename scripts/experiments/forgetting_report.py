"""Methods of the experiment with EWC, and its tables and picture."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

from scripts.experiments import drawing
from scripts.experiments.courses import COLUMNS
from scripts.experiments.runner import Result
from scripts.experiments.tables import Table, mean_sd, spread
from squisher_mergekit.applications.ewc.runaway import RUNAWAY

BATCH, RATE = 64, 1e-3
HELD_BACK = 5  # points lost on a new task from which a lambda counts as too large


@dataclass(frozen=True)
class Method:
    """Importance of the parameters in the penalty.

    Attributes:
        title: label of the row.
        source: none, identity, exact, joint, average (of the task's squared gradient), or optimizer (its state).
        reset: True if each task has a new optimizer.
    """

    label: str
    source: str
    scale: Any = "batch"
    beta: float = 0.999
    reset: bool = False


METHODS = {
    "none": Method("no penalty", "none"),
    "l2": Method("L2 (identity)", "identity"),
    "fisher": Method("exact Fisher", "exact"),
    "squisher": Method("Squisher", "average"),
    "dataset": Method("Squisher times N of a task", "average", scale="dataset"),
    "unscaled": Method("Squisher without a factor", "average", scale=1.0),
    "short": Method("Squisher with beta 0.95", "average", beta=0.95),
    "joint": Method("joint Fisher", "joint"),
    "reset": Method("Squisher with a new Adam for each task", "average", reset=True),
    "own": Method("Adam's own second moment", "optimizer"),
}
MAIN = ("none", "l2", "fisher", "squisher")
ABLATED = ("task", "permuted", "colour task")


def results(report: Mapping[str, Any]) -> dict[str, dict[str, Result]]:
    """Return a mapping from columns and methods to results."""
    found: dict[str, dict[str, Result]] = {}
    for one in report["cells"]:
        found.setdefault(one["settings"]["column"], {})[one["settings"]["method"]] = one["result"]
    return found


def ends(result: Result) -> list[float]:
    """Return the mean accuracy over all tasks at the end, for each seed."""
    return [curve[-1] for curve in result["so_far"]]


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return the tables of digits and emoji by scenario and method, and of the ablation."""
    found, seeds = results(report), len(report["cells"][0]["settings"]["seeds"])
    title = f"Accuracy (%) over all tasks at the end, mean ± standard deviation over {seeds} seeds"
    ablation = Table(
        f"**EWC, what the penalty is made of.** {title}, and the lambda chosen",
        [text for column in ABLATED for text in (COLUMNS[column].label, "lambda")],
        [
            (METHODS[name].label, [text for column in ABLATED for text in _with_lambda(found[column][name])])
            for name in METHODS
            if name not in ("none", "l2")
        ],
        [_spread(found), _factors(found), _ratios(found)],
    )
    return [_scenarios(report, set_, f"**EWC, {set_}.** {title}") for set_ in ("digits", "emoji")] + [ablation]


def _scenarios(report: Mapping[str, Any], set_: str, title: str) -> Table:
    every = results(report)
    found = {column: every[column] for column, what in COLUMNS.items() if what.set == set_}
    return Table(
        title,
        [COLUMNS[column].label for column in found],
        [(METHODS[name].label, [mean_sd(ends(found[column][name])) for column in found]) for name in MAIN],
        [_learnt(found), _order(found), *_no_success(found), _chosen(report, found)],
    )


def _with_lambda(result: Result) -> tuple[str, str]:
    return mean_sd(ends(result)), f"{result['lambda']:.0e}"


def gains(found: Mapping[str, Result], method: str, over: str = "none") -> list[float]:
    """Return the points of a method above another one, for each seed."""
    return [one - other for one, other in zip(ends(found[method]), ends(found[over]), strict=True)]


def in_order(found: Mapping[str, Result]) -> bool:
    """Return True if the means of a column have the paper's order.

    Fisher and Squisher are both above no penalty, and nearer to each other than the lower one is to no penalty.
    """
    fisher, squisher = mean(gains(found, "fisher")), mean(gains(found, "squisher"))
    return min(fisher, squisher) > abs(fisher - squisher)


def on_every_seed(found: Mapping[str, Result]) -> bool:
    """Return True if Fisher and Squisher are above no penalty on every seed of a column."""
    return min(gains(found, "fisher") + gains(found, "squisher")) > 0


def _order(found: Mapping[str, Mapping[str, Result]]) -> str:
    said = []
    for column, one in found.items():
        parts = [f"{METHODS[name].label} {mean_sd(gains(one, name))}" for name in ("fisher", "squisher", "l2")]
        said.append(f"{COLUMNS[column].label}: {', '.join(parts)}; {_verdict(one)}.")
    return (
        f"Points above no penalty. {' '.join(said)} (The paper's order: Fisher and Squisher above no penalty, and "
        "nearer to each other than to it.)"
    )


def _verdict(found: Mapping[str, Result]) -> str:
    """Return a note on the paper's order, with the likely cause where it fails."""
    if in_order(found) and on_every_seed(found):
        return "the paper's order, on every seed"
    verdict = "**not the paper's order**"
    if in_order(found):
        verdict = "the paper's order by the means, **not on every seed**"
    alone, gain = spread(ends(found["none"]))[1], mean(gains(found, "squisher"))
    if alone > gain > 1:
        verdict += f" (likely because each seed draws other tasks: without a penalty, seeds differ by ± {alone:.1f})"
    less, more = sorted(("fisher", "squisher"), key=lambda name: mean(found[name]["learnt"]))
    held, free = (mean(found[name]["learnt"]) for name in (less, more))
    if free - held > HELD_BACK:
        best = sorted(found[less]["swept"].values())
        verdict += (
            f" (likely by the choice of lambda: the {METHODS[less].label}'s holds new tasks back, which are learnt to "
            f"{held:.1f} %, with the {METHODS[more].label}'s to {free:.1f} %; on the seeds that it was chosen on, its "
            f"best three are within {best[-1] - best[-3]:.1f} points)"
        )
    return verdict


def _learnt(found: Mapping[str, Mapping[str, Result]]) -> str:
    """Return a note on the accuracy of a task after it was learnt, and the loss by the end, without a penalty."""
    parts = [
        f"{COLUMNS[column].label} {mean_sd(one['none']['learnt'])} and {mean_sd(one['none']['forgetting'])}"
        for column, one in found.items()
    ]
    return (
        "Without a penalty, the accuracy (%) on a task just after it was learnt, and the points lost by the end of the "
        f"best that it had, means over tasks: {'; '.join(parts)}."
    )


def _no_success(found: Mapping[str, Mapping[str, Result]]) -> list[str]:
    """Return a note on class-incremental learning if it reaches little more than the last task."""
    said = []
    for column, one in found.items():
        best, last = max(mean(ends(one[name])) for name in MAIN), 100 / len(one["none"]["so_far"][0])
        if COLUMNS[column].scenario == "class" and best <= 1.5 * last:
            said.append(
                f"Class-incremental, EWC is no success, as in the paper: {best:.1f} % at best, where knowing the last "
                f"task alone gives up to {last:.1f} %. A penalty on weights does not teach which of two tasks an image "
                "is of."
            )
    return said


def edges(report: Mapping[str, Any], columns: Iterable[str]) -> list[str]:
    """Return the columns and methods whose lambda is at an end of its grid."""
    said = []
    for one in report["cells"]:
        settings, best = one["settings"], one["result"]["lambda"]
        grid = settings["lambdas"]
        if settings["column"] in columns and len(grid) > 1 and best in (grid[0], grid[-1]):
            end = "smallest" if best == grid[0] else "largest"
            label = COLUMNS[settings["column"]].label
            said.append(f"{METHODS[settings['method']].label}, {label} ({end} of {len(grid)})")
    return said


def _chosen(report: Mapping[str, Any], found: Mapping[str, Mapping[str, Result]]) -> str:
    settings = next(one["settings"] for one in report["cells"] if one["settings"]["column"] in found)
    parts = [
        METHODS[name].label + " " + " / ".join(f"{one[name]['lambda']:.0e}" for one in found.values())
        for name in MAIN
        if name != "none"
    ]
    at = edges(report, found)
    ending = f" At the end of its grid, so that a better value may be outside: {'; '.join(at)}." if at else ""
    return (
        f"Lambda, chosen by the mean over seeds {' and '.join(map(str, settings['validation']))}, by column: "
        f"{'; '.join(parts)}. {settings['steps']} steps a task.{ending}"
    )


def _spread(found: Mapping[str, Mapping[str, Result]]) -> str:
    said = []
    for column in ABLATED:
        others = {
            name: gains(found[column], name, "squisher") for name in METHODS if name not in ("none", "l2", "squisher")
        }
        parts = [f"{METHODS[name].label} {mean_sd(values)}" for name, values in others.items()]
        most = max(abs(mean(values)) for values in others.values())
        least = min(mean(gains(found[column], name)) for name in METHODS if name not in ("none", "l2"))
        said.append(
            f"{COLUMNS[column].label}: {', '.join(parts)}; the furthest is {most:.1f} points away, the lowest of all "
            f"{abs(least):.1f} points {'above' if least > 0 else 'below'} no penalty."
        )
    return f"Points above the Squisher. {' '.join(said)}"


def _factors(found: Mapping[str, Mapping[str, Result]]) -> str:
    said = []
    for column in ABLATED:
        factors = {"squisher": BATCH, "dataset": found[column]["dataset"]["images"], "unscaled": 1}
        strengths = {name: found[column][name]["lambda"] * factor for name, factor in factors.items()}
        parts = ", ".join(f"{METHODS[name].label} {strength:.1e}" for name, strength in strengths.items())
        apart = max(strengths.values()) / min(strengths.values())
        said.append(f"{COLUMNS[column].label}: {parts} (at most {apart:.1f} times apart, of grids ten times apart)")
    return f"Lambda times the factor, which together are all that the penalty sees, came to: {'; '.join(said)}."


def _ratios(found: Mapping[str, Mapping[str, Result]]) -> str:
    said, beyond = [], []
    for column in ABLATED:
        own, separate = (max(found[column][name]["ratio"]) for name in ("own", "squisher"))
        said.append(f"{COLUMNS[column].label}: {own:.0e} and {separate:.0e}")
        for name in METHODS:
            if over := found[column][name]["overflowed"]:
                beyond.append(f"{METHODS[name].label}, {COLUMNS[column].label}, from lambda {min(over):.0e}")
    most = max(max(found[column][name]["ratio"]) for column in ABLATED for name in ("own", "squisher"))
    ending = " At these lambdas neither runs away." if most < RUNAWAY else ""
    if beyond:
        ending += f" In the search for lambda the importance overflowed of: {'; '.join(beyond)}."
    return (
        "The penalty's squared gradient by the task's, the largest of any task and seed, with Adam's own second "
        f"moment, which the penalty feeds, and with the average of the task's gradient alone: "
        f"{'; '.join(said)}.{ending}"
    )


_STYLES = {
    "none": ("x", ":", "black"),
    "l2": ("^", "-.", "0.6"),
    "fisher": ("s", "--", "white"),
    "squisher": ("o", "-", "black"),
}


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the picture of the accuracy on all tasks so far, by their number."""
    found = results(report)
    figure = drawing.new(12, 6)
    panels = figure.subplots(2, 4).flat
    for (column, what), axes in zip(COLUMNS.items(), panels, strict=False):
        for shift, (name, style) in enumerate(_STYLES.items()):
            steps = [list(values) for values in zip(*found[column][name]["so_far"], strict=True)]
            places = [number + 1 + 0.05 * (shift - 1.5) for number in range(len(steps))]
            drawing.curve(axes, places, steps, style, METHODS[name].label)
        axes.set_title(what.label, fontsize=10)
        axes.set_xticks(range(1, len(steps) + 1))
        axes.grid(axis="y", color="0.93")
    figure.supxlabel("tasks learnt", fontsize=10)
    figure.supylabel("accuracy, mean over the tasks learnt (%)", fontsize=10)
    handles = figure.axes[0].get_legend_handles_labels()
    for axes in panels:
        axes.axis("off")
        axes.legend(*handles, loc="center", fontsize=10, frameon=False)
    return {"forgetting.png": drawing.png(figure, dpi=80)}
