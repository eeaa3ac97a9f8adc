"""Factors of an estimate: the sums of a model's matrices, and their place beside the diagonal."""

from __future__ import annotations

from torch import Tensor, nn

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.estimators.per_example.factor_sums import FactorSums
from squisher_mergekit.fisher.config import FactorsInfo, Statistic
from squisher_mergekit.fisher.factors.mapping import Side
from squisher_mergekit.fisher.factors.sides import attach, check_settings, sides_in_memory
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.tensors.sharded import is_sharded


def make_factor_sums(
    model: nn.Module, parameters: dict[nn.Parameter, str], factors: str | None, block: int
) -> FactorSums | None:
    """Return zero sums for the matrices of a model; None if no factors are asked for.

    Args:
        model: The model, without wrappers.
        parameters: Parameter -> name in memory.
        factors: ``rows``, ``columns``, ``kron`` for both, or None.
        block: Number of consecutive rows (or columns) in a block.

    Raises:
        ConfigError: ``factors`` or ``block`` is out of its range.
        UnsupportedStateError: The model is sharded.
    """
    if factors is None:
        return None
    check_settings(factors, block)
    if any(map(is_sharded, parameters)):
        raise UnsupportedStateError(
            "factors need the whole gradient of each matrix, but FSDP2 shards it; estimate without --shard"
        )
    sides = sides_in_memory(model, factors)
    return FactorSums({parameter: sides[name] for parameter, name in parameters.items() if name in sides}, block)


def attach_sums(
    fisher: Fisher,
    model: nn.Module,
    names: dict[nn.Parameter, str],
    sums: FactorSums,
    statistic: Statistic,
    num_examples: int | None,
) -> Fisher:
    """Return a Fisher with the factors of an estimate.

    Args:
        fisher: The Fisher of the estimate.
        model: The model, without wrappers.
        names: Parameter -> name in memory.
        sums: The sums, or their means.
        statistic: Statistic that they are.
        num_examples: Number of examples behind them.
    """
    moments: dict[Side, dict[str, Tensor]] = {"rows": {}, "columns": {}}
    for parameter, side, total in sums:
        if parameter not in sums.left_out:
            moments[side][names[parameter]] = total
    info = FactorsInfo(source="estimated", statistic=statistic, num_examples=num_examples)
    return attach(model, fisher, moments, info)
