"""Inputs and outcome of the merge of one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from squisher_mergekit.errors import ValuesError
from squisher_mergekit.fisher.values import refuse_invalid
from squisher_mergekit.merging import fused
from squisher_mergekit.merging.density import Trim
from squisher_mergekit.merging.votes.options import VoteOptions
from squisher_mergekit.models.weights import check_finite


@dataclass(frozen=True)
class Input:
    """One model's part in a merge.

    Attributes:
        theta: Its weight.
        fisher: Its raw Fisher, shaped alike, or None where every model has none (UBGM's base may have none on its own).
        weight: w_i.
        scale: Factor on the Fisher.
        label: Name for messages, such as ``layers.0.weight in /models/a/optimizer.pt``.
        trim: Choice of the entries that are kept; None keeps all.
        model: Name of the model for messages.
        factors: Recorded factors over rows and columns, None for a side without.
    """

    theta: Tensor
    fisher: Tensor | None
    weight: float = 1.0
    scale: float = 1.0
    label: tuple[str, str] = ("", "")
    trim: Trim | None = None
    model: str = ""
    factors: tuple[Tensor | None, Tensor | None] = (None, None)


@dataclass(frozen=True)
class Ballot:
    """Rules of the vote on one tensor.

    Attributes:
        options: The options.
        origin: theta_0; None where no option needs it.
        based: Mask (bool) of the entries that the base has, where a vocabulary was re-ordered; None for all. All models
            vote on the others, and lambda leaves them as they are.
        recorded: True to compute the Fisher of the result.
    """

    options: VoteOptions = field(default_factory=VoteOptions)
    origin: Tensor | None = None
    based: Tensor | None = None
    recorded: bool = False

    @property
    def is_plain(self) -> bool:
        """True if every model votes by its Fisher, whatever becomes of the result."""
        return self.options.power == 1 and not self.options.abstain and not self.options.elected

    @property
    def is_default(self) -> bool:
        """True if the merge is that without any option of the vote."""
        return self.is_plain and self.options.extent == 1 and not self.recorded

    @property
    def is_fused(self) -> bool:
        """True if the fused kernels know all options: the power and the election."""
        plain = self.options.extent == 1 and not self.options.abstain
        return plain and not self.recorded and self.based is None


PLAIN = Ballot()


@dataclass
class Outcome:
    """Merged tensor, and numbers for the report.

    Attributes:
        values: The merged tensor.
        shares: For each input the mean over the entries of the coefficient it entered with.
        fell_back: Number of entries where no model had information.
        pending: On an accelerator, counts of invalid entries not yet looked at, each with the number of entries and a
            label; no Fisher is held for them.
        not_finite: On an accelerator, the number of NaN and infinite entries of ``values``.
        abstained: For each input the number of entries that it does not keep; empty where all vote.
        silent: Number of entries where no model votes.
        fisher: Fisher of the result, if the ballot asks for it and the models have Fishers.
        sign_conflicts: For each input the number of kept entries that move against the elected sign; empty without an
            election, and where a fused kernel elects.
    """

    values: Tensor
    shares: list[float | Tensor]
    fell_back: int | Tensor
    pending: list[tuple[Tensor, int, tuple[str, str]]] = field(default_factory=list)
    not_finite: int | Tensor = 0
    abstained: list[int | Tensor] = field(default_factory=list)
    silent: int | Tensor = 0
    fisher: Tensor | None = None
    sign_conflicts: list[int | Tensor] = field(default_factory=list)

    def check(self, name: str = "the tensor") -> None:
        """Look at the pending counts (this waits for the accelerator).

        Raises:
            ValuesError: A Fisher has NaN, infinite or negative entries, or the merged tensor is not finite.
        """
        for counts, total, label in self.pending:
            refuse_invalid(counts, total, *label)
        self.pending = []
        fused.refuse_not_finite(name, self.not_finite)


@dataclass(frozen=True)
class Operands:
    """Tensors of a merge.

    Attributes:
        thetas: The weights.
        fishers: The Fishers, of the inputs that have one.
        labels: Name and source of each Fisher.
        work: dtype of the arithmetic.
        trims: The choice of each input's kept entries; None keeps all.
        sources: Name and model of each weight.
        ballot: Rules of the vote.
    """

    thetas: list[Tensor]
    fishers: list[Tensor]
    labels: list[tuple[str, str]]
    work: torch.dtype
    trims: list[Trim | None]
    sources: list[tuple[str, str]]
    ballot: Ballot = field(default_factory=Ballot)

    @classmethod
    def of(cls, inputs: Sequence[Input], ballot: Ballot = PLAIN) -> Operands:
        """Return the tensors of some inputs."""
        thetas = [item.theta.detach() for item in inputs]
        known = [(item.fisher.detach(), item.label) for item in inputs if item.fisher is not None]
        trims = [item.trim if item.weight > 0 else None for item in inputs]
        origins = [trim.origin for trim in trims if trim is not None]
        origins += [] if ballot.origin is None else [ballot.origin]
        double = any(t.dtype == torch.float64 for t in [*thetas, *(fisher for fisher, _ in known), *origins])
        work = torch.float64 if double else torch.float32
        sources = [(item.label[0], item.model) for item in inputs]
        return cls(thetas, [fisher for fisher, _ in known], [label for _, label in known], work, trims, sources, ballot)

    @property
    def on_accelerator(self) -> bool:
        """True if the tensors are not in the memory of the CPU."""
        return self.thetas[0].device.type != "cpu"

    @property
    def size(self) -> int:
        """Number of entries of the tensor."""
        return self.thetas[0].numel()

    def tensor(self, values: Sequence[object]) -> Tensor:
        """Return numbers as a tensor beside the weights."""
        return torch.tensor(values, dtype=self.work, device=self.thetas[0].device)

    def outcome(self, merged: fused.FusedMerge) -> Outcome:
        """Return the outcome of a fused merge."""
        pending = [(counts, self.size, label) for counts, label in zip(merged.invalid, self.labels, strict=True)]
        values = merged.values.reshape(self.thetas[0].shape)
        outcome = Outcome(values, list(merged.shares), merged.fell_back, pending, merged.not_finite)
        if self.ballot.options.elected:
            voted = sum((torch.as_tensor(share) for share in merged.shares), start=torch.zeros(()))
            outcome.silent = ((1 - voted) * self.size).round()
        return outcome

    def check_result(self, values: Tensor, part: slice) -> None:
        """Raise if a part of the merged tensor is not finite; an infinite entry that all weights share is theirs.

        Raises:
            ValuesError: The message names the model whose weights are not finite, or else the parameters.
        """
        bad = ~torch.isfinite(values)
        pieces = [theta.reshape(-1)[part][bad] for theta in self.thetas]
        if all(torch.equal(values[bad].to(piece.dtype), piece) for piece in pieces):
            return
        for theta, source in zip(self.thetas, self.sources, strict=True):
            check_finite(theta, *source)
        origins = [trim.origin for trim in self.trims if trim is not None]
        for origin in (*origins, *([] if self.ballot.origin is None else [self.ballot.origin])):
            check_finite(origin, self.sources[0][0], "the base")
        factors = "weight:, fisher_scale: or prior:" if self.ballot.options.extent == 1 else "lambda: or weight:"
        raise ValuesError(
            f"a merged tensor must be finite, but {self.sources[0][0]} leaves the range of {values.dtype} in "
            f"{int(bad.sum())} entries; give smaller {factors}, or a wider dtype:"
        )


@dataclass(frozen=True)
class VotePart:
    """Same part of all tensors of a merge, in the dtype of the arithmetic.

    Attributes:
        thetas: The weights.
        fishers: The Fishers.
        extremes: Smallest and largest entry of each Fisher; empty where unknown.
        kept: For each weight the mask of the entries that vote; None for all.
        origin: theta_0, where an option needs it.
        based: Mask of the entries that the base has; None for all.
    """

    thetas: list[Tensor]
    fishers: list[Tensor]
    extremes: list[tuple[float, float]]
    kept: list[Tensor | None]
    origin: Tensor | None = None
    based: Tensor | None = None
