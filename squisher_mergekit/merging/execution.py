"""Execution of the equations over whole tensors: in chunks on a CPU pool, in one fused kernel on an accelerator.

On the CPU the intermediate results of a chunk stay in the cache, so that a merge costs little more than touching its
inputs once. torch's own threads would spin at the end of every small operation; the pool's workers run with one
thread each, and there are as many of them as torch has threads, so that mergekit's ``-j`` keeps its meaning.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import mul
from typing import Any, TypeAlias

import torch
from torch import Tensor

from squisher_mergekit.fisher.values import check_values, count_invalid
from squisher_mergekit.merging import equations, fused
from squisher_mergekit.merging.density import kept_entries
from squisher_mergekit.merging.equations import Merged
from squisher_mergekit.merging.inputs import PLAIN, Ballot, Input, Operands, Outcome, VotePart
from squisher_mergekit.merging.pool import map_parts
from squisher_mergekit.merging.votes import equations as votes
from squisher_mergekit.merging.votes.prior import absolute_prior, powered_prior
from squisher_mergekit.merging.votes.results import (
    Step,
    blank_fisher,
    count_not_finite,
    cutter,
    extended,
    record,
    run_parts,
)

CHUNK = 1 << 18
COMPILE_FROM = 1 << 20

LOG = logging.getLogger("squisher_mergekit")


def merge_squisher(inputs: Sequence[Input], out_dtype: torch.dtype, ballot: Ballot = PLAIN) -> Outcome:
    """Fisher merging of one weight; without Fishers, the weighted mean.

    Args:
        inputs: The models; all shaped alike, on one device. At least one weight is positive.
        out_dtype: dtype of the result; the arithmetic is in float32, or float64 if an input is.
        ballot: Rules of the vote.

    Returns:
        The merged weight.

    Raises:
        ValuesError: A Fisher has NaN, infinite or negative entries (CPU; see ``Outcome.pending`` for accelerators).
    """
    weights = [item.weight for item in inputs]
    if any(item.fisher is None for item in inputs):
        return _mean(inputs, weights, None, out_dtype, ballot)
    scales = [item.scale for item in inputs]
    operands, power = Operands.of(inputs, ballot), ballot.options.power

    def step(pieces: VotePart) -> Merged:
        if ballot.is_plain:
            return equations.squisher(pieces.thetas, pieces.fishers, weights, scales, pieces.extremes)
        if pieces.origin is None:
            return votes.powered_mean(pieces.thetas, pieces.fishers, weights, scales, power)
        return votes.voted_mean(
            pieces.thetas,
            pieces.fishers,
            weights,
            scales,
            pieces.origin,
            kept=pieces.kept,
            power=power,
            elected=ballot.options.elected,
            based=pieces.based,
            extremes=pieces.extremes,
        )

    information = list(map(mul, weights, scales))
    if not operands.on_accelerator:
        return _run_chunks(step, operands, len(inputs), out_dtype, information)
    start = ballot.origin if ballot.options.elected else None
    merged = None
    if ballot.is_fused:
        merged = fused.attempt(
            lambda: fused.squisher(_models(inputs), operands.work, out_dtype, power, start), operands.thetas
        )
    if merged is not None:
        return operands.outcome(merged)
    if not ballot.is_default:
        return run_parts(step, operands, len(inputs), out_dtype, information)
    used = tuple(i for i, weight in enumerate(weights) if weight > 0)
    factors = [equations.relative([part[i] for i in used]) for part in (weights, information)]
    return _run_fused(_squisher_pass, operands, used, operands.tensor(factors), len(inputs), out_dtype)


def merge_ubgm(
    base: Input, inputs: Sequence[Input], prior: float, out_dtype: torch.dtype, ballot: Ballot = PLAIN
) -> Outcome:
    """Uncertainty-based gradient matching of one weight; without Fishers, base plus the weighted mean difference.

    Args:
        base: theta_0 and F_0 (None for 0); its ``weight`` is not used.
        inputs: The other models.
        prior: d, relative to the mean over the tensor of ``F_0 + sum_i w_i F_i``.
        out_dtype: dtype of the result.
        ballot: Rules of the vote: power and abstention.

    Returns:
        The merged weight; its shares are those of ``inputs``.

    Raises:
        ValuesError: A Fisher has NaN, infinite or negative entries (CPU).
    """
    weights = [item.weight for item in inputs]
    if any(item.fisher is None for item in inputs):
        return _mean(inputs, weights, base, out_dtype, ballot)
    scales = [item.scale for item in inputs]
    known = base.fisher is not None
    operands = Operands.of([*inputs, base], ballot)
    power = ballot.options.power
    if ballot.is_fused and power > 0 and operands.on_accelerator:
        theta, fisher = base.theta, base.fisher
        models, work = _models(inputs), operands.work
        merged = fused.attempt(
            lambda: fused.ubgm_squisher(theta, fisher, models, work, out_dtype, base.scale, prior, power),
            operands.thetas,
        )
        if merged is not None:
            return operands.outcome(merged)
    unit = max([item.scale for item in inputs if item.weight > 0] + ([base.scale] if known else []))
    absolute = absolute_prior(base, inputs, prior) if power == 1 else powered_prior(base, inputs, prior, power, unit)
    if ballot.is_default and operands.on_accelerator:
        used = tuple(i for i, weight in enumerate(weights) if weight > 0)
        relative = [[weights[i] for i in used], [scales[i] / unit for i in used]]
        factors = torch.cat([operands.tensor(relative).flatten(), operands.tensor([base.scale / unit])])
        extra = torch.as_tensor(absolute, dtype=torch.float64, device=base.theta.device) / unit
        return _run_fused(_ubgm_pass, operands, used, (factors, extra, known), len(inputs), out_dtype)

    def step(pieces: VotePart) -> Merged:
        *others, origin = pieces.thetas
        own, fishers = pieces.fishers[-1] if known else None, pieces.fishers[: len(others)]
        if ballot.is_plain:
            return equations.ubgm_squisher(
                origin, own, others, fishers, weights, scales, base.scale, absolute, pieces.extremes
            )
        relative = absolute / unit if power == 1 else absolute
        return votes.voted_step(
            origin, own, others, fishers, weights, scales, base.scale, kept=pieces.kept, power=power, prior=relative
        )

    information = [*map(mul, weights, scales), *([base.scale] if known else [])]
    run = run_parts if operands.on_accelerator else _run_chunks
    return run(step, operands, len(inputs), out_dtype, information)


def _mean(
    inputs: Sequence[Input], weights: list[float], base: Input | None, out_dtype: torch.dtype, ballot: Ballot
) -> Outcome:
    count = len(inputs)

    def step(pieces: VotePart) -> Merged:
        origin = None if base is None else pieces.thetas[count]
        values = equations.weighted_mean(pieces.thetas[:count], weights, origin)
        shares = [values.new_full((), w / sum(weights) * values.numel()) for w in weights]
        return Merged(values, shares, torch.tensor(values.numel()))

    known = [*inputs, *([] if base is None else [base])]
    bare = [Input(item.theta, None, label=item.label, model=item.model) for item in known]
    operands = Operands.of(bare, ballot)
    if not operands.on_accelerator:
        return _run_chunks(step, operands, count, out_dtype, [])
    return run_parts(step, operands, count, out_dtype, [])


def _models(inputs: Sequence[Input]) -> list[fused.Model]:
    """Return the inputs as the fused kernel takes them; nothing waits for the choice of the kept entries."""
    trims = [item.trim if item.weight > 0 else None for item in inputs]
    return [
        fused.Model(item.theta, item.fisher, item.weight, item.scale, kept_entries(trim))
        for item, trim in zip(inputs, trims, strict=True)
        if item.fisher is not None
    ]


def _run_chunks(
    step: Step, operands: Operands, count: int, out_dtype: torch.dtype, information: list[float]
) -> Outcome:
    """Run a step over chunks on the pool; ``information``: factor of each Fisher in the Fisher of the result."""
    size, ballot = operands.size, operands.ballot
    shape = operands.thetas[0].shape
    if not size:
        empty = blank_fisher(operands).reshape(shape) if ballot.recorded and information else None
        return Outcome(torch.empty(shape, dtype=out_dtype), [0.0] * count, 0, fisher=empty)
    out, limit = torch.empty(size, dtype=out_dtype), torch.finfo(out_dtype).max
    choices = map_parts(kept_entries, operands.trims, size) if any(operands.trims) else [None] * len(operands.thetas)
    recorded = blank_fisher(operands) if ballot.recorded and information else None
    cut = cutter(operands, choices)

    def chunk(start: int) -> tuple[list[float], list[int]]:
        part = slice(start, min(start + CHUNK, size))
        pieces = cut(part)
        extremes = [(low.item(), high.item()) for low, high in map(torch.aminmax, pieces.fishers)]
        for (low, high), fisher, label in zip(extremes, operands.fishers, operands.labels, strict=True):
            if not (low >= 0 and high < float("inf")):
                check_values(fisher.reshape(-1), *label)
        pieces = replace(pieces, extremes=extremes)
        merged = step(pieces)
        if recorded is not None:
            record(recorded[part], pieces, merged, information)
        values = extended(merged.values, pieces, ballot)
        out[part] = values
        lowest, highest = (end.item() for end in torch.aminmax(values))
        if not (lowest >= -limit and highest <= limit):
            operands.check_result(out[part], part)
        counts = [merged.fell_back, merged.silent, *merged.abstained, *merged.sign_conflicts]
        return [float(share) for share in merged.shares], [int(number) for number in counts]

    results = map_parts(chunk, range(0, size, CHUNK), size)
    shares = [sum(shares[i] for shares, _ in results) / size for i in range(count)]
    fell_back, silent, *rest = (sum(column) for column in zip(*(counts for _, counts in results), strict=True))
    fisher = None if recorded is None else recorded.reshape(shape)
    abstained, conflicts = rest[:count], rest[count:]
    return Outcome(out.reshape(shape), list(shares), fell_back, [], 0, list(abstained), silent, fisher, list(conflicts))


# Values, shares, entries without information, invalid entries of each Fisher, NaN and infinite values.
_Pass: TypeAlias = tuple[Tensor, list[Tensor], Tensor, list[Tensor], Tensor]


def _outputs(merged: Merged, fishers: list[Tensor], out_dtype: torch.dtype) -> _Pass:
    values = merged.values.to(out_dtype)
    invalid = [count_invalid(fisher) for fisher in fishers]
    return values, merged.shares, merged.fell_back, invalid, count_not_finite(values)


def _run_fused(
    function: Callable[..., _Pass],
    operands: Operands,
    used: tuple[int, ...],
    factors: object,
    count: int,
    out_dtype: torch.dtype,
) -> Outcome:
    """Run a pass over flattened tensors; nothing here waits for the accelerator."""
    shape = operands.thetas[0].shape
    thetas = [theta.reshape(-1) for theta in operands.thetas]
    fishers = [fisher.reshape(-1) for fisher in operands.fishers]
    with torch.no_grad():
        for i, trim in enumerate(operands.trims):
            if (choice := kept_entries(trim)) is not None:
                thetas[i] = torch.where(choice[0], thetas[i], choice[1])
        run = compiled(function, operands.size)
        values, sums, fell_back, bad, not_finite = run(thetas, fishers, used, factors, operands.work, out_dtype)
    shares: list[float | Tensor] = [0.0] * count
    for i, total in zip(used, sums, strict=True):
        shares[i] = total / max(operands.size, 1)
    pending = [(counts, operands.size, label) for counts, label in zip(bad, operands.labels, strict=True)]
    return Outcome(values.reshape(shape), shares, fell_back, pending, not_finite)


# The two passes take their factors as tensors: a compiled pass then serves every layer, whatever its weights.
def _squisher_pass(
    thetas: list[Tensor],
    fishers: list[Tensor],
    used: tuple[int, ...],
    factors: Tensor,
    work: torch.dtype,
    out_dtype: torch.dtype,
) -> _Pass:
    wide = [theta.to(work) for theta in thetas]
    merged = equations.fisher_mean(
        [wide[i] for i in used], [fishers[i].to(work) for i in used], list(factors[0]), list(factors[1]), False
    )
    return _outputs(merged, fishers, out_dtype)


def _ubgm_pass(
    thetas: list[Tensor],
    fishers: list[Tensor],
    used: tuple[int, ...],
    factors: tuple[Tensor, Tensor, bool],
    work: torch.dtype,
    out_dtype: torch.dtype,
) -> _Pass:
    numbers, prior, known = factors
    n = len(used)
    merged = equations.matched_step(
        thetas[-1].to(work),
        fishers[-1].to(work) if known else None,
        [thetas[i].to(work) for i in used],
        [fishers[i].to(work) for i in used],
        list(numbers[:n]),
        list(numbers[n : 2 * n]),
        numbers[2 * n],
        prior,
        False,
    )
    return _outputs(merged, fishers, out_dtype)


_COMPILED: dict[Callable[..., Any], Callable[..., Any]] = {}
_COMPILER_MISSING = threading.Event()


def compiled(function: Callable[..., Any], size: int) -> Callable[..., Any]:
    """Return ``function`` compiled into one pass where that pays; eager where small or where no compiler is found."""
    if size < COMPILE_FROM or _COMPILER_MISSING.is_set():
        return function
    if function not in _COMPILED:
        _COMPILED[function] = torch.compile(function, dynamic=True)
    fast = _COMPILED[function]

    def attempt(*arguments: Any) -> Any:
        try:
            return fast(*arguments)
        except (RuntimeError, ImportError, OSError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            _COMPILER_MISSING.set()
            if not fused.gave_up():
                LOG.warning("torch.compile is not usable here (%s); merging in eager mode", type(error).__name__)
            return function(*arguments)

    return attempt
