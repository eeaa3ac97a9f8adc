"""Output that several commands share: the metadata of a Fisher, progress bars, reports and pictures in files."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from squisher_mergekit.cli.tables import name_lines, pairs

if TYPE_CHECKING:
    from tqdm import tqdm

    from squisher_mergekit.fisher.config import FisherConfig
    from squisher_mergekit.fisher.mapping import Fisher

T = TypeVar("T")

_SHOWN = 20
_BAR_DELAY = 2  # seconds


def progress_bar(items: Iterable[T], label: str, quiet: bool, unit: str = "tensor") -> tqdm[T]:
    """Return the items in a progress bar, which appears after two seconds."""
    from tqdm import tqdm

    return tqdm(list(items), desc=label, unit=unit, disable=quiet, delay=_BAR_DELAY)


@contextmanager
def each_warning_once() -> Iterator[None]:
    """Let each line of the package's log through once while the block runs, which repeats its work."""
    seen: set[str] = set()

    def first_time(record: logging.LogRecord) -> bool:
        known = record.getMessage() in seen
        seen.add(record.getMessage())
        return not known

    log = logging.getLogger("squisher_mergekit")
    log.addFilter(first_time)
    try:
        yield
    finally:
        log.removeFilter(first_time)


def write_report(file: Path | None, report: object) -> None:
    """Write the report of a command as JSON, if ``--json`` was given.

    Raises:
        OutputError: The file cannot be written.
    """
    from squisher_mergekit.tensors.atomic import write_json

    if file is not None:
        write_json(file, report)


def write_picture(file: Path, png: bytes) -> None:
    """Write the picture of a command.

    Raises:
        OutputError: The file cannot be written.
    """
    from squisher_mergekit.tensors.atomic import write_whole

    write_whole(file, png)


def write_page(file: Path, page: str) -> None:
    """Write the HTML page of a command.

    Raises:
        OutputError: The file cannot be written.
    """
    from squisher_mergekit.tensors.atomic import write_whole

    write_whole(file, page.encode())


def config_lines(config: FisherConfig, size: str, factors: str = "") -> Iterator[str]:
    """Yield the kind, source, optimizer, steps, size and coverage of a Fisher as lines.

    Args:
        config: The metadata.
        size: Number of tensors and bytes, in words.
        factors: Factors, in words; empty if there are none.
    """
    optimizer, source = config.optimizer, config.source
    rows = [("kind", " ".join(filter(None, (config.estimator, config.statistic, f"of the {config.parameters}"))))]
    if source.layout:
        rows.append(("source", f"{source.layout}: {', '.join(source.files)}"))
    if optimizer is not None:
        rows.append(("optimizer", f"{optimizer.class_ or 'unknown class'}, beta2 {_short(optimizer.beta2)}"))
    rows.append(("steps", _short(config.steps)))
    for key in ("examples_per_step", "tokens_per_step", "num_examples"):
        value = getattr(config, key)
        if value is not None:
            rows.append((key.replace("_", " "), f"{value:g}"))
    if config.mean is not None and config.norm is not None:
        rows.append(("debiased", f"mean {config.mean:.3g}, norm {config.norm:.3g}"))
    without = config.coverage.without
    rows.append(("size", size))
    if factors:
        rows.append(("factors", factors))
    rows.append(("coverage", f"{config.coverage.with_} tensors with a Fisher, {len(without)} without"))
    yield from pairs(rows)
    for reason in dict.fromkeys(without.values()):
        yield f"  {reason}:"
        names = [name for name, why in without.items() if why == reason]
        yield from name_lines(names, _SHOWN, "    ", "listed under coverage in the metadata")


def factors_text(fisher: Fisher) -> str:
    """Return the factors of a Fisher in words: matrices, blocks, origin, size and error; empty without factors."""
    from squisher_mergekit.fisher.summary import human_bytes

    factors, info = fisher.factors, fisher.factors.info
    if info is None or not factors:
        return ""
    widths = {side.shape(name)[1] for side in (factors.rows, factors.columns) for name in side}
    blocks = str(max(widths)) if len(widths) == 1 else f"{min(widths)} to {max(widths)}"
    details = [f"rows of {len(factors.rows)} and columns of {len(factors.columns)} matrices in blocks of {blocks}"]
    details.append(f"{info.source} {info.statistic}")
    numbers = {"decay": info.decay, "every": info.every, "steps": info.steps, "examples": info.num_examples}
    details += [f"{key} {value:g}" for key, value in numbers.items() if value is not None]
    details.append(f"{human_bytes(factors.nbytes)}, {info.form.replace('_', ' ')}")
    if info.error is not None:
        details.append(f"relative error {info.error:.2%} (Frobenius)")
    return ", ".join(details)


def size_of(fisher: Fisher) -> str:
    """Return the bytes of a Fisher and their encodings, in words."""
    from squisher_mergekit.fisher.summary import human_bytes

    encoding = dict(fisher.config.encoding)
    default = encoding.pop("default", "unknown encoding")
    others = [f"{count} as {code}" for code, count in Counter(encoding.values()).items()]
    size = human_bytes(sum(fisher.info(name).nbytes for name in fisher))
    return f"{size} of {default}" + (f" ({', '.join(others)})" if others else "")


def _short(value: object) -> str:
    """Return a number, or a mapping with a number per parameter, on one line."""
    if isinstance(value, dict):
        others = {item for name, item in value.items() if name != "default"}
        return f"{value.get('default')} (others: {', '.join(str(item) for item in sorted(others))})"
    return "unknown" if value is None else str(value)
