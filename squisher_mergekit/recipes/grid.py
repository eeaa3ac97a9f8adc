"""Grid of parameters of a merge: parsed from ``NAME=VALUE,...``, checked, and applied to a configuration."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.merging.parameters import Block, check_blocks

Point = Mapping[str, Any]
_MOST = 1000


def parse_grid(axes: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Parse the axes of a grid.

    Args:
        axes: Texts ``NAME=VALUE,VALUE,...``; a value is read as YAML.

    Returns:
        Name -> values, in the given order.

    Raises:
        ConfigError: A text has another form, repeats a name or a value, or the grid has too many points.

    Example:
        >>> parse_grid(["lambda=1,1.5", "consensus=none,sign"])
        {'lambda': (1, 1.5), 'consensus': ('none', 'sign')}
    """
    grid: dict[str, tuple[Any, ...]] = {}
    for axis in axes:
        name, equals, values = axis.partition("=")
        name = name.strip()
        if not equals or not name or not all(value.strip() for value in values.split(",")):
            raise ConfigError(f"--grid must have the form NAME=VALUE,VALUE,..., found {axis!r:.80}; write lambda=1,1.5")
        if name in grid:
            raise ConfigError(f"--grid must have each parameter once, but {name} is there twice; join its values")
        grid[name] = tuple(_value(value.strip(), axis) for value in values.split(","))
        if len({repr(value) for value in grid[name]}) < len(grid[name]):
            raise ConfigError(f"--grid must have each value once, found {axis!r:.80}; remove the second")
    count = math.prod(map(len, grid.values()))
    if not grid or count > _MOST:
        raise ConfigError(f"--grid must have 1 to {_MOST} points, found {count if grid else 0}; give fewer values")
    return grid


def _value(text: str, axis: str) -> Any:
    """Return a number, a flag or a word; YAML takes 1e-3 for a word."""
    try:
        value = yaml.safe_load(text)
        is_number = isinstance(value, str) and value[:1] in "+-.0123456789" and "/" not in value  # no path
        value = float(value) if is_number else value
    except (yaml.YAMLError, ValueError):
        value = None
    if not isinstance(value, str | int | float | bool):
        raise ConfigError(
            f"a value of --grid must be a number or a word, found {text!r:.80} in {axis!r:.80}; write lambda=1,1.5 or "
            "consensus=none,sign"
        )
    return value


def points(grid: Mapping[str, Iterable[Any]]) -> Iterator[dict[str, Any]]:
    """Yield the points of a grid; the last parameter changes first.

    Example:
        >>> list(points({"lambda": (1, 2), "power": (0.5,)}))
        [{'lambda': 1, 'power': 0.5}, {'lambda': 2, 'power': 0.5}]
    """
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def label(point: Point) -> str:
    """Return a point as text, which is a file name as well.

    Example:
        >>> label({"lambda": 1.5, "consensus": "sign"})
        'lambda=1.5,consensus=sign'
    """
    return ",".join(f"{name}={value}" for name, value in point.items())


def check_grid(method: str, grid: Mapping[str, Sequence[Any]]) -> None:
    """Refuse parameters and values that the merge method does not accept.

    Raises:
        ConfigError: A parameter is unknown, or a value is not accepted.
    """
    for name, values in grid.items():
        check_blocks(method, [Block("--grid", None, {name: value}) for value in values])


def with_point(document: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """Return a configuration with the parameters of a point in its top-level ``parameters:``.

    Raises:
        ConfigError: A model has a value of its own, which would win over the grid.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(document))
    for place, settings in _own_settings(document):
        for name in point:
            if name in settings:
                raise ConfigError(
                    f"a parameter of --grid must not be set for one model, but {name} is at {place}; remove it there"
                )
    changed["parameters"] = {**(changed.get("parameters") or {}), **point}
    return changed


def _own_settings(node: Any, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the ``parameters:`` blocks below the top level, with their places."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        inner = f"{place}[{key}]" if isinstance(key, int) else f"{place}.{key}".lstrip(".")
        if place and key == "parameters" and isinstance(value, Mapping):
            yield inner, value
        elif not (not place and key == "parameters"):
            yield from _own_settings(value, inner)
