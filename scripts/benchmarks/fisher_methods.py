"""Methods for a diagonal Fisher that the benchmark ``fisher`` compares, and the slow reference.

A method is prepared once for a model and a batch, which is not timed, and then called many times. A call returns a
mapping from parameter names to sums of squared gradients over the examples; the mapping may lack parameters.
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
WRONG = 1e-4  # relative to the tensor's largest entry
FLOOR = 1e-12  # relative to the model's largest entry; gradients that vanish by symmetry consist of rounding


@dataclass(frozen=True)
class Method:
    """A method for a diagonal Fisher.

    Attributes:
        name: label in the table.
        kinds: kinds of Fisher that the method can compute.
        prepare: function from model, batch, kind and chunk to the call that is timed.
        chunk: number of examples in a forward pass, or 0 for the whole batch.
        package: Python module that has to be installed, or an empty string.
    """

    name: str
    kinds: tuple[Kind, ...]
    prepare: Callable[[nn.Module, Batch, Kind, int], Run]
    chunk: int = 0
    package: str = ""

    def title(self, size: int) -> str:
        """Return the label of the row for a batch of the given size."""
        return self.name + (f", chunks of {min(self.chunk, size)}" if self.chunk else "")


def plain(model: nn.Module, batch: Batch) -> None:
    """Run an ordinary forward and backward pass."""
    model.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(*terms(model, batch)).backward()


def ours(model: nn.Module, batch: Batch, kind: Kind, chunk: int) -> Run:
    """Prepare the accumulator of this package; each call adds to the same one."""
    made: list[FisherAccumulator] = []  # made by the first call, whose memory counts

    def run() -> Sought:
        if not made:
            made.append(FisherAccumulator(model, LABELS[kind], task=task_of(batch), seed=SEED))  # type: ignore[arg-type]
        made[0].add(batch)
        return {name: made[0].accumulators[p] for name, p in model.named_parameters()}

    return run


def loop(model: nn.Module, batch: Batch, kind: Kind = "empirical", chunk: int = 0) -> Run:
    """Prepare a loop over single examples, and over classes for ``exact``."""
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
    """Yield the losses of one example with the weights of their squared gradients."""
    if kind == "exact":
        logs = logits.log_softmax(-1)[0]
        yield from zip(logs, logs.detach().exp().tolist(), strict=True)
    else:
        yield nn.functional.cross_entropy(logits, targets, reduction="sum"), 1.0


def by_vmap(model: nn.Module, batch: Batch, kind: Kind, chunk: int) -> Run:
    """Prepare ``torch.func.vmap`` of ``torch.func.grad``."""
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
    """Yield a batch in chunks of the given number of examples."""
    for start in range(0, len(labels_of(batch)), chunk):
        yield convert(batch, lambda part, start=start: part[start : start + chunk])


def add_squares(total: Tensor, gradients: Tensor) -> None:
    """Add the squares of per-example gradients (first axis: examples); on a CPU without a large temporary."""
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
    """Return the kinds of Fisher to measure; exact is too costly for a vocabulary of classes."""
    return ALL if task_of(batch) == "classification" else ALL[:2]


def offered(methods: list[Method], kind: Kind, size: int) -> list[Method]:
    """Return the methods of a kind; of the chunks that hold the whole batch, only the smallest."""
    found, whole = [], set()
    for method in methods:
        if kind in method.kinds and method.name not in whole:
            found.append(method)
            if method.chunk >= size:
                whole.add(method.name)
    return found


# ---- the reference


def truth(model: nn.Module, batch: Batch, kind: Kind) -> Sought:
    """Return the reference in float64; for ``sampled`` with the labels that the package draws."""
    if kind == "sampled":
        batch = relabelled(batch, drawn(model, batch))
    wide = convert(batch, lambda part: part.double() if part.is_floating_point() else part)
    return loop(copy.deepcopy(model).double(), wide, kind)()


def drawn(model: nn.Module, batch: Batch) -> Tensor:
    """Return the labels that the package draws from its seed; only their logits have a negative gradient."""
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
    """Difference between a method and the reference.

    Attributes:
        error: largest error over the tensors, see :func:`compare`.
        wrong: number of tensors with an error above ``WRONG``.
        missing: number of tensors that the method does not return.
        count: number of tensors of the model.
    """

    error: float
    wrong: int
    missing: int
    count: int

    def __str__(self) -> str:
        """Return the text for the table."""
        found = f"error {self.error:.1e}"
        if self.wrong:
            found = f"wrong: {self.wrong} of {self.count}, {found}"
        return found + (f", missing {self.missing} of {self.count}" if self.missing else "")


def compare(found: Sought, expected: Sought) -> Comparison:
    """Compare a Fisher with the reference, tensor by tensor.

    The error of a tensor is its largest difference, relative to its largest entry, or to 1e-12 of the model's largest
    entry if that is larger. NaN or another shape is an infinite error.
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
