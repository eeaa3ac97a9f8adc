"""How the verbs print a Fisher, and write a report beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from squisher_mergekit.fisher.config import FisherConfig
    from squisher_mergekit.fisher.mapping import Fisher

_SHOWN = 20


def config_lines(config: FisherConfig, size: str) -> Iterator[str]:
    """Say where a Fisher comes from, its steps and decay, how much of the model it covers, and its size.

    Args:
        config: The metadata.
        size: Number of tensors and bytes, in words.
    """
    optimizer, source = config.optimizer, config.source
    kind = " ".join(filter(None, (config.estimator, config.statistic, f"of the {config.parameters}")))
    yield f"kind       {kind}"
    if source.layout:
        yield f"source     {source.layout}: {', '.join(source.files)}"
    if optimizer is not None:
        yield f"optimizer  {optimizer.class_ or 'unknown class'}, beta2 {_short(optimizer.beta2)}"
    yield f"steps      {_short(config.steps)}"
    for key in ("examples_per_step", "tokens_per_step", "num_examples"):
        value = getattr(config, key)
        if value is not None:
            yield f"{key.replace('_', ' ')}  {value:g}"
    if config.mean is not None and config.norm is not None:
        yield f"debiased   mean {config.mean:.3g}, norm {config.norm:.3g}"
    yield f"size       {size}"
    yield from coverage_lines(config)


def size_of(fisher: Fisher) -> str:
    """Say how many bytes a Fisher takes, and in which encoding."""
    from squisher_mergekit.fisher.summary import human_bytes

    encoding = dict(fisher.config.encoding)
    default = encoding.pop("default", "unknown encoding")
    others = [f"{count} as {code}" for code, count in Counter(encoding.values()).items()]
    size = human_bytes(sum(fisher.info(name).nbytes for name in fisher))
    return f"{size} of {default}" + (f" ({', '.join(others)})" if others else "")


def coverage_lines(config: FisherConfig) -> Iterator[str]:
    """Say which tensors have no Fisher, reason by reason."""
    without = config.coverage.without
    yield f"coverage   {config.coverage.with_} tensors with a Fisher, {len(without)} without"
    for reason in dict.fromkeys(without.values()):
        names = [name for name, why in without.items() if why == reason]
        yield f"  {reason}:"
        yield from (f"    {name}" for name in names[:_SHOWN])
        if len(names) > _SHOWN:
            yield f"    and {len(names) - _SHOWN} more, listed under coverage in the metadata"


def _short(value: object) -> str:
    """Write a number, or a number a parameter, on one line."""
    if isinstance(value, dict):
        others = {item for name, item in value.items() if name != "default"}
        return f"{value.get('default')} (others: {', '.join(str(item) for item in sorted(others))})"
    return "unknown" if value is None else str(value)
