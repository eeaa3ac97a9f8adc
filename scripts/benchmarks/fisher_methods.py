"""Ways to a diagonal Fisher that ``bench_fisher`` compares, without third parties; and the slow truth.

A method is prepared once for a model and a batch, which is not timed, and then called again and again. What it
returns, name -> sum over the examples of squared gradients, may lack parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scripts.benchmarks.fisher_models import Batch, convert, labels_of, one, relabelled, task_of, terms
from squisher_mergekit.estimators.accumulator import FisherAccumulator
from squisher_mergekit.estimators.output_gradients import Labels

Kind = Literal["empirical", "sampled", "exact"]
Sought = dict[str, Tensor]
Run = Callable[[], Sought]
LABELS: dict[Kind, Labels] = {"empirical": "true", "sampled": "sampled", "exact": "exact"}
SEED = 0
CHUNKS = (4, 16, 64)
WRONG = 1e-4  # of a tensor's largest entry
FLOOR = 1e-12  # of the model's largest entry: gradients that vanish by symmetry are nothing but rounding


@dataclass(frozen=True)
class Method:
    """A way to a diagonal Fisher. ``chunk``: examples at a time, 0 for all. ``package``: what must be installed."""

    name: str
    kinds: tuple[Kind, ...]
    prepare: Callable[[nn.Module, Batch, Kind, int], Run]
    chunk: int = 0
    package: str = ""

    def title(self, size: int) -> str:
        """Return what its row is called, for a batch of that size."""
        return self.name + (f", chunks of {min(self.chunk, size)}" if self.chunk else "")


def plain(model: nn.Module, batch: Batch) -> None:
    """One ordinary forward and backward pass."""
    model.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(*terms(model, batch)).backward()


def ours(model: nn.Module, batch: Batch, kind: Kind, chunk: int) -> Run:
    """Sums of the package; each call adds to those of earlier ones."""
    made: list[FisherAccumulator] = []  # by the first call, as its memory counts

    def run() -> Sought:
        if not made:
            made.append(FisherAccumulator(model, LABELS[kind], task=task_of(batch), seed=SEED))  # type: ignore[arg-type]
        made[0].add(batch)
        return {name: made[0].accumulators[p] for name, p in model.named_parameters()}

    return run


def loop(model: nn.Module, batch: Batch, kind: Kind = "empirical", chunk: int = 0) -> Run:
    """One example at a time; of ``exact`` one class at a time as well."""
    names, parameters = zip(*model.named_parameters(), strict=True)

    def run() -> Sought:
        total = {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}
        for n in range(len(labels_of(batch))):
            for loss, weight in _losses(*terms(model, one(batch, n)), kind):
                found = torch.autograd.grad(loss, parameters, retain_graph=kind == "exact", allow_unused=True)
                for name, gradient in zip(names, found, strict=True):
                    if gradient is not None:
                        total[name].addcmul_(gradient, gradient, value=weight)
        return total

    return run


def _losses(logits: Tensor, targets: Tensor, kind: Kind) -> Iterator[tuple[Tensor, float]]:
    """Yield the losses of one example whose squared gradients count, and how much each counts."""
    if kind == "exact":
        logs = logits.log_softmax(-1)[0]
        yield from zip(logs, logs.detach().exp().tolist(), strict=True)
    else:
        yield nn.functional.cross_entropy(logits, targets, reduction="sum"), 1.0


def by_vmap(model: nn.Module, batch: Batch, kind: Kind, chunk: int) -> Run:
    """``torch.func.vmap`` of ``torch.func.grad``."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: Sought, single: Batch) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, values, args, kwargs)

        return nn.functional.cross_entropy(*terms(call, convert(single, lambda p: p.unsqueeze(0))), reduction="sum")

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))

    def run() -> Sought:
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for part in chunks(batch, chunk):
            for name, found in gradients(parameters, part).items():
                add_squares(total[name], found)
        return total

    return run


def chunks(batch: Batch, chunk: int) -> Iterator[Batch]:
    """Yield a batch in parts of so many examples."""
    for start in range(0, len(labels_of(batch)), chunk):
        yield convert(batch, lambda part, start=start: part[start : start + chunk])


def add_squares(total: Tensor, gradients: Tensor) -> None:
    """Add the squares of gradients, examples in front; on a CPU large ones are best read once and never written."""
    if total.is_cpu and total.numel() > 4096:
        for gradient in gradients:
            total.addcmul_(gradient, gradient)
    else:
        total += gradients.square().sum(0)


EMPIRICAL: tuple[Kind, ...] = ("empirical",)
ALL: tuple[Kind, ...] = ("empirical", "sampled", "exact")
OURS = Method("ours", ALL, ours)
METHODS = [
    OURS,
    Method("loop of single examples", EMPIRICAL, loop),
    *(Method("vmap(grad)", EMPIRICAL, by_vmap, chunk) for chunk in CHUNKS),
]


def kinds_of(batch: Batch) -> tuple[Kind, ...]:
    """Return the kinds of Fisher to be had: exact would take a backward pass for each class of each token."""
    return ALL if task_of(batch) == "classification" else ALL[:2]


def offered(methods: list[Method], kind: Kind, size: int) -> list[Method]:
    """Return the methods of a kind; of chunks that hold a whole batch of that size, only the smallest."""
    found, whole = [], set()
    for method in methods:
        if kind in method.kinds and method.name not in whole:
            found.append(method)
            if method.chunk >= size:
                whole.add(method.name)
    return found


# ---- the truth


def truth(model: nn.Module, batch: Batch, kind: Kind) -> Sought:
    """Return what a method should give, in float64; of ``sampled`` what the package should, for the labels it draws."""
    if kind == "sampled":
        batch = relabelled(batch, drawn(model, batch))
    wide = convert(batch, lambda part: part.double() if part.is_floating_point() else part)
    return loop(copy.deepcopy(model).double(), wide, kind)()


def drawn(model: nn.Module, batch: Batch) -> Tensor:
    """Return the labels that the package draws from its seed: its gradient at the logits is below 0 there alone."""
    seen: list[Tensor] = []

    def forward(model: nn.Module, inputs: Any) -> Tensor:
        found = model(**inputs).logits if isinstance(inputs, Mapping) else model(inputs)
        found.register_hook(seen.append)
        return found

    FisherAccumulator(model, "sampled", task=task_of(batch), forward=forward, seed=SEED, verify=False).add(batch)
    [column] = seen
    labels, chosen = labels_of(batch), column.argmin(-1)
    # Each place of a sequence predicts the token after it; nothing predicts the first.
    return chosen if labels.ndim == 1 else torch.cat([labels[:, :1], chosen[:, :-1]], 1)


@dataclass(frozen=True)
class Comparison:
    """How far a method is from the truth. ``error``: see :func:`compare`; counts are of tensors."""

    error: float
    wrong: int
    missing: int
    count: int

    def __str__(self) -> str:
        """Return what the table says of it."""
        found = f"error {self.error:.1e}"
        if self.wrong:
            found = f"wrong: {self.wrong} of {self.count}, {found}"
        return found + (f", missing {self.missing} of {self.count}" if self.missing else "")


def compare(found: Sought, expected: Sought) -> Comparison:
    """Compare with the truth, tensor by tensor.

    An error is the largest difference, as a share of the tensor's largest entry, or of 1e-12 of the model's if that is
    more. The largest one counts; NaN and another shape are infinite ones.
    """
    floor = FLOOR * max(float(tensor.max()) for tensor in expected.values())
    errors = []
    for name, tensor in expected.items():
        if name in found:
            same = found[name].shape == tensor.shape
            error = float((found[name].double() - tensor).abs().max()) if same else math.inf
            errors.append(math.inf if math.isnan(error) else error / max(float(tensor.max()), floor))
    wrong = sum(error > WRONG for error in errors)
    return Comparison(max(errors, default=math.inf), wrong, len(expected) - len(errors), len(expected))
