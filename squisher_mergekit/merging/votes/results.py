"""Result of a vote: parts of a tensor on an accelerator, its step from the base, and its Fisher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.fisher.values import count_invalid
from squisher_mergekit.merging.density import kept_entries
from squisher_mergekit.merging.equations import Merged
from squisher_mergekit.merging.fused import Kept
from squisher_mergekit.merging.inputs import Ballot, Operands, Outcome, VotePart
from squisher_mergekit.merging.votes import equations as votes

Step = Callable[[VotePart], Merged]

PART = 1 << 24  # entries; an intermediate result in float64 has 134 MB


def run_parts(step: Step, operands: Operands, count: int, out_dtype: torch.dtype, information: list[float]) -> Outcome:
    """Run a step over a tensor on an accelerator, which holds the intermediate results of one part; nothing waits."""
    size, shape = operands.size, operands.thetas[0].shape
    values = torch.empty(size, dtype=out_dtype, device=operands.thetas[0].device)
    recorded = blank_fisher(operands) if operands.ballot.recorded and information else None
    tallies = []
    with torch.no_grad():
        cut = cutter(operands, [kept_entries(trim) for trim in operands.trims])
        for start in range(0, max(size, 1), PART):
            part = slice(start, min(start + PART, size))
            pieces = cut(part)
            merged = step(pieces)
            if recorded is not None:
                record(recorded[part], pieces, merged, information)
            values[part] = extended(merged.values, pieces, operands.ballot)
            tallies.append(
                (merged.shares, [merged.fell_back], merged.abstained, [merged.silent], merged.sign_conflicts)
            )
    shares, fell_back, abstained, silent, conflicts = (_totals(columns) for columns in zip(*tallies, strict=True))
    invalid = [count_invalid(fisher) for fisher in operands.fishers]
    return Outcome(
        values.reshape(shape),
        [share / max(size, 1) for share in shares],
        fell_back[0],
        [(counts, size, label) for counts, label in zip(invalid, operands.labels, strict=True)],
        count_not_finite(values),
        abstained=abstained,
        silent=silent[0],
        fisher=None if recorded is None else recorded.reshape(shape),
        sign_conflicts=conflicts,
    )


def cutter(operands: Operands, choices: Sequence[Kept | None]) -> Callable[[slice], VotePart]:
    """Return a function from a part of the flat tensors to its pieces, in the dtype of the arithmetic.

    Args:
        operands: The tensors.
        choices: For each weight, flat, the mask of its kept entries and the values of the others; None keeps all.
    """
    work, abstain = operands.work, operands.ballot.options.abstain
    thetas, fishers = ([tensor.reshape(-1) for tensor in tensors] for tensors in (operands.thetas, operands.fishers))
    rules = (operands.ballot.origin, operands.ballot.based)
    origin, based = (None if tensor is None else tensor.reshape(-1) for tensor in rules)

    def weight(i: int, part: slice) -> Tensor:
        theta, choice = thetas[i][part].to(work), choices[i]
        if choice is None or abstain:
            return theta
        return torch.where(choice[0][part], theta, choice[1][part].to(work))

    def cut(part: slice) -> VotePart:
        return VotePart(
            [weight(i, part) for i in range(len(thetas))],
            [fisher[part].to(work) for fisher in fishers],
            [],
            [None if choice is None or not abstain else choice[0][part] for choice in choices],
            None if origin is None else origin[part].to(work),
            None if based is None else based[part],
        )

    return cut


def _totals(parts: Sequence[Sequence[Tensor]]) -> list[Any]:
    """Return the sum over the parts of each number."""
    return [sum(column[1:], start=column[0]) for column in zip(*parts, strict=True)]


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
