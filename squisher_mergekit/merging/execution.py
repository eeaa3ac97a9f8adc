"""Execution of the equations over whole tensors: in chunks on a CPU pool, in one fused kernel on an accelerator.

On the CPU the intermediate results of a chunk stay in the cache, so that a merge costs little more than touching its
inputs once. torch's own threads would spin at the end of every small operation; the pool's workers run with one
thread each, and there are as many of them as torch has threads, so that mergekit's ``-j`` keeps its meaning.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import mul
from typing import Any, TypeAlias

import torch
from torch import Tensor

from squisher_mergekit.errors import ValuesError
from squisher_mergekit.fisher.values import check_values, count_invalid, refuse_invalid
from squisher_mergekit.merging import equations, fused
from squisher_mergekit.merging.density import Trim, kept_entries
from squisher_mergekit.merging.equations import Extremes, Merged
from squisher_mergekit.merging.pool import map_parts
from squisher_mergekit.models.weights import check_finite

CHUNK = 1 << 18
COMPILE_FROM = 1 << 20

LOG = logging.getLogger("squisher_mergekit")


@dataclass(frozen=True)
class Input:
    """One model's part in a merge.

    ``theta``: its weight. ``fisher``: its raw Fisher, shaped alike, or None where every model has none (UBGM's base
    may have none on its own). ``weight``: w_i. ``scale``: factor on the Fisher. ``label``: name for messages, such as
    ``layers.0.weight in /models/a/optimizer.pt``. ``trim``: which entries of theta give way to the base's. ``model``:
    name of the model for messages. ``factors``: recorded factors over rows and columns, None for a side without.
    """

    theta: Tensor
    fisher: Tensor | None
    weight: float = 1.0
    scale: float = 1.0
    label: tuple[str, str] = ("", "")
    trim: Trim | None = None
    model: str = ""
    factors: tuple[Tensor | None, Tensor | None] = (None, None)


@dataclass
class Outcome:
    """Merged tensor, and numbers for the report.

    ``shares``: for each input the mean over the entries of the coefficient it entered with. ``pending``: on an
    accelerator, counts of invalid entries not yet looked at, each with the number of entries and a label; no Fisher is
    held for them. ``not_finite``: on an accelerator, the number of NaN and infinite entries of ``values``.
    """

    values: Tensor
    shares: list[float | Tensor]
    fell_back: int | Tensor
    pending: list[tuple[Tensor, int, tuple[str, str]]] = field(default_factory=list)
    not_finite: int | Tensor = 0

    def check(self, name: str = "the tensor") -> None:
        """Look at the pending counts (this waits for the accelerator).

        Raises:
            ValuesError: A Fisher has NaN, infinite or negative entries, or the merged tensor is not finite.
        """
        for counts, total, label in self.pending:
            refuse_invalid(counts, total, *label)
        self.pending = []
        fused.refuse_not_finite(name, self.not_finite)


def merge_squisher(inputs: Sequence[Input], out_dtype: torch.dtype) -> Outcome:
    """Fisher merging of one weight; without Fishers, the weighted mean.

    Args:
        inputs: The models; all shaped alike, on one device. At least one weight is positive.
        out_dtype: dtype of the result; the arithmetic is in float32, or float64 if an input is.

    Returns:
        The merged weight.

    Raises:
        ValuesError: A Fisher has NaN, infinite or negative entries (CPU; see ``Outcome.pending`` for accelerators).
    """
    weights = [item.weight for item in inputs]
    if any(item.fisher is None for item in inputs):
        return _mean(inputs, weights, None, out_dtype)
    scales = [item.scale for item in inputs]
    operands = _Operands.of(inputs)
    if operands.on_accelerator:
        merged = fused.attempt(lambda: fused.squisher(_models(inputs), operands.work, out_dtype), operands.thetas)
        if merged is not None:
            return operands.outcome(merged)
        used = tuple(i for i, weight in enumerate(weights) if weight > 0)
        factors = [equations.relative([part[i] for i in used]) for part in (weights, list(map(mul, weights, scales)))]
        return _run_fused(_squisher_pass, operands, used, operands.tensor(factors), len(inputs), out_dtype)

    def step(thetas: list[Tensor], fishers: list[Tensor], extremes: Extremes) -> Merged:
        return equations.squisher(thetas, fishers, weights, scales, extremes)

    return _run_chunks(step, operands, len(inputs), out_dtype)


def merge_ubgm(base: Input, inputs: Sequence[Input], prior: float, out_dtype: torch.dtype) -> Outcome:
    """Uncertainty-based gradient matching of one weight; without Fishers, base plus the weighted mean difference.

    Args:
        base: theta_0 and F_0 (None for 0); its ``weight`` is not used.
        inputs: The other models.
        prior: d, relative to the mean over the tensor of ``F_0 + sum_i w_i F_i``.
        out_dtype: dtype of the result.

    Returns:
        The merged weight; its shares are those of ``inputs``.

    Raises:
        ValuesError: A Fisher has NaN, infinite or negative entries (CPU).
    """
    weights = [item.weight for item in inputs]
    if any(item.fisher is None for item in inputs):
        return _mean(inputs, weights, base, out_dtype)
    scales = [item.scale for item in inputs]
    known = base.fisher is not None
    operands = _Operands.of([*inputs, base])
    if operands.on_accelerator:
        theta, fisher = base.theta, base.fisher
        merged = fused.attempt(
            lambda: fused.ubgm_squisher(theta, fisher, _models(inputs), operands.work, out_dtype, base.scale, prior),
            operands.thetas,
        )
        if merged is not None:
            return operands.outcome(merged)
    absolute = _absolute_prior(base, inputs, prior)
    if operands.on_accelerator:
        used = tuple(i for i, weight in enumerate(weights) if weight > 0)
        unit = max([scales[i] for i in used] + ([base.scale] if known else []))
        relative = [[weights[i] for i in used], [scales[i] / unit for i in used]]
        factors = torch.cat([operands.tensor(relative).flatten(), operands.tensor([base.scale / unit])])
        extra = torch.as_tensor(absolute, dtype=torch.float64, device=base.theta.device) / unit
        return _run_fused(_ubgm_pass, operands, used, (factors, extra, known), len(inputs), out_dtype)

    def step(thetas: list[Tensor], fishers: list[Tensor], extremes: Extremes) -> Merged:
        *others, origin = thetas
        return equations.ubgm_squisher(
            origin,
            fishers[-1] if known else None,
            others,
            fishers[: len(others)],
            weights,
            scales,
            base.scale,
            absolute,
            extremes,
        )

    return _run_chunks(step, operands, len(inputs), out_dtype)


def _absolute_prior(base: Input, inputs: Sequence[Input], prior: float) -> Tensor | float:
    """Return d in the units of the scaled Fishers, summed in float64, without waiting for an accelerator."""
    if prior == 0:
        return 0.0
    parts = [(item.fisher, item.scale * item.weight) for item in inputs] + [(base.fisher, base.scale)]
    sums = [fisher.sum(dtype=torch.float64) * factor for fisher, factor in parts if fisher is not None]
    return prior * torch.stack(sums).sum() / max(base.theta.numel(), 1)


def _mean(inputs: Sequence[Input], weights: list[float], base: Input | None, out_dtype: torch.dtype) -> Outcome:
    count = len(inputs)

    def step(thetas: list[Tensor], fishers: list[Tensor], extremes: Extremes) -> Merged:
        values = equations.weighted_mean(thetas[:count], weights, None if base is None else thetas[count])
        shares = [values.new_full((), w / sum(weights) * values.numel()) for w in weights]
        return Merged(values, shares, torch.tensor(values.numel()))

    known = [*inputs, *([] if base is None else [base])]
    bare = [Input(item.theta, None, label=item.label, model=item.model) for item in known]
    operands = _Operands.of(bare)
    if not operands.on_accelerator:
        return _run_chunks(step, operands, count, out_dtype)
    with torch.no_grad():
        merged = step([theta.to(operands.work) for theta in operands.thetas], [], [])
    shares, values = [weight / sum(weights) for weight in weights], merged.values.to(out_dtype)
    return Outcome(values, list(shares), values.numel(), not_finite=_count_not_finite(values))


@dataclass(frozen=True)
class _Operands:
    """Tensors of a merge; ``work``: dtype of the arithmetic, ``sources``: name and model of each weight."""

    thetas: list[Tensor]
    fishers: list[Tensor]
    labels: list[tuple[str, str]]
    work: torch.dtype
    trims: list[Trim | None]
    sources: list[tuple[str, str]]

    @classmethod
    def of(cls, inputs: Sequence[Input]) -> "_Operands":
        thetas = [item.theta.detach() for item in inputs]
        known = [(item.fisher.detach(), item.label) for item in inputs if item.fisher is not None]
        trims = [item.trim if item.weight > 0 else None for item in inputs]
        origins = [trim.origin for trim in trims if trim is not None]
        double = any(t.dtype == torch.float64 for t in [*thetas, *(fisher for fisher, _ in known), *origins])
        work = torch.float64 if double else torch.float32
        sources = [(item.label[0], item.model) for item in inputs]
        return cls(thetas, [fisher for fisher, _ in known], [label for _, label in known], work, trims, sources)

    @property
    def on_accelerator(self) -> bool:
        return self.thetas[0].device.type != "cpu"

    @property
    def size(self) -> int:
        return self.thetas[0].numel()

    def tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=self.work, device=self.thetas[0].device)

    def outcome(self, merged: fused.FusedMerge) -> Outcome:
        pending = [(counts, self.size, label) for counts, label in zip(merged.invalid, self.labels, strict=True)]
        values = merged.values.reshape(self.thetas[0].shape)
        return Outcome(values, list(merged.shares), merged.fell_back, pending, merged.not_finite)

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
        for trim, (name, _) in zip(self.trims, self.sources, strict=True):
            if trim is not None:
                check_finite(trim.origin, name, "the base")
        raise ValuesError(
            f"a merged tensor must be finite, but {self.sources[0][0]} leaves the range of {values.dtype} in "
            f"{int(bad.sum())} entries; give smaller weight:, fisher_scale: or prior:, or a wider dtype:"
        )


def _models(inputs: Sequence[Input]) -> list[fused.Model]:
    """Return the inputs as the fused kernel takes them; nothing waits for the choice of the kept entries."""
    trims = [item.trim if item.weight > 0 else None for item in inputs]
    return [
        fused.Model(item.theta, item.fisher, item.weight, item.scale, kept_entries(trim))
        for item, trim in zip(inputs, trims, strict=True)
        if item.fisher is not None
    ]


def _count_not_finite(values: Tensor) -> Tensor:
    return (~torch.isfinite(values)).sum()


Step = Callable[[list[Tensor], list[Tensor], Extremes], Merged]


def _run_chunks(step: Step, operands: _Operands, count: int, out_dtype: torch.dtype) -> Outcome:
    thetas = [theta.reshape(-1) for theta in operands.thetas]
    fishers = [fisher.reshape(-1) for fisher in operands.fishers]
    size, work = operands.size, operands.work
    out, limit = torch.empty(size, dtype=out_dtype), torch.finfo(out_dtype).max
    choices = map_parts(kept_entries, operands.trims, size) if any(operands.trims) else [None] * len(thetas)

    def piece(i: int, part: slice) -> Tensor:
        theta, choice = thetas[i][part].to(work), choices[i]
        return theta if choice is None else torch.where(choice[0][part], theta, choice[1][part].to(work))

    def chunk(start: int) -> tuple[list[float], int]:
        part = slice(start, min(start + CHUNK, size))
        pieces = [fisher[part].to(work) for fisher in fishers]
        extremes = [(low.item(), high.item()) for low, high in map(torch.aminmax, pieces)]
        for (low, high), fisher, label in zip(extremes, fishers, operands.labels, strict=True):
            if not (low >= 0 and high < float("inf")):
                check_values(fisher, *label)
        merged = step([piece(i, part) for i in range(len(thetas))], pieces, extremes)
        out[part] = merged.values
        lowest, highest = (end.item() for end in torch.aminmax(merged.values))
        if not (lowest >= -limit and highest <= limit):
            operands.check_result(out[part], part)
        return [float(share) for share in merged.shares], int(merged.fell_back)

    results = map_parts(chunk, range(0, size, CHUNK), size)
    shares = [sum(shares[i] for shares, _ in results) / max(size, 1) for i in range(count)]
    fell_back = sum(fell_back for _, fell_back in results)
    return Outcome(out.reshape(operands.thetas[0].shape), list(shares), fell_back)


# Values, shares, entries without information, invalid entries of each Fisher, NaN and infinite values.
_Pass: TypeAlias = tuple[Tensor, list[Tensor], Tensor, list[Tensor], Tensor]


def _outputs(merged: Merged, fishers: list[Tensor], out_dtype: torch.dtype) -> _Pass:
    values = merged.values.to(out_dtype)
    invalid = [count_invalid(fisher) for fisher in fishers]
    return values, merged.shares, merged.fell_back, invalid, _count_not_finite(values)


def _run_fused(
    function: Callable[..., _Pass],
    operands: _Operands,
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
