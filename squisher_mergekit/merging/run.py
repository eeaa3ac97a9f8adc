"""One merge: its settings, the Fishers it holds open, its plan, and its report."""

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.fisher.summary import by_number, kind_of, layer_of
from squisher_mergekit.fisher.values import refuse_invalid
from squisher_mergekit.fisher.write import fisher_files
from squisher_mergekit.merging.coupling.execution import CoupledOutcome
from squisher_mergekit.merging.coupling.report import StepReport, structure_report
from squisher_mergekit.merging.fused import refuse_not_finite
from squisher_mergekit.merging.inputs import Outcome
from squisher_mergekit.merging.merge_plan import MergePlan, describe_model
from squisher_mergekit.merging.merged_fisher.written import MergedFisher
from squisher_mergekit.merging.planning.file_ranges import ranges_of
from squisher_mergekit.merging.reports.totals import Totals, blank_text
from squisher_mergekit.merging.sources import FisherSources, ModelFiles
from squisher_mergekit.merging.votes.threshold import Choice
from squisher_mergekit.models.layouts import MatrixLayout
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.tensors.read_ahead import SWITCH, ReadAhead, budget_of

LOG = logging.getLogger("squisher_mergekit")


class Run:
    """One merge, from its plan to its report; it owns the open Fishers and the plan until :meth:`close`.

    Args:
        method: Name of the merge method.
        quiet: Write no log lines below warnings.
        strict: Refuse a Fisher made at other weights, instead of a warning.
        allow_missing: Write the model without tensors that the merge would lose, with a warning.
        reported: Compute the figures of a structure as well, for a report that somebody reads.
        sources: Open Fishers to share with other runs, which the caller closes; by default those of this run.

    Attributes:
        sources: The open Fishers.
        opened: Weights whose headers are read, by folder.
        models: Files of each model, by mergekit's reference to it.
        layouts: Layouts of each model's matrices, where a structure needs them.
        plan: The plan, while the merge is under way.
        preview: The plan as plain data, see :meth:`MergePlan.as_dict`.
        trimmed: Name, trimmed models, number of entries and task of each tensor with models of one threshold.
        densities: Model -> share that it keeps above its one threshold.
    """

    def __init__(
        self,
        method: str,
        quiet: bool = False,
        strict: bool = False,
        allow_missing: bool = False,
        reported: bool = False,
        sources: FisherSources | None = None,
    ) -> None:
        self.method = method
        self.quiet = quiet
        self.strict = strict
        self.allow_missing = allow_missing
        self.reported = reported
        self.sources = FisherSources() if sources is None else sources
        self._owns_sources = sources is None
        self.opened: dict[Path, Weights] = {}
        self.models: dict[Any, ModelFiles] = {}
        self.layouts: dict[Any, dict[str, MatrixLayout]] = {}
        self.plan: MergePlan | None = None
        self.preview: dict[str, Any] | None = None
        self.trimmed: list[tuple[str, frozenset[Any], int, Any]] = []
        self.densities: dict[Any, float] = {}
        self._lock = threading.Lock()
        self._written: MergedFisher | None = None
        self._ahead: ReadAhead | None = None
        self._step_of: dict[str, int] = {}
        self._averaged: frozenset[str] = frozenset()
        self._kept: dict[str, dict[str, list[int]]] = {}
        self._tensors: dict[str, Totals] = {}
        self._steps: dict[str, tuple[Sequence[str], StepReport]] = {}
        self._pending: list[tuple[Tensor, int, tuple[str, str]]] = []
        self._not_finite: list[tuple[str, int | Tensor]] = []

    def __reduce__(self) -> tuple[type["Run"], tuple[str, bool, bool]]:
        # A copy in another process has a report of its own, and opens the Fishers itself.
        return Run, (self.method, self.quiet, self.strict)

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, plan: MergePlan) -> None:
        """Accept a checked plan: keep it, and log the source of each model's Fisher.

        Raises:
            MismatchError: A Fisher was made at other weights, and the run is strict.
        """
        self.plan = plan
        self._averaged = frozenset(tensor.name for tensor in plan.tensors if tensor.missing)
        for warning in plan.warnings():
            if self.strict:
                raise MismatchError(f"{warning}; merge without --strict if that is meant")
            LOG.warning(warning)
        self.preview = plan.as_dict()
        for note in self.preview["notes"]:
            self.log(f"{self.method}: {note}")
        for model in self.preview["models"]:
            self.log(f"{self.method}: {model['model']}: {describe_model(model)}")

    def close(self) -> None:
        """Release the Fishers, their file mappings and the plan; the report and the preview stay."""
        if self._owns_sources:
            self.sources.close()
        self.opened.clear()
        self.models.clear()
        self.layouts.clear()
        self.trimmed.clear()
        self.plan = None

    def obsolete(self, out: Path) -> Iterable[Path]:
        """Return the files of an earlier Fisher in the output folder that the Fisher of the result replaces."""
        return fisher_files(out) if self._writes_fisher else ()

    @property
    def _writes_fisher(self) -> bool:
        return self.plan is not None and any(tensor.settings.write_fisher for tensor in self.plan.tensors)

    @contextlib.contextmanager
    def writing(self, folder: Path | None) -> Iterator[None]:
        """Write the Fisher of the result into a folder while the block runs, if the merge asks for it."""
        if folder is None or self.plan is None or not self._writes_fisher:
            yield
            return
        versions = {name: version(name) for name in ("squisher-mergekit", "mergekit")}
        self._written = MergedFisher(folder, self.plan.tensors, versions)
        with self._written.stream:
            yield
            config = self._written.finish()
        self._written = None
        self.log(f"{self.method}: wrote the Fisher of the result, {config.coverage.with_} tensors")

    @contextlib.contextmanager
    def reading_ahead(self, names: Sequence[str]) -> Iterator[None]:
        """Read the files ahead of the merge while the block runs.

        Args:
            names: Names of the merged tensors, in the order of their merges.
        """
        plans = {} if self.plan is None else {tensor.name: tensor for tensor in self.plan.tensors}
        steps = [ranges_of(plans[name]) if name in plans else [] for name in names]
        self._step_of = {name: step for step, name in enumerate(names)}
        with ReadAhead(steps, budget_of(os.environ.get(SWITCH))) as self._ahead:
            yield
        self._ahead = None

    def reached(self, name: str) -> None:
        """Note that the merge of a tensor begins."""
        if self._ahead is not None and name in self._step_of:
            self._ahead.reached(self._step_of[name])

    def record_choices(self, choices: Mapping[str, Mapping[str, Choice]]) -> None:
        """Add the share of each layer above the threshold of a whole model to the report, and log a line a model."""
        for label, found in choices.items():
            layers = self._kept.setdefault(label, {})
            for name, choice in found.items():
                kept, size = layers.get(layer_of(name), [0, 0])
                layers[layer_of(name)] = [kept + choice.kept, size + choice.size]
            shares = {layer: kept / max(size, 1) for layer, (kept, size) in layers.items()}
            least, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
            self.log(
                f"{self.method}: {label}: one threshold keeps {sum(kept for kept, _ in layers.values()):,} entries, "
                f"from {shares[least]:.2%} of {least} to {shares[most]:.2%} of {most}"
            )

    def record(self, name: str, labels: Sequence[str], outcome: Outcome) -> None:
        """Add the outcome of one tensor to the report."""
        size = outcome.values.numel()
        if self._written is not None and outcome.fisher is not None:
            self._written.add(name, outcome.fisher)
            outcome.fisher = None
        with self._lock:
            self._tensors.setdefault(name, Totals()).add(size, labels, outcome)
            if isinstance(outcome, CoupledOutcome) and outcome.report is not None:
                self._steps[name] = labels, outcome.report
            self._pending += outcome.pending
            self._not_finite.append((name, outcome.not_finite))

    def check(self) -> None:
        """Check the counts of invalid entries that an accelerator has not reported yet.

        Raises:
            ValuesError: A Fisher has NaN, infinite or negative entries, or a merged tensor is not finite.
        """
        for counts, total, label in self._pending:
            refuse_invalid(counts, total, *label)
        for name, count in self._not_finite:
            refuse_not_finite(name, count)

    def report(self) -> dict[str, Any]:
        """Return shares of entries and mean effective weights, overall, per kind of layer and per tensor.

        The weights are means over the entries where a model votes. Where models can be without a vote, ``abstained``
        has the share of entries that each does not keep, ``sign_conflicts`` that of its kept entries that move against
        the elected sign, and ``silent`` the share of entries without any vote.

        ``fell_back`` is the share of the entries that no Fisher weighs, ``without_fisher`` that in tensors without one.
        ``kept`` has, for each model with one threshold, the share of the entries of each layer above it.
        With ``reported``, ``structure`` is the report of the coupled matrices, see :func:`structure_report`.
        """
        kinds: dict[str, list[Totals]] = {}
        for name, totals in self._tensors.items():
            kinds.setdefault(kind_of(name), []).append(totals)
        plan = (
            {key: self.preview[key] for key in ("tensors", "whole", "lost", "uncoupled", "notes")}
            if self.preview
            else {}
        )
        structure = {"structure": structure_report(self._steps)} if self._steps else {}
        kept = {
            label: {layer: count / max(size, 1) for layer, (count, size) in layers.items()}
            for label, layers in self._kept.items()
        }
        structure |= {"kept": kept} if kept else {}
        every = Totals.joined(self._tensors.values())
        averaged = sum(totals.blank() for name, totals in self._tensors.items() if name in self._averaged)
        return {
            "method": self.method,
            **every.report(),
            "without_fisher": averaged / max(every.entries, 1),
            **plan,
            "kinds": {kind: Totals.joined(parts).report() for kind, parts in sorted(kinds.items())},
            "by_tensor": {name: self._tensors[name].report() for name in sorted(self._tensors, key=by_number)},
            **structure,
        }

    def log(self, message: str) -> None:
        """Write one log line, unless quiet; the logger's level is the same before and after."""
        if self.quiet:
            return
        level = LOG.level
        # Stock commands set the root logger to WARNING. A level that somebody gave our own logger is kept.
        LOG.setLevel(level or logging.INFO)
        try:
            LOG.info(message)
        finally:
            LOG.setLevel(level)

    def log_summary(self) -> None:
        """Log the closing line."""
        report = self.report()
        weights = ", ".join(f"{label} {share:.1%}" for label, share in report["effective_weight"].items())
        silent = f"; {report['silent']:.2%} without a vote: base value" if report.get("silent") else ""
        self.log(f"{self.method}: {blank_text(report)}{silent}; effective weight: {weights}")
