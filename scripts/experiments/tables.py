"""Tables of the README files, and the text of their numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from scipy.stats import t as student


@dataclass(frozen=True)
class Table:
    """Table of a README.md.

    Attributes:
        title: paragraph above the table, or an empty string.
        columns: titles of the columns.
        rows: label and cells of each row, as text.
        notes: paragraphs below the table.
        summary: line that a reader opens to see all this, or an empty string.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    notes: Sequence[str] = field(default_factory=tuple)
    summary: str = ""

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [self.title, ""] if self.title else []
        lines += ["| " + " | ".join(["", *self.columns]) + " |", "|" + "---|" * (len(self.columns) + 1)]
        lines += ["| " + " | ".join([label, *cells]) + " |" for label, cells in self.rows]
        for note in self.notes:
            lines += ["", note]
        if self.summary:
            lines = [f"<details><summary>{self.summary}</summary>", "", *lines, "", "</details>"]
        return "\n".join(lines)


def mean_sd(values: Sequence[float], digits: int = 1) -> str:
    """Return mean and sample standard deviation as text.

    Example:
        >>> mean_sd([1.0, 2.0, 3.0])
        '2.0 ± 1.0'
        >>> mean_sd([-0.02])
        '0.0'
    """
    mean, deviation = spread(values)
    return f"{round(mean, digits) + 0.0:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation, which is 0 for a single value.

    Example:
        >>> spread([1.0, 2.0, 3.0])
        (2.0, 1.0)
    """
    mean = sum(values) / len(values)
    return mean, (sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)) ** 0.5


def difference(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean of paired differences and the half width of its 95 % t interval as text, with a sign.

    Example:
        >>> difference([1.0, 2.0, 3.0])
        '+2.0 ± 2.5'
        >>> difference([-0.5])
        '-0.5'
    """
    text = f"{round(spread(values)[0], digits) + 0.0:+.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {half_width(values):.{digits}f}"


def half_width(values: Sequence[float]) -> float:
    """Return the half width of the 95 % t interval of a mean, which is infinite for a single value.

    Example:
        >>> round(half_width([1.0, 2.0, 3.0]), 3), half_width([1.0])
        (2.484, inf)
    """
    if len(values) < 2:
        return math.inf
    return float(student.ppf(0.975, len(values) - 1)) * spread(values)[1] / len(values) ** 0.5
