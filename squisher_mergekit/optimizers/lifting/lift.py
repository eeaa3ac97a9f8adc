"""From the Fisher of a LoRA to one of the merged weights: a lifted Fisher, in row means and column means."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

import torch
from torch import Tensor

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.fisher.config import Coverage, OptimizerInfo, per_parameter
from squisher_mergekit.fisher.encoded import RankOneStore
from squisher_mergekit.fisher.files import TIED, tied_aliases
from squisher_mergekit.fisher.mapping import Fisher, rescaled
from squisher_mergekit.fisher.values import check_values
from squisher_mergekit.models.lora.pairs import AdaptedWeights, LoraAdapter, LoraPair
from squisher_mergekit.optimizers.lifting.equations import lifted_means
from squisher_mergekit.tensors.safetensors import check_shape

ESTIMATOR = "lifted_lora"
RECORDED: Final = "recorded_lora"
OF_LORAS = (ESTIMATOR, RECORDED)
"""Estimators of Fishers of the merged weights of a LoRA, in row means and column means."""
NOT_ADAPTED = "not adapted, kept as in the base"


def lift(fisher: Fisher, lora: LoraAdapter, fingerprint: bool = True) -> Fisher:
    """Return the Fisher of the merged weights ``W0 + s B A`` that follows from the Fisher of a LoRA.

    Weights that the adapter holds whole (``modules_to_save``, ``bias``) keep their exact second moments; the others are
    lifted by :func:`~.equations.lifted_means`. Values have no bias: those of the adapter's Fisher are debiased first.
    A Fisher of the merged weights, such as a recorded one, is returned unchanged.

    Args:
        fisher: The Fisher of the adapter.
        lora: The LoRA over its base; over a base of a ``config.json`` alone the Fisher has no fingerprint.
        fingerprint: False to leave out the fingerprint of the merged weights, for which each of them is computed.

    Returns:
        The Fisher, under the names of the base's weights.

    Raises:
        ConfigError: The Fisher is not of an adapter, or does not record the steps or the decay for the debiasing.
        MismatchError: A tensor of the Fisher does not have the shape of the adapter's.
        ValuesError: An entry is NaN, infinite or negative.
    """
    if fisher.config.estimator in OF_LORAS:
        return fisher
    if fisher.config.parameters != "adapter":
        raise ConfigError(
            f"lift needs the Fisher of a LoRA, but {fisher.location} is of full weights already; leave out --lift"
        )
    means = {name: _means(fisher, lora, name, pair) for name, pair in lora.pairs.items()}
    whole = {
        name: _debiased(fisher, held, lora.shape(name)).to(torch.float32)
        for name, held in lora.replaced.items()
        if held in fisher
    }
    known = {name: pair for name, pair in means.items() if pair is not None}
    store = RankOneStore(known, whole, fisher.location)
    return _described(fisher, lora, store, fingerprint)


def _described(fisher: Fisher, lora: LoraAdapter, store: RankOneStore, fingerprint: bool) -> Fisher:
    """Return a lifted Fisher with its metadata."""
    given = fisher.config
    optimizer = given.optimizer and OptimizerInfo.model_validate(
        given.optimizer.model_dump(by_alias=True)
        | {"initial_accumulator_value": None}
        | ({} if not isinstance(given.optimizer.beta2, dict) else {"beta2": None})
    )
    steps: dict[str, int] = {}
    for name in store.infos:
        counts = [given.steps_of(part) for part in _parts(lora, name) if part in fisher]
        if counts and None not in counts:
            steps[name] = min(count for count in counts if count is not None)
    lacking = fisher.config.coverage.without
    reasons = {name: lacking.get(_parts(lora, name)[0], "no second moment of its factors") for name in lora.touched}
    config = given.model_copy(
        update={
            "estimator": ESTIMATOR,
            "statistic": "ema" if given.statistic == "ema" else "mean",
            "parameters": "model",
            "optimizer": optimizer,
            "steps": per_parameter(steps) if len(steps) == len(store.infos) else None,
            "bias_corrected": True,
            "mean": None,
            "norm": None,
            "encoding": {"default": "rank1"} | {name: "float32" for name in lora.replaced if name in store.infos},
            "coverage": coverage_of(lora.base.infos or lora.names.sources, lora.names.aliases, store.infos, reasons),
            "weights_fingerprint": AdaptedWeights(lora).fingerprint if fingerprint else None,
        }
    )
    return Fisher(store, config, tied_aliases(config))


def coverage_of(
    names: Iterable[str], aliases: Mapping[str, str], covered: Collection[str], reasons: Mapping[str, str]
) -> Coverage:
    """Return the coverage of a base's weights by a Fisher of merged weights.

    Args:
        names: Names of the base's weights.
        aliases: Other name of a tied weight -> name that is saved.
        covered: Names of the weights with a Fisher.
        reasons: Name of a weight that the LoRA changes -> the reason for which it has no Fisher.
    """
    without = {alias: f"{TIED}{kept}" for alias, kept in aliases.items() if kept in covered}
    without |= {name: reasons.get(name, NOT_ADAPTED) for name in names if name not in covered and name not in without}
    return Coverage.model_validate({"with": len(covered), "without": without})


def _parts(lora: LoraAdapter, name: str) -> tuple[str, ...]:
    """Return the names in the adapter of the tensors that make a weight."""
    pair = lora.pairs.get(name)
    return (lora.replaced[name],) if pair is None else (pair.a, pair.b)


def _means(fisher: Fisher, lora: LoraAdapter, name: str, pair: LoraPair) -> tuple[Tensor, Tensor] | None:
    """Return the row means and column means of a wrapped weight as it is stored; None without second moments."""
    if pair.a not in fisher and pair.b not in fisher:
        return None
    a, b = lora.weights.read(pair.a), lora.weights.read(pair.b)
    v_a, v_b = (
        _debiased(fisher, factor, tuple(tensor.shape)) if factor in fisher else None
        for factor, tensor in ((pair.a, a), (pair.b, b))
    )
    row, col = lifted_means(a, b, v_a, v_b, pair.scale)
    for values in (row, col):
        check_values(values, name, fisher.location)
    return (col, row) if pair.transposed else (row, col)


def _debiased(fisher: Fisher, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return one tensor of a Fisher as the mean square per step, in float64."""
    raw = fisher[name]
    check_shape(name, tuple(raw.shape), shape, fisher.location)
    check_values(raw, name, fisher.location)
    return rescaled(raw, fisher.offset(name), fisher.factor(name))
