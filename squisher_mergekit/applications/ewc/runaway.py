"""Watch a penalty that may run away: its squared gradient beside the task's."""

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
# Squared penalty gradient by squared task gradient, above which a warning is given. At a large lambda a separate
# average stays below 1e4, and a penalty that feeds on itself passes 1e8 within five tasks (tests/scripts/test_ewc.py).
RUNAWAY = 1e6
WINDOW = 100  # steps between two looks at that ratio


class Watch:
    """The ratio of two sums over up to :data:`WINDOW` steps, kept on their device until it is asked for."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin with a new task."""
        self._sums: Tensor | None = None
        self._before: float | None = None
        self._steps, self._warned = 0, False

    def note(self, penalty: Tensor, task: Tensor) -> None:
        """Take in the squared norms of one step, unless the gradient has overflowed."""
        both = torch.stack([penalty, task.to(penalty.device)])
        both = torch.where(both.isfinite().all(), both, 0.0)
        self._sums = both if self._sums is None else self._sums + both
        self._steps += 1
        if self._steps == WINDOW:
            self.look()

    def ratio(self) -> float | None:
        """Return the ratio in this window, in the one before if this has not begun; None if none has."""
        if self._sums is None:
            return self._before
        penalty, task = self._sums.tolist()
        return float(penalty / task) if task else math.inf if penalty else 0.0

    def look(self) -> None:
        """End the window, and warn once if the ratio is too large."""
        self._before = ratio = self.ratio()
        if ratio is not None and ratio > RUNAWAY and not self._warned:
            self._warned = True
            LOG.warning(
                "EWC runs away: over %d steps the penalty's squared gradient is %.1e times the task's; give a smaller "
                "lambda, and a Fisher of the task's gradient alone (GradientSquares), not the optimizer's own",
                self._steps, ratio,
            )  # fmt: skip
        self._sums, self._steps = None, 0


def squared(norms: Iterable[Tensor]) -> Tensor:
    """Return the sum of squares of norms, in float64; of sharded tensors over all processes."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for norm in norms:
        groups[getattr(norm, "device_mesh", None), norm.device].append(norm)
    parts = [gathered(torch.linalg.vector_norm(torch.stack(group))).double().square() for group in groups.values()]
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()
