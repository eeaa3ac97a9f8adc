"""Tables and pictures of ``pruning``, from its report only, without imports of training code."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from scripts.experiments import drawing
from scripts.experiments.tables import Table, mean_sd

SCORES = ("fisher", "squisher", "magnitude", "random")
RETRAIN, LONGER = 30, 190  # optimizer steps after pruning, and a longer training that was tried
LABELS = {"fisher": "Fisher", "squisher": "Squisher", "magnitude": "magnitude", "random": "random"}
MOMENTS = {"at_once": "right after pruning", "retrained": "trained on"}
KINDS = {"weights": "single weights", "filters": "filters"}
_STYLES = {
    "fisher": ("s", "-", "white"),
    "squisher": ("o", "--", "black"),
    "magnitude": ("^", "-.", "0.6"),
    "random": ("x", ":", "black"),
}


class Found:
    """Cells of a report: those of the reported seeds, and those of the search (``longer`` in their settings)."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        cells: dict[bool, list[Any]] = {False: [], True: []}
        for one in report["cells"]:
            cells["longer" in one["settings"]].append(one)
        self.reported = [one["result"] for one in cells[False]]
        self.searched = [one["result"] for one in cells[True]]
        self.search_seeds = [one["settings"]["seed"] for one in cells[True]]
        self.sparsities: Sequence[float] = cells[False][0]["settings"]["sparsities"]
        self.longer: Sequence[float] = cells[True][0]["settings"]["longer"]

    def points(self, kind: str, score: str, moment: str) -> list[list[float]]:
        """Return, for each sparsity, the accuracy of each seed in %.

        Args:
            kind: ``weights``, ``filters``, or ``longer`` (filters after a longer training, on the seeds of the search).
            score: Key of ``SCORES``.
            moment: ``at_once`` or ``retrained``.
        """
        results = self.searched if kind == "longer" else self.reported
        by_seed = [[100 * point[moment] for point in result[kind][score]] for result in results]
        return [list(values) for values in zip(*by_seed, strict=True)]

    def gains(self, kind: str, moment: str, one: str, other: str) -> list[list[float]]:
        """Return the points of a score above another one, for each sparsity and seed."""
        pairs = zip(self.points(kind, one, moment), self.points(kind, other, moment), strict=True)
        return [[a - b for a, b in zip(ours, theirs, strict=True)] for ours, theirs in pairs]

    def shares(self, chosen: Sequence[bool]) -> str:
        """Return the chosen sparsities as text."""
        return percent([share for share, yes in zip(self.sparsities, chosen, strict=True) if yes])


def percent(shares: Sequence[float]) -> str:
    """Return shares as text.

    Example:
        >>> percent([0.25, 0.5])
        '25, 50 %'
    """
    return f"{', '.join(f'{100 * share:g}' for share in shares)} %"


def best_ways(found: Found) -> dict[str, str]:
    """Return a mapping from scores to the best way to prune filters, after training, on the seeds of the search."""
    best = {}
    for score in SCORES:
        totals: dict[str, float] = {}
        for result in found.searched:
            for way, points in result["search"][score].items():
                totals[way] = totals.get(way, 0) + sum(point["retrained"] for point in points)
        best[score] = max(totals, key=totals.__getitem__)
    return best


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return the tables of single weights and of filters, right after pruning and after further training."""
    found = Found(report)
    before, after = (mean_sd([100 * one["whole"][moment] for one in found.reported]) for moment in MOMENTS)
    seeds = f"test accuracy (%), {len(found.reported)} seeds; the whole network: {before}, trained on as well: {after}"
    columns = [f"{share:.0%} pruned" for share in found.sparsities]
    made = []
    for kind, title in KINDS.items():
        rows = [
            (f"{LABELS[score]}, {name}", [mean_sd(values) for values in found.points(kind, score, moment)])
            for moment, name in MOMENTS.items()
            for score in SCORES
        ]
        notes = [_differences(found, kind), *(_verdict(found, kind, moment) for moment in MOMENTS)]
        notes += _about_filters(found) if kind == "filters" else []
        made.append(Table(f"**Pruning of {title}**: {seeds}", columns, rows, notes))
    return made


def _differences(found: Found, kind: str) -> str:
    """Return a note with the points of the Squisher above each other score after further training."""
    said = [
        f"{LABELS[other]} {', '.join(map(marked, found.gains(kind, 'retrained', 'squisher', other)))}"
        for other in SCORES
        if other != "squisher"
    ]
    return (
        f"By how many points the Squisher is above the others, trained on, at {percent(found.sparsities)} "
        f"(▲ above, ▼ below on every seed): {'; '.join(said)}."
    )


def marked(gains: Sequence[float]) -> str:
    """Return mean and deviation, with a mark if the sign is the same on every seed.

    Example:
        >>> marked([1.0, 2.0, 3.0]), marked([-1.0, 1.0])
        ('2.0 ± 1.0 ▲', '0.0 ± 1.4')
    """
    return mean_sd(gains) + (" ▲" if min(gains) > 0 else " ▼" if max(gains) < 0 else "")


def _verdict(found: Found, kind: str, moment: str) -> str:
    """Return a note on the agreement of Fisher and Squisher, and on random and magnitude."""
    means = {score: list(map(mean, found.points(kind, score, moment))) for score in SCORES}
    apart = [abs(one - two) for one, two in zip(means["fisher"], means["squisher"], strict=True)]
    lowest = [min(pair) for pair in zip(means["fisher"], means["squisher"], strict=True)]
    highest = [max(pair) for pair in zip(means["fisher"], means["squisher"], strict=True)]
    every = [
        min(*one, *two) > 0
        for one, two in zip(*(found.gains(kind, moment, f, "random") for f in ("fisher", "squisher")), strict=True)
    ]
    in_mean = [low > other for low, other in zip(lowest, means["random"], strict=True)]
    as_good = [other >= high for high, other in zip(highest, means["magnitude"], strict=True)]
    said = [
        f"{MOMENTS[moment].capitalize()}, Fisher and Squisher are {', '.join(f'{one:.1f}' for one in apart)} points "
        f"apart in the mean."
    ]
    if any(every):
        said.append(f"Both are above random on every seed at {found.shares(every)}.")
    if not all(every):
        missed = [not one for one in every]
        held = [a and b for a, b in zip(missed, in_mean, strict=True)]
        lost = [a and not b for a, b in zip(missed, in_mean, strict=True)]
        said += [f"Above it in the mean alone: at {found.shares(held)}."] if any(held) else []
        said += [f"The paper's order does not come out at {found.shares(lost)}."] if any(lost) else []
    if any(as_good):
        said.append(f"Magnitude, which needs neither, is as good or better at {found.shares(as_good)}.")
    return " ".join(said)


def _about_filters(found: Found) -> list[str]:
    """Return notes on the comparison of filters, on a longer training, and on the filters of each layer."""
    ways: dict[str, list[str]] = {}
    for score, way in best_ways(found).items():
        ways.setdefault(way, []).append(LABELS[score])
    compared = "; ".join(f"{way}: {', '.join(scores)}" for way, scores in ways.items())
    longer = "; ".join(
        f"{LABELS[score]} {', '.join(map(mean_sd, found.points('longer', score, 'retrained')))}" for score in SCORES
    )
    kept = "; ".join(
        f"{share:.0%}: {', '.join(f'{count:.0f}' for count in counts)}"
        for share, counts in zip(found.sparsities, _kept(found, "squisher"), strict=True)
    )
    seeds = " and ".join(map(str, found.search_seeds))
    whole = ", ".join(map(str, found.reported[0]["whole"]["kept"]))
    return [
        f"Filters are compared as was best on seeds {seeds}: {compared}. Tried there as well: {LONGER} steps of "
        f"training instead of {RETRAIN}, at {percent(found.longer)}: {longer}.",
        f"Of {whole} filters the Squisher keeps, in the mean, at {kept}.",
        *_little_left(found),
    ]


def _little_left(found: Found, least: float = 20) -> list[str]:
    """Return a note on sparsities at which no score leaves much accuracy, the likely cause of a missing order."""
    by_score = [list(map(mean, found.points("filters", score, "at_once"))) for score in SCORES]
    best = [max(values) for values in zip(*by_score, strict=True)]
    gone = [value < least for value in best]
    if not any(gone):
        return []
    most = max(value for value, yes in zip(best, gone, strict=True) if yes)
    return [
        f"At {found.shares(gone)} no score leaves more than {most:.1f} % right after pruning. So narrow a network is "
        "then trained almost from scratch, the likely reason why there is no clear order."
    ]


def _kept(found: Found, score: str) -> list[list[float]]:
    """Return the mean number of filters of each layer over the seeds, for each sparsity."""
    by_seed = [[point["kept"] for point in one["filters"][score]] for one in found.reported]
    return [[mean(layer) for layer in zip(*widths, strict=True)] for widths in zip(*by_seed, strict=True)]


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the picture of accuracy against sparsity for single weights and filters."""
    found = Found(report)
    figure = drawing.new(9, 6)
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for row, (moment, name) in zip(panels, MOMENTS.items(), strict=True):
        whole = mean(100 * one["whole"][moment] for one in found.reported)
        for axes, (kind, title) in zip(row, KINDS.items(), strict=True):
            axes.axhline(whole, color="0.6", linewidth=1, label="whole network")
            for number, score in enumerate(SCORES):
                places = [100 * share + 0.8 * (number - 1.5) for share in found.sparsities]
                drawing.curve(axes, places, found.points(kind, score, moment), _STYLES[score], LABELS[score])
            axes.set_title(f"{title}, {name}", fontsize=10)
            axes.set_xticks([100 * share for share in found.sparsities])
            axes.grid(axis="y", color="0.93")
        row[0].set_ylabel("test accuracy (%)")
    for axes in panels[-1]:
        axes.set_xlabel("sparsity (%)")
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return {"pruning.png": drawing.png(figure, dpi=100)}
