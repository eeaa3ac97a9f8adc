"""The merges in one pass over memory on an accelerator: each input is read once, the result is written once.

The shares, the entries without information and the invalid entries of the Fishers are summed in the same pass, one
number a block of entries. Nothing waits for the accelerator, and no tensor of the result's size is made beside it.
The kernels are in :mod:`.fused_kernels`, which is imported at the first use because it needs Triton.
"""

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from squisher_mergekit.errors import ValuesError
from squisher_mergekit.merging.equations import relative

MOST_MODELS = 32
BLOCK = 8192
SUMMED = 4  # Fishers of one launch of a sum

LOG = logging.getLogger("squisher_mergekit")

Kept = tuple[Tensor, Tensor]


class FusedMerge(NamedTuple):
    """A merged tensor and its sums, all on the device of the inputs.

    ``values``: the merge, flat. ``shares``: for each model the mean over the entries of its coefficient, 0 for one of
    weight 0. ``fell_back``: the number of entries without information. ``invalid``: for each Fisher, in the order in
    which they were given, how many entries are NaN, infinite and negative (three integers). ``not_finite``: the number
    of NaN and infinite entries of ``values``.
    """

    values: Tensor
    shares: Sequence[float | Tensor]
    fell_back: Tensor
    invalid: Sequence[Tensor]
    not_finite: Tensor


@dataclass(frozen=True)
class Model:
    """One model's part.

    ``theta``: its weight. ``fisher``: its Fisher up to the factor ``scale``. ``weight``: w_i; a model of weight 0 does
    not enter, only its invalid entries are counted. ``kept``: a mask (bool) of the entries to keep, and the tensor
    that stands where it is False; None keeps all.
    """

    theta: Tensor
    fisher: Tensor
    weight: float
    scale: float = 1.0
    kept: Kept | None = None


def squisher(
    models: Sequence[Model],
    work: torch.dtype,
    out_dtype: torch.dtype,
    power: float = 1.0,
    elect_from: Tensor | None = None,
) -> FusedMerge:
    """Fisher merging in one pass: :func:`.equations.squisher`.

    Args:
        models: The models; at least one weight is positive.
        work: dtype of the arithmetic, float32 or float64.
        out_dtype: dtype of the result.
        power: F_i is replaced by F_i^power; 0 gives the weighted mean.
        elect_from: theta_0, if only models are to vote that move from it in the direction of
            ``sign(sum_i w_i F_i (theta_i - theta_0))``; where that sum is 0, the result is theta_0.

    Returns:
        The merged tensor.
    """
    used = [model for model in models if model.weight > 0]
    unit = 1.0 if power == 1 else max(model.scale for model in used)
    factors = relative([model.weight * (model.scale / unit) ** power for model in used])
    return _launch(models, relative([model.weight for model in used]), factors, work, out_dtype, power, elect_from)


def ubgm_squisher(
    base: Tensor,
    base_fisher: Tensor | None,
    models: Sequence[Model],
    work: torch.dtype,
    out_dtype: torch.dtype,
    base_scale: float = 1.0,
    prior: float = 0.0,
    power: float = 1.0,
) -> FusedMerge:
    """Uncertainty-based gradient matching in one pass: :func:`.equations.ubgm_squisher`.

    A prior costs a second read of the Fishers, for their mean.

    Args:
        base: theta_0.
        base_fisher: F_0 up to ``base_scale``; None for 0. Its invalid entries are counted last.
        models: The other models; at least one weight is positive.
        work: dtype of the arithmetic, float32 or float64.
        out_dtype: dtype of the result.
        base_scale: The factor of ``base_fisher``.
        prior: d, relative to the mean over the tensor of ``F_0 + sum_i w_i F_i``.
        power: Every F is replaced by F^power; positive.

    Returns:
        The merged tensor; its shares are those of ``models``.
    """
    used = [model for model in models if model.weight > 0]
    weights = [max(model.weight, 1e-37) for model in used]
    unit = max([model.scale for model in used] + ([] if base_fisher is None else [base_scale]))
    scales = [(model.scale / unit) ** power for model in used]
    own = (base_scale / unit) ** power
    absolute = None
    if prior > 0 and base.numel():
        summed = [(model.fisher, weight * scale) for model, weight, scale in zip(used, weights, scales, strict=True)]
        summed += [] if base_fisher is None else [(base_fisher, own)]
        absolute = weighted_sum([fisher for fisher, _ in summed], [factor for _, factor in summed], power)
        absolute *= prior / base.numel()
    return _launch(
        models, weights, [*scales, own], work, out_dtype, power, base, base_fisher, prior=absolute, matched=True
    )


def weighted_sum(fishers: Sequence[Tensor], factors: Sequence[float], power: float = 1.0) -> Tensor:
    """Return ``sum_i factor_i * sum over the entries of fishers_i^power`` in float64 (0-dim), in one read of each.

    A launch sums at most ``SUMMED`` Fishers, so that few compiled kernels serve every number of models.

    Args:
        fishers: Tensors of one size, not empty.
        factors: One number each.
        power: Exponent of every entry.

    Returns:
        The sum, on the device of the Fishers.
    """
    from squisher_mergekit.merging import fused_kernels

    size, shape = fishers[0].numel(), grid(min(len(fishers), SUMMED), torch.float64)
    programs = shape.programs(size)
    starts = range(0, len(fishers), SUMMED)
    # Rows of an even length are all aligned alike; Triton compiles anew for another alignment.
    partial = torch.zeros(len(starts), programs + programs % 2, dtype=torch.float64, device=fishers[0].device)
    with _on(fishers[0].device):
        for start, row in zip(starts, partial, strict=True):
            fused_kernels.weighted_sum[(programs,)](
                tuple(fisher.contiguous() for fisher in fishers[start : start + SUMMED]),
                row,
                _numbers(factors[start : start + SUMMED], torch.float64),
                float(power),
                size,
                POWERED=power != 1,
                **shape.options(),
            )
    return partial.sum()


def refuse_not_finite(name: str, count: int | Tensor) -> None:
    """Raise if an accelerator counted NaN or infinite entries in a merged tensor.

    Raises:
        ValuesError: The count is not 0.
    """
    if int(count):
        raise ValuesError(
            f"a merged tensor must be finite, but {name} has {int(count)} NaN or infinite entries: a model's weights "
            "have some, or weight:, fisher_scale: or prior: are too large; merge without --cuda to see which"
        )


def attempt(merge: Callable[[], FusedMerge], tensors: Sequence[Tensor]) -> FusedMerge | None:
    """Run a merge of this module where it can run.

    Args:
        merge: The merge.
        tensors: The weights that it merges.

    Returns:
        Its result; None for a device that Triton does not know, for more than 32 weights, and from the first failure
        on (no Triton, no C compiler, a Triton too old), which is logged in one line.
    """
    if gave_up() or len(tensors) > MOST_MODELS or not runs_on(tensors[0].device):
        return None
    try:
        with torch.no_grad():
            return merge()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever Triton, a C compiler or an assembler have to say
        _GAVE_UP.set()
        LOG.warning(
            "the fused kernel is not usable here (%s: %s); merging by torch.compile or in eager mode, which is slower",
            type(error).__name__,
            (str(error).splitlines() or [""])[0],
        )
        return None


def gave_up() -> bool:
    """Return whether the kernels have failed in this process."""
    return _GAVE_UP.is_set()


_GAVE_UP = threading.Event()


def runs_on(device: torch.device) -> bool:
    """Return whether Triton's kernels can run on a device: a GPU, or the CPU under ``TRITON_INTERPRET=1``."""
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def _launch(
    models: Sequence[Model],
    weights: Sequence[float],
    coefficients: Sequence[float],
    work: torch.dtype,
    out_dtype: torch.dtype,
    power: float,
    base: Tensor | None,
    base_fisher: Tensor | None = None,
    prior: Tensor | None = None,
    matched: bool = False,
) -> FusedMerge:
    from squisher_mergekit.merging import fused_kernels

    used = [model for model in models if model.weight > 0]
    watched = [model for model in models if model.weight <= 0]
    choices = [model.kept for model in used if model.kept is not None]
    known = base_fisher is not None
    size, device = used[0].theta.numel(), used[0].theta.device
    shape = grid(len(used) + known, work)
    programs = shape.programs(size)
    values = torch.empty(size, dtype=out_dtype, device=device)
    sums = torch.empty(len(used) + 2, programs, dtype=torch.float64, device=device)
    invalid = torch.zeros(len(models) + known, 3, dtype=torch.int64, device=device)
    if size:
        with _on(device):
            fused_kernels.merge[(programs,)](
                tuple(model.theta.contiguous() for model in used),
                tuple(model.fisher.contiguous() for model in used),
                tuple(model.fisher.contiguous() for model in watched),
                tuple(mask.contiguous().view(torch.uint8) for mask, _ in choices),
                tuple(origin.contiguous() for _, origin in choices),
                None if base is None else base.contiguous(),
                None if base_fisher is None else base_fisher.contiguous(),
                prior,
                values,
                sums,
                invalid,
                _numbers(weights, work),
                _numbers(coefficients, work),
                float(power),
                size,
                SLOTS=_slots(used),
                MATCHED=matched,
                ELECTED=base is not None and not matched,
                POWERED=power != 1,
                WORK=fused_kernels.DTYPES[work],
                ROWS=shape.threads,
                **shape.options(),
            )
    return _read_off(models, values, sums, invalid)


def _slots(models: Sequence[Model]) -> tuple[int, ...]:
    """Return each model's place among those that have a mask, or -1."""
    places = itertools.count()
    return tuple(-1 if model.kept is None else next(places) for model in models)


def _read_off(models: Sequence[Model], values: Tensor, sums: Tensor, invalid: Tensor) -> FusedMerge:
    """Add up the programs' sums, and put the models back in order: the kernel takes those of weight 0 last."""
    *means, fell_back, not_finite = sums.sum(1).unbind()
    rows = invalid.unbind()
    if len(means) == len(models):
        return FusedMerge(values, means, fell_back, rows, not_finite)
    order = sorted(range(len(models)), key=lambda i: models[i].weight <= 0)
    place = {i: row for row, i in enumerate(order)}
    shares = [means[place[i]] if model.weight > 0 else 0.0 for i, model in enumerate(models)]
    return FusedMerge(values, shares, fell_back, [rows[place.get(i, i)] for i in range(len(rows))], not_finite)


class Grid(NamedTuple):
    """Division of a tensor: entries of a tile, tiles of a program, threads of a program."""

    tile: int
    loops: int
    threads: int = 128

    def programs(self, size: int) -> int:
        """Return how many programs a tensor of ``size`` entries takes."""
        return -(-size // (self.tile * self.loops))

    def options(self) -> dict[str, int]:
        """Return the arguments of a launch that follow from it."""
        return {"TILE": self.tile, "LOOPS": self.loops, "num_warps": self.threads // 32, "num_stages": 1}


def grid(fishers: int, work: torch.dtype) -> Grid:
    """Return the division for a number of Fishers; where many fill the registers, tiles are smaller."""
    registers = fishers * (2 if work == torch.float64 else 1)
    tile = 1024 if registers <= 9 else 512 if registers <= 17 else 256
    return Grid(tile, BLOCK // tile)


def _numbers(values: Sequence[float], work: torch.dtype) -> tuple[float, ...]:
    """Return the arguments that carry numbers: a launch rounds them to float32, so for float64 each comes in two."""
    if work != torch.float64:
        return tuple(values)
    rounded = torch.tensor(values, dtype=torch.float64, device="cpu").float().double().tolist()
    return tuple(part for value, high in zip(values, rounded, strict=True) for part in (high, value - high))


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the current one: a kernel runs there and nowhere else."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
