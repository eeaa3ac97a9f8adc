"""Model card of a merge: a section on the source of each Fisher, a picture, and a card that needs no network."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from squisher_mergekit.merging.parameters import UBGM_SQUISHER
from squisher_mergekit.merging.reports.totals import blank_text

if TYPE_CHECKING:
    from squisher_mergekit.merging.run import Run

CARD, PICTURE = "README.md", "shares.png"
# org/name, with a revision and a path in the repository if there are any.
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?(:.+)?")


def provenance(run: Run, base: str | None = None) -> str:
    """Return a section for the model card: source of each Fisher, effective weight of each model. No local path."""
    from importlib.metadata import version

    report = run.report()
    lines = [
        "",
        "## Fisher provenance",
        "",
        f"Merged by `{run.method}` of squisher-mergekit {version('squisher-mergekit')} with mergekit "
        f"{version('mergekit')}; {blank_text(report)}.",
        "",
        "| model | Fisher | estimator | optimizer | steps | beta2 | scale | effective weight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in run.preview["models"] if run.preview else []:
        share = report["effective_weight"].get(model["model"])
        cells = [
            public_name(model["model"]),
            public_name(str(model["fisher"])),
            *(model[key] for key in ("estimator", "optimizer", "steps", "beta2")),
            None if model["scale"] is None else f"{model['scaling']} x{model['scale']:.4g}",
            "base" if share is None else f"{share:.1%}",
        ]
        lines.append("| " + " | ".join("unknown" if cell is None else str(cell) for cell in cells) + " |")
    lines += ["", *([f"Base model: {public_name(base)}.", ""] if base else []), *_citations(run.method), ""]
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


def public_name(name: str) -> str:
    """Return a model or a file without its local path; an id on the Hub stays whole.

    The name of a checkpoint is that of its run as well. A relative path of two parts that is here is a local one.

    Example:
        >>> public_name("/home/me/runs/math/checkpoint-500"), public_name("org/math-7b@main")
        ('math/checkpoint-500', 'org/math-7b@main')
    """
    path = PurePath(name)
    if _HUB.fullmatch(name) and not Path(name).exists():
        return name
    return "/".join(path.parts[-2:]) if path.name.startswith("checkpoint-") else path.name


def add_picture(folder: Path, png: bytes, meaning: str) -> None:
    """Write a picture beside the model card, and show it there; do nothing in a folder without a card.

    Args:
        folder: Folder of the model.
        png: The PNG file.
        meaning: Description of the picture.
    """
    card = folder / CARD
    if card.is_file():
        (folder / PICTURE).write_bytes(png)
        with card.open("a", encoding="utf-8") as file:
            file.write(f"\n## Shares\n\n![{meaning}]({PICTURE})\n")


def bare_card(name: str, method: str, text: str) -> str:
    """Return a model card without links to the Hub, for use without a network."""
    header = "---\ntags:\n- mergekit\n- merge\nlibrary_name: transformers\n---\n"
    return (
        f"{header}# {name}\n\nA merge by the method `{method}`, made with mergekit.\n\n```yaml\n{text.rstrip()}\n```\n"
    )
