"""Heat maps of a merge: figures by layer (rows) and kind of matrix (columns)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from squisher_mergekit.fisher.summary import by_number, kind_of, layer_of

# Key of the report -> meaning of its share of entries, for a title.
VOTES = {"abstained": "without a vote", "sign_conflicts": "against the elected sign"}
ALONE = ""  # column of tensors outside of numbered layers, such as embeddings and heads
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class HeatMap:
    """Figures between 0 and 1 by layer and kind of matrix.

    Attributes:
        title: Title.
        rows: Names of the layers.
        columns: Names of the kinds; :data:`ALONE` for tensors outside of numbered layers.
        values: (row, column) -> figure; a pair without a tensor is left out.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Mapping[tuple[str, str], float]


def heat_map(title: str, tensors: Mapping[str, Figures], figure: Callable[[Figures], float]) -> HeatMap:
    """Return a figure of each tensor as a heat map; tensors of one layer and kind are averaged over their entries.

    Args:
        title: Title.
        tensors: Name -> figures of a tensor, with ``entries``.
        figure: Function from the figures of a tensor to a number between 0 and 1.

    Example:
        >>> tensors = {"h.1.mlp.weight": {"entries": 3, "x": 1.0}, "h.1.mlp.bias": {"entries": 1, "x": 0.0}}
        >>> heat_map("x", tensors, lambda found: found["x"]).values
        {('h.1', 'mlp'): 0.75}
    """
    sums: dict[tuple[str, str], tuple[float, int]] = {}
    for name, found in tensors.items():
        place = place_of(name)
        total, count = sums.get(place, (0.0, 0))
        sums[place] = total + figure(found) * found["entries"], count + found["entries"]
    rows = sorted({row for row, _ in sums}, key=by_number)
    columns = list(dict.fromkeys(column for _, column in sums if column != ALONE))
    columns += [ALONE] if any(column == ALONE for _, column in sums) else []
    return HeatMap(title, rows, columns, {place: total / max(count, 1) for place, (total, count) in sums.items()})


def place_of(name: str) -> tuple[str, str]:
    """Return layer and kind of a tensor.

    Example:
        >>> place_of("model.layers.3.mlp.up_proj.weight"), place_of("model.embed_tokens.weight")
        (('model.layers.3', 'mlp.up_proj'), ('model.embed_tokens', ''))
    """
    numbered = any(part.isdigit() for part in name.split("."))
    return layer_of(name), kind_of(name) if numbered else ALONE


def share_maps(report: Mapping[str, Any], shown: Callable[[str], str] = str) -> list[HeatMap]:
    """Return the heat maps of a report: shares, and where there are any, abstentions, sign conflicts and no signal.

    Args:
        report: Report of a run, with ``by_tensor``.
        shown: Function from the label of a model to the name in a title.
    """
    tensors = report["by_tensor"]
    labels = list(report["effective_weight"])
    maps = []
    for place, label in enumerate(labels):
        maps.append(heat_map(f"{letter(place)}  {tail(shown(label), 34)}", tensors, _of("effective_weight", label)))
    for key, meaning in VOTES.items():
        for place, label in enumerate(labels):
            if report.get(key, {}).get(label):
                maps.append(heat_map(f"{letter(place)} {meaning}", tensors, _of(key, label)))
    if report["fell_back"]:
        maps.append(heat_map("no signal in any model", tensors, lambda found: float(found["fell_back"])))
    return maps


def counted_votes(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the shares of entries under the keys of ``VOTES``, without those that are 0 for all models.

    Example:
        >>> counted_votes({"abstained": {"a": 0.0}, "sign_conflicts": {"a": 0.25}})
        {'sign_conflicts': {'a': 0.25}}
    """
    return {key: report[key] for key in VOTES if any(report.get(key, {}).values())}


def _of(key: str, label: str) -> Callable[[Figures], float]:
    """Return a function from the figures of a tensor to one figure of a model."""

    def figure(found: Figures) -> float:
        return float(found.get(key, {}).get(label, 0.0))

    return figure


def tail(name: str, length: int = 70) -> str:
    """Return a name, or the end of a long one, for a title.

    Example:
        >>> tail("runs/math/checkpoint-500", 14)
        '...checkpoint-500'
    """
    return name if len(name) <= length else f"...{name[-length:]}"


def letter(place: int) -> str:
    """Return the letter of a model.

    Example:
        >>> letter(0), letter(27)
        ('A', 'B')
    """
    return chr(ord("A") + place % 26)
