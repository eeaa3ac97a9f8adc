"""Report of a merge as a table for the terminal."""

from typing import Any

from squisher_mergekit.merging.coupling.report import structure_lines
from squisher_mergekit.merging.reports.heat_maps import VOTES, counted_votes, letter
from squisher_mergekit.merging.reports.totals import blank_text
from squisher_mergekit.models.whole import names_text


def report_text(report: dict[str, Any], rows: int = 40) -> str:
    """Return the report as a table: effective weight of each model, overall and per kind of layer.

    Args:
        report: Report of :meth:`Run.report`.
        rows: Largest number of kinds of layer to show.
    """
    labels = list(report["effective_weight"])
    columns = [letter(place) for place in range(len(labels))]
    entries = f"{report['entries']:,} entries"
    lines = [f"{report['method']}: {blank_text(report, entries, 3)}"]
    lines += _vote_lines(report)
    if report.get("lost"):
        whole = report["whole"]
        lines.append(
            f"  written are {report['tensors']} of {whole['tensors']} tensors; lost are {names_text(report['lost'])}"
        )
    lines += [f"  {note}" for note in report.get("notes", ())]
    if report.get("adapter"):
        lines.append(_adapter_line(report["adapter"]))
    lines += [f"  {column} = {label}" for column, label in zip(columns, labels, strict=True)]
    kinds = list(report["kinds"].items())
    width = max([len("effective weight"), *(len(kind) for kind, _ in kinds[:rows])])
    lines.append(f"{'effective weight':<{width}}" + "".join(f"{column:>9}" for column in columns) + "  no signal")

    def row(kind: str, entry: dict[str, Any]) -> str:
        shares = "".join(f"{entry['effective_weight'].get(label, 0.0):>9.1%}" for label in labels)
        return f"{kind:<{width}}{shares}{entry['fell_back']:>11.2%}"

    lines.append(row("overall", report))
    lines += [row(kind, entry) for kind, entry in kinds[:rows]]
    if len(kinds) > rows:
        lines.append(f"... and {len(kinds) - rows} more kinds of layer (--json FILE has all)")
    if "structure" in report:
        lines += structure_lines(report["structure"], dict(zip(labels, columns, strict=True)))
    return "\n".join(lines)


def _vote_lines(report: dict[str, Any]) -> list[str]:
    """Return the entries without any vote, and for each model those without its vote or against the elected sign."""
    if "abstained" not in report:
        return []
    labels = list(report["effective_weight"])
    lines = [f"  {report['silent']:.3%} without a vote: base value"]
    for key, shares in counted_votes(report).items():
        texts = [f"{letter(place)} {shares.get(label, 0.0):.1%}" for place, label in enumerate(labels)]
        lines.append(f"  entries {VOTES[key]}: {', '.join(texts)}")
    return lines


def _adapter_line(adapter: dict[str, Any]) -> str:
    """Return one line about an adapter: its rank, and the energy that it discards."""
    name, worst = max(adapter["modules"].items(), key=lambda item: float(item[1]["discarded"]))
    return (
        f"  written as an adapter of rank {adapter['rank']} for {len(adapter['modules'])} tensors, which discards "
        f"{adapter['discarded']:.2%} of the energy of the change (most of {name}: {worst['discarded']:.2%})"
    )
