"""Totals of a merge over the entries of its tensors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from squisher_mergekit.merging.inputs import Outcome
from squisher_mergekit.merging.parameters import no_signal


@dataclass
class Totals:
    """Totals over the entries of some tensors; values can be on an accelerator until the report.

    Attributes:
        entries: Number of entries.
        fell_back: Numbers of entries where no model had information.
        silent: Numbers of entries where no model votes.
        shares: Model -> mean coefficients that it entered with, each with its number of entries.
        abstained: Model -> numbers of entries that it does not keep.
        sign_conflicts: Model -> numbers of kept entries that move against the elected sign.
    """

    entries: int = 0
    fell_back: list[int | Tensor] = field(default_factory=list)
    silent: list[int | Tensor] = field(default_factory=list)
    shares: dict[str, list[tuple[float | Tensor, int]]] = field(default_factory=dict)
    abstained: dict[str, list[int | Tensor]] = field(default_factory=dict)
    sign_conflicts: dict[str, list[int | Tensor]] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Iterable["Totals"]) -> "Totals":
        """Return the totals over all tensors of several totals."""
        found = cls()
        for part in parts:
            found.entries += part.entries
            found.fell_back += part.fell_back
            found.silent += part.silent
            for label, shares in part.shares.items():
                found.shares.setdefault(label, []).extend(shares)
            for kept, added in ((found.abstained, part.abstained), (found.sign_conflicts, part.sign_conflicts)):
                for label, counts in added.items():
                    kept.setdefault(label, []).extend(counts)
        return found

    def add(self, size: int, labels: Sequence[str], outcome: Outcome) -> None:
        """Add the outcome of one tensor."""
        self.entries += size
        self.fell_back.append(outcome.fell_back)
        self.silent.append(outcome.silent)
        for kept, added in ((self.abstained, outcome.abstained), (self.sign_conflicts, outcome.sign_conflicts)):
            for label, count in zip(labels, added, strict=False):
                kept.setdefault(label, []).append(count)
        for label, share in zip(labels, outcome.shares, strict=True):
            self.shares.setdefault(label, []).append((share, size))

    def blank(self) -> int:
        """Return the number of entries where no model had information."""
        return sum(int(count) for count in self.fell_back)

    def report(self) -> dict[str, Any]:
        """Return the number of entries, shares of entries, and the mean effective weight of each model."""
        size, silent = max(self.entries, 1), sum(int(count) for count in self.silent)
        voted = max(self.entries - silent, 1)
        found = {
            "entries": self.entries,
            "fell_back": self.blank() / size,
            "effective_weight": {
                label: sum(float(share) * entries for share, entries in shares) / voted
                for label, shares in self.shares.items()
            },
        }
        if not self.abstained:
            return found
        found |= {"silent": silent / size, "abstained": _shares(self.abstained, size)}
        return found | ({"sign_conflicts": _shares(self.sign_conflicts, size)} if self.sign_conflicts else {})


def _shares(counts: Mapping[str, Sequence[int | Tensor]], size: int) -> dict[str, float]:
    """Return the share of entries of each model."""
    return {label: sum(map(int, numbers)) / size for label, numbers in counts.items()}


def blank_text(report: Mapping[str, Any], whole: str = "the entries", digits: int = 2) -> str:
    """Return the shares of the entries that no Fisher weighs: without a signal, and in tensors without a Fisher.

    Args:
        report: Report of a run.
        whole: Name of all entries.
        digits: Digits after the point.

    Example:
        >>> blank_text({"method": "squisher", "fell_back": 0.3, "without_fisher": 0.2}, digits=0).split("; ")[1]
        '20% in tensors without a Fisher: weighted mean'
    """
    without = report.get("without_fisher", 0.0)
    blank = max(report["fell_back"] - without, 0.0)
    text = f"{blank:.{digits}%} of {whole}, {no_signal(report['method'])}"
    return f"{text}; {without:.{digits}%} in tensors without a Fisher: weighted mean" if without else text
