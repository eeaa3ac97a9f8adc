"""Report of a merge: a table for the terminal, a section for the model card."""

from pathlib import PurePath
from typing import Any

from squisher_mergekit.merging.coupling.report import structure_lines
from squisher_mergekit.merging.parameters import UBGM_SQUISHER, no_signal
from squisher_mergekit.merging.reports.heat_maps import letter
from squisher_mergekit.merging.run import Run
from squisher_mergekit.models.whole import names_text


def report_text(report: dict[str, Any], rows: int = 40) -> str:
    """Return the report as a table: effective weight of each model, overall and per kind of layer.

    Args:
        report: Report of :meth:`Run.report`.
        rows: Largest number of kinds of layer to show.
    """
    labels = list(report["effective_weight"])
    columns = [letter(place) for place in range(len(labels))]
    lines = [
        f"{report['method']}: {report['fell_back']:.3%} of {report['entries']:,} entries, {no_signal(report['method'])}"
    ]
    if report.get("abstained"):
        own = ", ".join(
            f"{column} {report['abstained'].get(label, 0.0):.1%}" for column, label in zip(columns, labels, strict=True)
        )
        lines.append(f"  {report['silent']:.3%} without a vote: base value; entries without the vote of {own}")
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


def _adapter_line(adapter: dict[str, Any]) -> str:
    """Return one line about an adapter: its rank, and the energy that it discards."""
    name, worst = max(adapter["modules"].items(), key=lambda item: float(item[1]["discarded"]))
    return (
        f"  written as an adapter of rank {adapter['rank']} for {len(adapter['modules'])} tensors, which discards "
        f"{adapter['discarded']:.2%} of the energy of the change (most of {name}: {worst['discarded']:.2%})"
    )


def provenance(run: Run, base: str | None = None) -> str:
    """Return a section for the model card: source of each Fisher, effective weight of each model. No local path."""
    from importlib.metadata import version

    report = run.report()
    lines = [
        "",
        "## Fisher provenance",
        "",
        f"Merged by `{run.method}` of squisher-mergekit {version('squisher-mergekit')} with mergekit "
        f"{version('mergekit')}; {report['fell_back']:.2%} of the entries, {no_signal(run.method)}.",
        "",
        "| model | Fisher | estimator | optimizer | steps | beta2 | scale | effective weight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in run.preview["models"] if run.preview else []:
        share = report["effective_weight"].get(model["model"])
        cells = [
            _short(model["model"]),
            PurePath(str(model["fisher"])).name,
            *(model[key] for key in ("estimator", "optimizer", "steps", "beta2")),
            None if model["scale"] is None else f"{model['scaling']} x{model['scale']:.4g}",
            "base" if share is None else f"{share:.1%}",
        ]
        lines.append("| " + " | ".join("unknown" if cell is None else str(cell) for cell in cells) + " |")
    lines += ["", *([f"Base model: {_short(base)}.", ""] if base else []), *_citations(run.method), ""]
    return "\n".join(lines)


def _citations(method: str) -> list[str]:
    """Return the works behind a method."""
    own = (
        "Gradient matching: Daheim et al., *Model Merging by Uncertainty-Based Gradient Matching*, ICLR 2024."
        if method == UBGM_SQUISHER
        else "Fisher merging: Matena and Raffel, *Merging Models with Fisher-Weighted Averaging*, NeurIPS 2022."
    )
    return [
        "Squisher: Li, Dangel, Tam and Raffel, *Fishers for Free? Approximating the Fisher Information Matrix by "
        "Recycling the Squared Gradient Accumulator*, ICML 2025.",
        own,
        "mergekit: Goddard et al., *Arcee's MergeKit: A Toolkit for Merging Large Language Models*, EMNLP 2024.",
    ]


def _short(model: str) -> str:
    """Return the last part of a path; for a checkpoint also the name of its run."""
    path = PurePath(model)
    return "/".join(path.parts[-2:]) if path.name.startswith("checkpoint-") else path.name


def bare_card(name: str, method: str, text: str) -> str:
    """Return a model card without links to the Hub, for use without a network."""
    header = "---\ntags:\n- mergekit\n- merge\nlibrary_name: transformers\n---\n"
    return (
        f"{header}# {name}\n\nA merge by the method `{method}`, made with mergekit.\n\n```yaml\n{text.rstrip()}\n```\n"
    )
