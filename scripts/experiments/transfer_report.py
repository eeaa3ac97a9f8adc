"""Tables and pictures of ``transfer``, from its report only, without imports of training code."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scripts.experiments import drawing
from scripts.experiments.tables import Table, mean_sd, spread
from squisher_mergekit.applications.task2vec.distances import clustered
from squisher_mergekit.applications.task2vec.ranking import Quality, assess
from squisher_mergekit.fisher.compare import spearman

KINDS = ("squisher", "fisher")
DEFAULT = "cosine"
NO_SOURCE = "no source"


@dataclass(frozen=True)
class Variant:
    """Choice of the sources of a target; targets with fewer than three sources do not count."""

    title: str
    holds: Callable[[str, str, Mapping[str, Any]], bool]


VARIANTS = {
    "all": Variant("From all other tasks", lambda target, source, result: True),
    "topic": Variant(
        "Within a topic (the paper's in-class)",
        lambda target, source, result: result["topics"][target] == result["topics"][source],
    ),
    "two": Variant(
        "Tasks of two classes alone",
        lambda target, source, result: result["classes"][target] == result["classes"][source] == 2,
    ),
}
ROWS = {
    "squisher": "Squisher",
    "fisher": "Fisher",
    "size": "size of the data",
    "random": "random order, expected",
    "measured": "measured on other texts",
}


def scores_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Return a mapping from sources to the accuracy in % on the target's texts."""
    return {name: sum(half) / 2 for name, half in result["halves"].items()}


def sources_of(cell: Mapping[str, Any], variant: str) -> list[str]:
    """Return the chosen sources of a cell's target."""
    target = cell["settings"]["target"]
    names = [name for name in cell["settings"]["tasks"] if name != target]
    found = [name for name in names if VARIANTS[variant].holds(target, name, cell["result"])]
    return found if len(found) > 2 else []


def qualities(report: Mapping[str, Any], variant: str, metric: str = DEFAULT) -> dict[str, list[Quality]]:
    """Return a mapping from rows to the mean quality over the targets, for each seed.

    The row ``measured`` is the order by accuracy on one half of the test texts, applied to the other half: the expected
    limit for any order with scores of this noise.
    """
    found: dict[str, list[Quality]] = {row: [] for row in ROWS}
    for seed in dict.fromkeys(cell["settings"]["seed"] for cell in report["cells"]):
        cells = {c["settings"]["target"]: c for c in report["cells"] if c["settings"]["seed"] == seed}
        chosen = {target: names for target, cell in cells.items() if (names := sources_of(cell, variant))}
        if not chosen:
            continue
        results = {target: cells[target]["result"] for target in chosen}
        scores = {target: scores_of(result) for target, result in results.items()}
        sizes = next(iter(results.values()))["sizes"]
        for kind in KINDS:
            orders = {t: {s: results[t]["distances"][kind][metric][s] for s in chosen[t]} for t in chosen}
            quality = assess(orders, scores, sizes)
            found[kind].append(quality["distance"]["mean"])
        found["size"].append(quality["size"]["mean"])
        found["random"].append(quality["random"]["mean"])
        first, second = ({t: {s: results[t]["halves"][s][i] for s in chosen[t]} for t in chosen} for i in (0, 1))
        known = {target: {source: -score for source, score in row.items()} for target, row in first.items()}
        found["measured"].append(assess(known, second)["distance"]["mean"])
    return found


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return the tables of the quality of each order: all tasks, within a topic, and tasks of two classes."""
    made = []
    for variant, about in VARIANTS.items():
        found = qualities(report, variant)
        counts = [len(names) for cell in report["cells"] if (names := sources_of(cell, variant))]
        if not counts:
            continue
        most = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{max(counts)}"
        made.append(
            Table(
                f"{about.title}: {len(counts)} targets, each with {most} sources.",
                ["MRR", "NDCG", "mean rank of the best source"],
                [(ROWS[row], [_column(values, measure) for measure in MEASURES]) for row, values in found.items()],
                [_order_note(found), _noise(report, variant), *(_notes(report) if variant == "all" else [])],
            )
        )
    return made


MEASURES = {"reciprocal_rank": 3, "ndcg": 3, "best_rank": 1}
"""Field of a quality -> digits shown."""


def _column(values: Sequence[Quality], measure: str) -> str:
    return mean_sd([getattr(value, measure) for value in values], MEASURES[measure])


def _mean(values: Iterable[float]) -> float:
    """Return a mean in floats; statistics.mean is exact and slow."""
    listed = list(values)
    return sum(listed) / len(listed)


def _order_note(found: Mapping[str, Sequence[Quality]]) -> str:
    """Return a note on the paper's order: both Fishers above the size of the data and a random order."""
    said = []
    for name, measure in (("MRR", "reciprocal_rank"), ("NDCG", "ndcg")):
        means = {row: _mean(getattr(value, measure) for value in values) for row, values in found.items()}
        below = [
            f"{ROWS[kind]} is not above {ROWS[other].partition(',')[0]}"
            for kind in KINDS
            for other in ("size", "random")
            if means[kind] <= means[other]
        ]
        wins = {
            kind: sum(
                getattr(one, measure) > max(getattr(size, measure), getattr(chance, measure))
                for one, size, chance in zip(found[kind], found["size"], found["random"], strict=True)
            )
            for kind in KINDS
        }
        order = "the paper's order, both above size and random, " + ("does not come out" if below else "comes out")
        seeds = f"above both are the Squisher on {wins['squisher']} and the Fisher on {wins['fisher']}"
        why = f" ({'; '.join(below)})" if below else ""
        said.append(f"{name}: {order} in the means{why}; {seeds} of {len(found['squisher'])} seeds.")
    return " ".join(said)


def _noise(report: Mapping[str, Any], variant: str) -> str:
    """Return a note on the differences between sources of a target, and the part of chance in them."""
    differ, noise, near = [], [], []
    for cell in report["cells"]:
        if names := sources_of(cell, variant):
            halves, scores = cell["result"]["halves"], scores_of(cell["result"])
            values = torch.tensor([scores[name] for name in names], dtype=torch.float64)
            apart = torch.tensor([halves[name][0] - halves[name][1] for name in names], dtype=torch.float64)
            differ.append(values.var().item())
            noise.append(apart.var().item() / 4)  # the mean of two halves has a quarter of their difference's variance
            near.append((values >= values.max() - 2).sum().item())
    return (
        f"Sources of a target differ by {_mean(differ) ** 0.5:.1f} points (standard deviation); "
        f"{_mean(noise) ** 0.5:.1f} points would come from so few test texts alone, and {_mean(near):.1f} sources, on "
        "average, are within 2 points of the best. So its place is partly chance: the last row says how far."
    )


def _notes(report: Mapping[str, Any]) -> list[str]:
    """Return notes on the gain of a transfer, the agreement of both Fishers, and other distances."""
    best, average, agree = [], [], []
    for cell in report["cells"]:
        names, scores, distances = sources_of(cell, "all"), scores_of(cell["result"]), cell["result"]["distances"]
        gains = [scores[name] - scores[NO_SOURCE] for name in names]
        best.append(max(gains))
        average.append(_mean(gains))
        one, other = (torch.tensor([distances[kind][DEFAULT][name] for name in names]) for kind in KINDS)
        agree.append(spearman(one, other) or 0.0)
    return [
        f"After the best source a target is {_mean(best):.1f} points above training from the published encoder (which "
        f"is flattered: it was found on the same texts), after the average source {_mean(average):+.1f}. "
        f"{_same_topic(report)} Distances by Squisher and by Fisher agree with a rank correlation of "
        f"{mean_sd(agree, 2)} within a target (over targets).",
        _other_metrics(report),
    ]


def _same_topic(report: Mapping[str, Any]) -> str:
    """Return the counts of best and nearest sources within the target's topic, as text."""
    cells = [cell for cell in report["cells"] if sources_of(cell, "topic")]
    counts = {"best source": 0, **{f"nearest by {ROWS[kind]}": 0 for kind in KINDS}}
    for cell in cells:
        names, topics = sources_of(cell, "all"), cell["result"]["topics"]
        topic = topics[cell["settings"]["target"]]
        scores = scores_of(cell["result"])
        top = max(scores[name] for name in names)
        counts["best source"] += any(scores[name] == top and topics[name] == topic for name in names)
        for kind in KINDS:
            row = cell["result"]["distances"][kind][DEFAULT]
            counts[f"nearest by {ROWS[kind]}"] += topics[min(names, key=row.__getitem__)] == topic
    said = ", ".join(f"{label} {count}" for label, count in counts.items())
    return f"Of the target's own topic, in {len(cells)} targets whose topic has four tasks or more: {said}."


def _other_metrics(report: Mapping[str, Any]) -> str:
    parts = []
    for metric in report["cells"][0]["result"]["distances"][KINDS[0]]:
        found = qualities(report, "all", metric)
        pair = " / ".join(f"{_mean(quality.ndcg for quality in found[kind]):.3f}" for kind in KINDS)
        parts.append(f"{metric} {pair}")
    return f"NDCG from all other tasks by distance, Squisher / Fisher: {', '.join(parts)}."


_FILLS = {"all": "black", "topic": "0.65", "two": "white"}


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the pictures of distances between tasks, of accuracy by distance, and of the quality of each order."""
    return {"transfer.png": _quality(report), "transfer_distances.png": _distances(report)}


def distances(report: Mapping[str, Any]) -> tuple[list[str], torch.Tensor]:
    """Return the tasks and the Squisher's distance of each pair, mean over the seeds."""
    names = list(dict.fromkeys(cell["settings"]["target"] for cell in report["cells"]))
    found: dict[frozenset[str], list[float]] = {}
    for cell in report["cells"]:
        for source, value in cell["result"]["distances"]["squisher"][DEFAULT].items():
            found.setdefault(frozenset((source, cell["settings"]["target"])), []).append(value)
    matrix = torch.zeros(len(names), len(names), dtype=torch.float64)
    for row, one in enumerate(names):
        for column, other in enumerate(names):
            if one != other:
                matrix[row, column] = _mean(found[frozenset((one, other))])
    return names, matrix


def _distances(report: Mapping[str, Any]) -> bytes:
    from squisher_mergekit.cli.task2vec_plots import heat_map

    names, matrix = distances(report)
    seeds = len({cell["settings"]["seed"] for cell in report["cells"]})
    order, tree = clustered(matrix)
    return heat_map(matrix, names, order, tree, f"Distances by Squisher (0 to 1), mean over {seeds} seeds")


def _quality(report: Mapping[str, Any]) -> bytes:
    figure = drawing.new(9, 3.8)
    left, right = figure.subplots(1, 2)
    _draw_pairs(left, report)
    for offset, (variant, about) in zip((0.2, 0, -0.2), VARIANTS.items(), strict=True):
        found = qualities(report, variant)
        for place, (row, values) in enumerate(reversed(found.items())):
            if values:
                mean, deviation = spread([value.ndcg for value in values])
                right.errorbar(
                    mean,
                    place + offset,
                    xerr=deviation,
                    fmt="o",
                    color="0.2",
                    markerfacecolor=_FILLS[variant],
                    elinewidth=0.8,
                    label=about.title if row == "squisher" else None,
                )
    right.set_yticks(range(len(ROWS)), list(reversed(ROWS.values())))
    right.set_xlabel("NDCG (1: the measured order)")
    right.grid(axis="x", color="0.93")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return drawing.png(figure)


def _draw_pairs(axes: Any, report: Mapping[str, Any]) -> None:
    """Draw the Squisher's distance of each pair and its accuracy above the mean over the target's sources."""
    points: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for cell in report["cells"]:
        target, result, names = cell["settings"]["target"], cell["result"], sources_of(cell, "all")
        scores = scores_of(result)
        middle = _mean(scores[name] for name in names)
        for name in names:
            place = (result["distances"]["squisher"][DEFAULT][name], scores[name] - middle)
            points[result["topics"][name] == result["topics"][target]].append(place)
    for same, label, style in (
        (False, "another topic", {"marker": "o", "facecolors": "none", "edgecolors": "0.55"}),
        (True, "the same topic", {"marker": "^", "color": "black"}),
    ):
        axes.scatter(*zip(*points[same], strict=True), s=18, linewidths=0.8, label=f"source of {label}", **style)
    axes.axhline(0, color="0.8", linewidth=1)
    axes.set_xlabel("distance of source and target by Squisher (0 to 1)")
    axes.set_ylabel("accuracy on the target above\nthe mean over sources (points)")
