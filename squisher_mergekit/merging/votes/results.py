"""Result of a vote: a whole tensor on an accelerator, its step from the base, and its Fisher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from squisher_mergekit.fisher.values import count_invalid
from squisher_mergekit.merging.density import kept_entries
from squisher_mergekit.merging.equations import Merged
from squisher_mergekit.merging.inputs import Ballot, Operands, Outcome, VotePart
from squisher_mergekit.merging.votes import equations as votes

Step = Callable[[VotePart], Merged]


def run_whole(step: Step, operands: Operands, count: int, out_dtype: torch.dtype, information: list[float]) -> Outcome:
    """Run a step over whole tensors on an accelerator; nothing here waits for it."""
    ballot, work = operands.ballot, operands.work
    with torch.no_grad():
        choices = [kept_entries(trim) for trim in operands.trims]
        masks = [None if choice is None else choice[0].reshape(operands.thetas[0].shape) for choice in choices]
        thetas = [
            theta if mask is None or trim is None or ballot.options.abstain else torch.where(mask, theta, trim.origin)
            for theta, mask, trim in zip(operands.thetas, masks, operands.trims, strict=True)
        ]
        cut = VotePart(
            [theta.to(work) for theta in thetas],
            [fisher.to(work) for fisher in operands.fishers],
            [],
            masks if ballot.options.abstain else [None] * len(masks),
            None if ballot.origin is None else ballot.origin.to(work),
            ballot.based,
        )
        merged = step(cut)
        recorded = blank_fisher(operands) if ballot.recorded and information else None
        if recorded is not None:
            record(recorded, cut, merged, information)
        values = extended(merged.values, cut, ballot).to(out_dtype)
    size, shape = operands.size, operands.thetas[0].shape
    invalid = [count_invalid(fisher) for fisher in operands.fishers]
    pending = [(counts, size, label) for counts, label in zip(invalid, operands.labels, strict=True)]
    shares: list[float | Tensor] = [share / max(size, 1) for share in merged.shares]
    fisher = None if recorded is None else recorded.reshape(shape)
    return Outcome(
        values,
        shares,
        merged.fell_back,
        pending,
        count_not_finite(values),
        abstained=list(merged.abstained),
        silent=merged.silent,
        fisher=fisher,
        sign_conflicts=list(merged.sign_conflicts),
    )


def extended(values: Tensor, pieces: VotePart, ballot: Ballot) -> Tensor:
    """Return the result after its step from the base was multiplied by lambda."""
    if ballot.options.extent == 1 or pieces.origin is None:
        return values
    result = votes.extended(pieces.origin, values, ballot.options.extent)
    return result if pieces.based is None else torch.where(pieces.based, result, values)


def blank_fisher(operands: Operands) -> Tensor:
    """Return an empty, flat tensor for the Fisher of the result."""
    return torch.empty(operands.size, dtype=torch.float32, device=operands.thetas[0].device)


def record(recorded: Tensor, pieces: VotePart, merged: Merged, factors: list[float]) -> None:
    """Write ``sum_i w_i F_i`` over the voters into ``recorded``."""
    voted = [*merged.voted, *([None] * (len(factors) - len(merged.voted)))]
    total = votes.information(pieces.fishers, factors, voted)
    if total is not None:
        recorded.copy_(total.reshape(-1))


def count_not_finite(values: Tensor) -> Tensor:
    """Return the number of NaN and infinite entries."""
    return (~torch.isfinite(values)).sum()
