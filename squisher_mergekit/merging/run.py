"""What a merge reports while and after it runs: where Fishers come from, what fell back, who weighed how much."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from squisher_mergekit.fisher.mapping import refuse_invalid
from squisher_mergekit.fisher.summary import kind_of
from squisher_mergekit.merging.execution import Outcome
from squisher_mergekit.merging.merge_plan import MergePlan
from squisher_mergekit.merging.rollback import Output
from squisher_mergekit.merging.sources import ModelFiles, Sources
from squisher_mergekit.merging.tensor_plan import TensorPlan

LOG = logging.getLogger("squisher_mergekit")


@dataclass
class _Sums:
    """Running sums over the entries of some tensors; the values may still lie on an accelerator."""

    entries: int = 0
    fell_back: list[int | Tensor] = field(default_factory=list)
    shares: dict[str, list[float | Tensor]] = field(default_factory=dict)

    def add(self, size: int, labels: Sequence[str], outcome: Outcome) -> None:
        self.entries += size
        self.fell_back.append(outcome.fell_back)
        for label, share in zip(labels, outcome.shares, strict=True):
            self.shares.setdefault(label, []).append(share * size)

    def report(self) -> dict[str, Any]:
        size = max(self.entries, 1)
        return {
            "entries": self.entries,
            "fell_back": sum(int(count) for count in self.fell_back) / size,
            "effective_weight": {
                label: sum(float(share) for share in shares) / size for label, shares in self.shares.items()
            },
        }


class Run:
    """One merge: its settings and its running report.

    Args:
        method: Name of the merge method.
        quiet: No log lines below warnings.
        strict: A Fisher made at other weights is an error instead of a warning.
    """

    def __init__(self, method: str, quiet: bool = False, strict: bool = False) -> None:
        self.method = method
        self.quiet = quiet
        self.strict = strict
        self.plan: MergePlan | None = None
        self.sources = Sources()
        self.models: dict[Any, ModelFiles] = {}
        # A base that a merge of single files names beside its models, kept from mergekit, which would sum it.
        self.base: Any = None
        self._planned: dict[int, tuple[object, TensorPlan]] = {}
        self.output: Output | None = None
        self._lock = threading.Lock()
        self._all = _Sums()
        self._kinds: dict[str, _Sums] = {}
        self._pending: list[tuple[Tensor, int, tuple[str, str]]] = []

    def keep(self, task: object, plan: TensorPlan) -> TensorPlan:
        """Remember the plan of a task (and the task, so that its id stays its own)."""
        self._planned[id(task)] = (task, plan)
        return plan

    def planned(self, task: object) -> TensorPlan | None:
        """Return the plan of a task, if it was planned in this run."""
        return self._planned.get(id(task), (None, None))[1]

    def record(self, name: str, labels: Sequence[str], outcome: Outcome) -> None:
        """Note the outcome of one tensor."""
        size = outcome.values.numel()
        with self._lock:
            self._all.add(size, labels, outcome)
            self._kinds.setdefault(kind_of(name), _Sums()).add(size, labels, outcome)
            self._pending += outcome.pending

    def check(self) -> None:
        """Look at what an accelerator found.

        Raises:
            ValuesError: A Fisher has NaN, infinite or negative entries.
        """
        for counts, total, label in self._pending:
            refuse_invalid(counts, total, *label)

    def report(self) -> dict[str, Any]:
        """Return what happened: overall and per kind of layer, shares of entries and mean effective weights."""
        kinds = {kind: sums.report() for kind, sums in sorted(self._kinds.items())}
        return {"method": self.method, **self._all.report(), "kinds": kinds}

    def log(self, message: str) -> None:
        """Write one log line, unless quiet."""
        if not self.quiet:
            LOG.setLevel(min(LOG.level or logging.INFO, logging.INFO))
            LOG.info(message)

    def log_summary(self) -> None:
        """Write the closing line."""
        report = self.report()
        weights = ", ".join(f"{label} {share:.1%}" for label, share in report["effective_weight"].items())
        self.log(f"{self.method}: {report['fell_back']:.2%} of the entries fell back; effective weight: {weights}")


@dataclass
class _State:
    current: Run
    strict: bool = False


_STATE = _State(Run("squisher"))


def current_run() -> Run:
    """Return the merge that is going on (mergekit runs one at a time in a process)."""
    return _STATE.current


def start_run(method: str, quiet: bool) -> Run:
    """Begin a merge and make it the current one."""
    _STATE.current = Run(method, quiet, _STATE.strict)
    return _STATE.current


@contextmanager
def strict_runs(strict: bool) -> Iterator[None]:
    """Let the merges that begin inside treat a Fisher made at other weights as an error."""
    before, _STATE.strict = _STATE.strict, strict
    try:
        yield
    finally:
        _STATE.strict = before
