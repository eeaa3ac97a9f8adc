"""Aligned text: tables, pairs of name and value, shortened lists of names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

_NAME_WIDTH = 9


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Iterator[str]:
    """Yield a table line by line.

    Args:
        head: Titles of the columns.
        rows: The cells of each row.
        left: Number of columns that are aligned to the left; the others are aligned to the right.

    Example:
        >>> print(*table(("tensor", "zeros"), [("a.weight", "5 %"), ("b", "17 %")]), sep="\\n")
        tensor    zeros
        a.weight    5 %
        b          17 %
    """
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        padded = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        yield "  ".join(padded).rstrip()


def pairs(rows: Iterable[tuple[str, object]], width: int = _NAME_WIDTH) -> Iterator[str]:
    """Yield one line for each name and value, with aligned values.

    Args:
        rows: Names and values.
        width: Least width of the names.

    Example:
        >>> print(*pairs([("kind", "squisher"), ("steps", 50)]), sep="\\n")
        kind       squisher
        steps      50
    """
    known = list(rows)
    width = max([width, *(len(name) for name, _ in known)])
    for name, value in known:
        yield f"{name:<{width}}  {value}"


def name_list(names: Sequence[str], most: int) -> str:
    """Return names on one line, at most a given number.

    Example:
        >>> name_list(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def name_lines(names: Sequence[str], most: int, indent: str, elsewhere: str) -> Iterator[str]:
    """Yield one line for each name, at most a given number.

    Args:
        names: The names.
        most: Number of names to show.
        indent: Text before each name.
        elsewhere: The place of the other names, in words.
    """
    yield from (f"{indent}{name}" for name in names[:most])
    if len(names) > most:
        yield f"{indent}and {len(names) - most} more, {elsewhere}"


def shape_text(shape: Sequence[int]) -> str:
    """Return the shape of a tensor as text.

    Example:
        >>> shape_text((13, 7)), shape_text(())
        ('13x7', 'scalar')
    """
    return "x".join(map(str, shape)) or "scalar"
