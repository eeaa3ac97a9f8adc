"""Monitor of a penalty that runs away: the ratio of its squared gradient to the task's."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.tensors.sharded import gathered

LOG = logging.getLogger("squisher_mergekit")
# Ratio of the squared penalty gradient to the squared task gradient above which a warning is logged. At a large lambda
# a separate average stays below 1e4, and a penalty that feeds on itself exceeds 1e8 within five tasks
# (tests/scripts/experiments/test_runaway.py).
RUNAWAY = 1e6
WINDOW = 100  # steps between two checks of the ratio


class RunawayMonitor:
    """Ratio of two sums over up to :data:`WINDOW` steps; the sums stay on their device until the ratio is read."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Reset the sums for a new task."""
        self._sums: Tensor | None = None
        self._before: float | None = None
        self._steps, self._warned = 0, False

    def note(self, penalty: Tensor, task: Tensor) -> None:
        """Add the squared norms of one step, unless the gradient has overflowed."""
        both = torch.stack([penalty, task.to(penalty.device)])
        both = torch.where(both.isfinite().all(), both, 0.0)
        self._sums = both if self._sums is None else self._sums + both
        self._steps += 1
        if self._steps == WINDOW:
            self.check()

    def ratio(self) -> float | None:
        """Return the ratio in this window, or in the last one if this window is empty; None before the first step."""
        if self._sums is None:
            return self._before
        penalty, task = self._sums.tolist()
        return float(penalty / task) if task else math.inf if penalty else 0.0

    def check(self) -> None:
        """End the window, and warn once per task if the ratio is too large."""
        self._before = ratio = self.ratio()
        if ratio is not None and ratio > RUNAWAY and not self._warned:
            self._warned = True
            LOG.warning(
                "EWC runs away: over %d steps the penalty's squared gradient is %.1e times the task's; give a smaller "
                "lambda, and a Fisher of the task's gradient alone (GradientSquares), not the optimizer's own",
                self._steps, ratio,
            )  # fmt: skip
        self._sums, self._steps = None, 0


def sum_of_squares(norms: Iterable[Tensor]) -> Tensor:
    """Return the sum of squared norms in float64; norms of sharded tensors are summed over all processes."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for norm in norms:
        groups[getattr(norm, "device_mesh", None), norm.device].append(norm)
    parts = [gathered(torch.linalg.vector_norm(torch.stack(group))).double().square() for group in groups.values()]
    if not parts:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()
