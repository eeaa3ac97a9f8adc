"""What the experiment with EWC compares, and the tables and the picture of what it found."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

from experiments import drawing
from experiments.report import Table, mean_sd, spread
from experiments.runner import Result
from squisher_mergekit.applications.ewc.runaway import RUNAWAY

TASKS, BATCH, STEPS, RATE = 5, 64, 60, 1e-3
EACH, HELD = 800, 200  # digits of a task, to learn from and to test on


@dataclass(frozen=True)
class Method:
    """What the penalty is made of.

    ``source``: none, identity, exact, joint, average (of the task's squared gradient) or optimizer (its own).
    ``shift``: powers of ten from the exact Fisher's grid of lambda to this method's. ``reset``: the optimizer begins
    anew with each task.
    """

    label: str
    source: str
    shift: int = 0
    scale: Any = "batch"
    beta: float = 0.999
    reset: bool = False


METHODS = {
    "none": Method("no penalty", "none"),
    "l2": Method("L2 (identity)", "identity", -7),
    "fisher": Method("exact Fisher", "exact"),
    "squisher": Method("Squisher", "average"),
    "dataset": Method("Squisher times N of a task", "average", -1, scale="dataset"),
    "unscaled": Method("Squisher without a factor", "average", 2, scale=1.0),
    "short": Method("Squisher with beta 0.95", "average", 1, beta=0.95),
    "joint": Method("joint Fisher", "joint", 2),
    "reset": Method("Squisher with Adam begun anew", "average", reset=True),
    "own": Method("Adam's own second moment", "optimizer"),
}
MAIN = ("none", "l2", "fisher", "squisher")
COLUMNS = {
    "task": "split (task-incremental)",
    "domain": "split (domain-incremental)",
    "class": "split (class-incremental)",
    "permuted": "permuted",
}
ABLATED = ("task", "permuted")
START = {"task": 2, "domain": 3, "class": 2, "permuted": 1}  # power of ten of the exact Fisher's smallest lambda
# By what power of ten a grid was moved, whose best lambda was its first or last on the validation seed.
MOVED = {
    ("domain", "l2"): 1,
    ("domain", "squisher"): 1,
    ("class", "l2"): -1,
    ("class", "squisher"): -1,
    ("task", "short"): -1,
    ("permuted", "short"): -1,
    ("permuted", "joint"): -1,
}


def results(report: Mapping[str, Any]) -> dict[str, dict[str, Result]]:
    """Return column -> method -> what was found."""
    found: dict[str, dict[str, Result]] = {}
    for one in report["cells"]:
        found.setdefault(one["settings"]["column"], {})[one["settings"]["method"]] = one["result"]
    return found


def ends(result: Result) -> list[float]:
    """Return the mean accuracy over all tasks at the end, by seed."""
    return [curve[-1] for curve in result["so_far"]]


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return the scenarios by method, and the ablation."""
    found, seeds = results(report), len(report["cells"][0]["settings"]["seeds"])
    columns = [column for column in COLUMNS if column in found]
    ablated = [column for column in ABLATED if column in found]
    title = f"Accuracy (%) over five tasks at the end, mean ± standard deviation over {seeds} seeds"
    return [
        Table(
            f"**EWC.** {title}",
            [COLUMNS[column] for column in columns],
            [(METHODS[name].label, [mean_sd(ends(found[column][name])) for column in columns]) for name in MAIN],
            [_order(found), *_no_success(found), _chosen(report)],
        ),
        Table(
            f"**EWC, what the penalty is made of.** {title}, and the lambda chosen",
            [text for column in ablated for text in (COLUMNS[column], "lambda")],
            [
                (METHODS[name].label, [text for column in ablated for text in _with_lambda(found[column][name])])
                for name in METHODS
                if name not in ("none", "l2")
            ],
            [_spread(found), _factors(found), _ratios(found)],
        ),
    ]


def _with_lambda(result: Result) -> tuple[str, str]:
    return mean_sd(ends(result)), f"{result['lambda']:.0e}"


def gains(found: Mapping[str, Result], method: str, over: str = "none") -> list[float]:
    """Return the points of a method above another one, by seed."""
    return [one - other for one, other in zip(ends(found[method]), ends(found[over]), strict=True)]


def in_order(found: Mapping[str, Result]) -> bool:
    """Return whether the paper's order came out in a column, by the means.

    Fisher and Squisher are both above no penalty, and nearer to each other than the lower one is to it.
    """
    fisher, squisher = mean(gains(found, "fisher")), mean(gains(found, "squisher"))
    return min(fisher, squisher) > abs(fisher - squisher)


def on_every_seed(found: Mapping[str, Result]) -> bool:
    """Return whether Fisher and Squisher are above no penalty on every seed of a column."""
    return min(gains(found, "fisher") + gains(found, "squisher")) > 0


def _order(found: Mapping[str, Mapping[str, Result]]) -> str:
    said = []
    for column, label in COLUMNS.items():
        parts = [
            f"{METHODS[name].label} {mean_sd(gains(found[column], name))}" for name in ("fisher", "squisher", "l2")
        ]
        said.append(f"{label}: {', '.join(parts)}; {_verdict(found[column])}.")
    return (
        f"Points above no penalty. {' '.join(said)} (The paper's order: Fisher and Squisher above no penalty, and "
        "nearer to each other than to it.)"
    )


def _verdict(found: Mapping[str, Result]) -> str:
    """Say whether the paper's order came out, and if not on every seed, by how much seeds differ without a penalty."""
    if in_order(found) and on_every_seed(found):
        return "the paper's order, on every seed"
    verdict = "**not the paper's order**"
    if in_order(found):
        verdict = "the paper's order by the means, **not on every seed**"
    alone, gain = spread(ends(found["none"]))[1], mean(gains(found, "squisher"))
    if alone > gain > 1:
        verdict += f" (likely because each seed draws its tasks anew: without a penalty, seeds differ by ± {alone:.1f})"
    return verdict


def _no_success(found: Mapping[str, Mapping[str, Result]]) -> list[str]:
    """Say so if class-incremental learning came to little more than the last task."""
    best, last = max(mean(ends(found["class"][name])) for name in MAIN), 100 / TASKS
    if best > 1.5 * last:
        return []
    return [
        f"Class-incremental, EWC is no success, as in the paper: {best:.1f} % at best, where knowing the last task "
        f"alone gives up to {last:.0f} %. A penalty on weights does not teach which of two tasks a digit is of."
    ]


def edges(report: Mapping[str, Any]) -> list[str]:
    """Return where the lambda chosen is the first or the last of its grid."""
    said = []
    for one in report["cells"]:
        grid, best = one["settings"]["lambdas"], one["result"]["lambda"]
        if len(grid) > 1 and best in (grid[0], grid[-1]):
            end = "smallest" if best == grid[0] else "largest"
            said.append(f"{METHODS[one['settings']['method']].label}, {COLUMNS[one['settings']['column']]} ({end})")
    return said


def _chosen(report: Mapping[str, Any]) -> str:
    found, settings = results(report), report["cells"][0]["settings"]
    parts = [
        METHODS[name].label + " " + " / ".join(f"{found[column][name]['lambda']:.0e}" for column in COLUMNS)
        for name in MAIN
        if name != "none"
    ]
    at = edges(report)
    ending = f" It is at the end of its grid of four, and a better one may lie beyond: {'; '.join(at)}." if at else ""
    return (
        f"Lambda, chosen on seed {settings['validation']}, by column: {'; '.join(parts)}. "
        f"{settings['steps']} steps a task.{ending}"
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
            f"{COLUMNS[column]}: {', '.join(parts)}; the furthest is {most:.1f} points away, the lowest of all "
            f"{abs(least):.1f} points {'above' if least > 0 else 'below'} no penalty."
        )
    return f"Points above the Squisher. {' '.join(said)}"


FACTORS = {"squisher": BATCH, "dataset": EACH, "unscaled": 1}


def _factors(found: Mapping[str, Mapping[str, Result]]) -> str:
    said = []
    for column in ABLATED:
        strengths = {name: found[column][name]["lambda"] * factor for name, factor in FACTORS.items()}
        parts = ", ".join(f"{METHODS[name].label} {strength:.1e}" for name, strength in strengths.items())
        apart = max(strengths.values()) / min(strengths.values())
        said.append(f"{COLUMNS[column]}: {parts} (at most {apart:.1f} times apart, of grids ten times apart)")
    return f"Lambda times the factor, which together are all that the penalty sees, came to: {'; '.join(said)}."


def _ratios(found: Mapping[str, Mapping[str, Result]]) -> str:
    said = []
    for column in ABLATED:
        own, separate = (max(found[column][name]["ratio"]) for name in ("own", "squisher"))
        said.append(f"{COLUMNS[column]}: {own:.0e} and {separate:.0e}")
    most = max(max(found[column][name]["ratio"]) for column in ABLATED for name in ("own", "squisher"))
    ending = " At these lambdas neither runs away." if most < RUNAWAY else ""
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
    """Return the accuracy on the tasks learnt so far, by their number."""
    found = results(report)
    figure = drawing.new(9, 6)
    panels = figure.subplots(2, 2, sharex=True).flat
    for axes, column in zip(panels, COLUMNS, strict=True):
        for shift, (name, style) in enumerate(_STYLES.items()):
            steps = [list(values) for values in zip(*found[column][name]["so_far"], strict=True)]
            places = [number + 1 + 0.05 * (shift - 1.5) for number in range(len(steps))]
            drawing.curve(axes, places, steps, style, METHODS[name].label)
        axes.set_title(COLUMNS[column], fontsize=10)
        axes.set_xticks(range(1, TASKS + 1))
        axes.grid(axis="y", color="0.93")
    figure.supxlabel("tasks learnt", fontsize=10)
    figure.supylabel("accuracy, mean over the tasks learnt (%)", fontsize=10)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return {"forgetting.png": drawing.png(figure, dpi=100)}
