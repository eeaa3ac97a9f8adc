"""A diagonal Fisher of a model from data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from squisher_mergekit.errors import ConfigError, UnsupportedStateError
from squisher_mergekit.estimators.capture import Tape, taped
from squisher_mergekit.estimators.labels import Labels
from squisher_mergekit.estimators.rules import add_outer, add_squares, outer_square
from squisher_mergekit.estimators.special import SPECIAL
from squisher_mergekit.estimators.tasks import Batch, Forward, Outputs, Task, choose, run
from squisher_mergekit.fisher.config import Coverage, Estimator, FisherConfig
from squisher_mergekit.fisher.files import TIED, MemoryStore
from squisher_mergekit.fisher.mapping import Fisher, TensorStore
from squisher_mergekit.optimizers.models import describe
from squisher_mergekit.optimizers.store import store_moments

Grouping = Literal["example", "batch"]
_NAMES: dict[tuple[Labels, Grouping], Estimator] = {
    ("true", "example"): "empirical",
    ("sampled", "example"): "sampled",
    ("exact", "example"): "exact",
    ("predicted", "example"): "predicted",
    ("true", "batch"): "joint_empirical",
    ("sampled", "batch"): "joint_sampled",
}
_PROOF = 2  # examples that are checked one by one
_TOLERANCE = 2e-3  # of a tensor's largest entry, in float32

Totals = dict[nn.Parameter, Tensor]
Moved = dict[nn.Parameter, tuple[nn.Module, str]]


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    labels: Labels = "true",
    grouping: Grouping = "example",
    statistic: Literal["mean", "sum"] = "mean",
    num_samples: int = 1,
    task: Task = "auto",
    forward: Forward | None = None,
    *,
    noise: float = 1.0,
    seed: int = 0,
    verify: bool = True,
) -> Fisher:
    """Estimate the diagonal Fisher of a model's trainable parameters.

    With ``g_n(y)`` the gradient of ``-log p(y | x_n)`` and N examples, ``mean`` divides by N:

    * ``true``, ``example``: ``sum_n g_n(y_n)^2``, the empirical Fisher (Eq. 6-7), the paper's "Fisher". It is not the
      Fisher: at well fitted examples it is far smaller.
    * ``sampled``, ``example``: the same with labels drawn from the model, an unbiased estimate of the Fisher (Eq. 4-5).
    * ``exact``, ``example``: the Fisher itself, ``sum_n sum_c p_nc g_n(c)^2``; for classes, not for tokens.
    * ``predicted``, ``example``: with the model's likeliest label; an estimate of neither.
    * ``true``, ``batch``: ``(sum_n g_n(y_n))^2`` over each batch, the joint empirical Fisher (Eq. 10). It is what
      Adam's accumulator averages (that of a mean loss over B examples is this divided by B^2).
    * ``sampled``, ``batch``: the joint Fisher (Eq. 9), in expectation the Fisher itself.

    A sequence is one example of a language model: its loss is the sum over its unmasked tokens.

    Args:
        model: Any module; parameters that ask for no gradient are left out. It runs in eval mode, and neither mode nor
            ``.grad`` are different afterwards.
        batches: Dicts of what the model takes, ``labels`` included, or pairs ``(inputs, labels)``; examples in front.
        labels: See above.
        grouping: See above.
        statistic: ``mean`` over the examples or ``sum``.
        num_samples: Draws for each example, of ``sampled``.
        task: What the outputs mean; ``auto`` goes by the model's architecture, or by the labels.
        forward: Takes model and inputs, and returns the logits, where the model does not do so itself.
        noise: Standard deviation of a regression's targets.
        seed: Of the labels that are drawn.
        verify: Hold the first two examples against gradients taken one by one.

    Returns:
        The Fisher, float32 (float64 of a float64 model), by the names that saving the model gives its parameters.

    Raises:
        ConfigError: The arguments do not go together, or there is no example.
        UnsupportedStateError: A module mixes its examples, or a parameter's gradients cannot be told apart.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> _ = nn.init.ones_(model.weight)
        >>> estimate_fisher(model, [(x, y)], task="regression")["weight"]
        tensor([[ 9., 36.]])
    """
    sums = Sums(model, labels, grouping, num_samples, task, forward, noise, seed, verify)
    for batch in batches:
        sums.add(batch)
    if not sums.examples:
        raise ConfigError("a Fisher needs at least one batch of examples, found none")
    scale = 1 / sums.examples if statistic == "mean" else 1.0
    return sums.fisher(scale, statistic=statistic, num_examples=sums.examples, datum="example")


class Sums:
    """Sums of squared gradients over batches; see :func:`estimate_fisher` for the arguments.

    ``totals``: parameter -> sum, shaped like it. ``examples``: how many have been added.

    Raises:
        ConfigError: The arguments do not go together, or nothing is to be trained.

    Example:
        >>> sums = Sums(nn.Linear(2, 1), task="regression")
        >>> sums.add((torch.ones(3, 2), torch.zeros(3, 1)))
        >>> sums.examples
        3
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Labels = "true",
        grouping: Grouping = "example",
        num_samples: int = 1,
        task: Task = "auto",
        forward: Forward | None = None,
        noise: float = 1.0,
        seed: int = 0,
        verify: bool = True,
    ) -> None:
        check_kind(labels, grouping)
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ConfigError(f"num_samples must be a whole number of at least 1, found {num_samples!r}")
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise ConfigError(
                "a Fisher needs parameters that ask for a gradient, but all are frozen; set requires_grad"
            )
        contiguous = torch.contiguous_format
        self.model = model
        self.totals: Totals = {
            p: torch.zeros_like(p, dtype=_accumulated(p), memory_format=contiguous) for p in parameters
        }
        self.examples = 0
        self._labels, self._grouping, self._draws = labels, grouping, num_samples
        self._task, self._forward, self._noise, self._seed = task, forward, noise, seed
        self._verify = verify and grouping == "example"
        self._generator: torch.Generator | None = None
        self._moved: Moved | None = None

    def add(self, batch: Batch) -> None:
        """Add the squared gradients of a batch.

        Raises:
            ConfigError: It lacks something.
            UnsupportedStateError: The model mixes its examples.
        """
        with _evaluating(self.model):
            if self._moved is None:
                self._task = choose(self._task, self.model, batch)
                self._moved = _find_homes(self.model, batch, self._task, self._forward, self._verify)
            # The joint form takes the gradients of the parameters themselves, and needs nothing noted.
            noted = taped(self.model, size_of(batch), SPECIAL, self._moved) if self._grouping == "example" else None
            with noted or nullcontext() as tape:
                outputs = run(self.model, batch, self._task, self._forward)
            if self._generator is None:
                self._generator = torch.Generator(outputs.values.device).manual_seed(self._seed)
            columns = list(outputs.columns(self._labels, self._draws, self._noise, self._generator))
            if tape is None:
                _add_joint(self.totals, outputs, columns)
            else:
                _add_batch(self.totals, tape, outputs, columns)
        self.examples += outputs.size

    def fisher(self, scale: float = 1.0, **known: Any) -> Fisher:
        """Return the sums, times a scale, by the names on disk.

        Args:
            scale: Factor.
            known: Further keys of the metadata.
        """
        store, aliases, adapter = _on_disk(self.model, {p: total * scale for p, total in self.totals.items()})
        config = FisherConfig(
            estimator=_NAMES[self._labels, self._grouping],
            parameters="adapter" if adapter else "model",
            coverage=Coverage(
                **{"with": len(store.infos)}, without={other: f"{TIED}{name}" for other, name in aliases.items()}
            ),
            **known,
        )
        return Fisher(store, config, aliases)


def check_kind(labels: Labels, grouping: Grouping) -> None:
    """Refuse labels and a grouping that do not go together.

    Raises:
        ConfigError: They do not.
    """
    if (labels, grouping) not in _NAMES:
        raise ConfigError(
            f"grouping batch needs labels true or sampled, found {labels}: of the others it has no meaning of its own"
        )


def _on_disk(model: nn.Module, totals: Totals) -> tuple[TensorStore, Mapping[str, str], bool]:
    """Return the tensors by their names on disk, other names of tied ones, and whether they are an adapter's."""
    described = describe(model)
    tensors = {described.names[id(p)]: total for p, total in totals.items()}
    if described.adapter is not None:
        return MemoryStore({described.adapter[name]: tensor for name, tensor in tensors.items()}), {}, True
    bones = described.skeleton
    store = store_moments("memory", tensors, bones, ())
    kept = {recipe.key: name for name, recipe in store.recipes.items()}
    aliases = {other: kept[name] for other, name in (bones.aliases if bones else {}).items() if name in kept}
    return store, aliases, False


def _accumulated(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def size_of(batch: Batch) -> int:
    """Return the number of examples of a batch.

    Raises:
        ConfigError: It has no tensor with examples in front.
    """
    parts = [*batch.values()] if isinstance(batch, Mapping) else [*batch][::-1]
    for part in parts:
        if isinstance(part, Tensor) and part.ndim:
            return len(part)
    raise ConfigError("a batch must have tensors with the examples in front, found none")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, and put every module back into its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _add_batch(totals: Totals, tape: Tape, outputs: Outputs, columns: list[Tensor]) -> None:
    """Add the squares of a batch's per-example gradients, for each column.

    Where a gradient is an outer product ``b_n a_n^T``, so is its square: the ``b_n^2`` of all columns are added up, and
    multiplied with ``a_n^2`` once.
    """
    squares: dict[nn.Parameter, Tensor] = {}
    for number, column in enumerate(columns):
        tape.backward(outputs.values, column, keep=number + 1 < len(columns))
        for parameter, uses in tape.calls.items():
            b = outer_square(uses, tape.size) if len(columns) > 1 else None
            if b is None:
                add_squares(totals[parameter], uses, tape.size)
            else:
                squares[parameter] = squares[parameter].add_(b) if parameter in squares else b
    for parameter, b in squares.items():
        add_outer(totals[parameter], b, tape.calls[parameter], tape.size)


def _add_joint(totals: Totals, outputs: Outputs, columns: list[Tensor]) -> None:
    """Add the square of a batch's summed gradient, for each column."""
    parameters = list(totals)
    for number, column in enumerate(columns):
        keep = number + 1 < len(columns)
        found = torch.autograd.grad(outputs.values, parameters, column, retain_graph=keep, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                totals[parameter] += gradient.to(totals[parameter].dtype).square_()


def _find_homes(model: nn.Module, batch: Batch, task: Task, forward: Forward | None, verify: bool) -> Moved:
    """Find the parameters that are used by other modules than those that hold them, by trying.

    The first examples' squared gradients are held against those that autograd gives one by one. Where they differ, the
    module around is differentiated as a whole, then the one around that, up to the model itself.

    Raises:
        UnsupportedStateError: They differ even then: the model mixes its examples.
    """
    moved: Moved = {}
    if not verify:
        return moved
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    first = _first(batch, min(_PROOF, size_of(batch)))
    while wrong := _wrong(model, first, task, forward, list(names), moved):
        for parameter in wrong:
            home, name = moved.get(parameter, (None, ""))
            if home is model:
                raise UnsupportedStateError(
                    f"the gradients of {names[parameter]} cannot be told apart example by example: the model mixes its "
                    "examples; freeze it, or take grouping batch"
                )
            path = names[parameter].removesuffix(f".{name}" if name else "").rpartition(".")[0]
            if not name:  # held by the module at path; the one around it is next
                path = path.rpartition(".")[0]
            within = names[parameter].removeprefix(f"{path}." if path else "")
            moved[parameter] = (model.get_submodule(path), within)
    return moved


def _wrong(
    model: nn.Module,
    batch: Batch,
    task: Task,
    forward: Forward | None,
    parameters: list[nn.Parameter],
    moved: Moved,
) -> list[nn.Parameter]:
    """Return the parameters whose squared gradients are not the sum of those of each example alone."""
    size = size_of(batch)
    with taped(model, size, SPECIAL, moved) as tape:
        outputs = run(model, batch, task, forward)
    generator = torch.Generator(outputs.values.device).manual_seed(0)
    column = torch.randn(outputs.values.shape, generator=generator, device=outputs.values.device)
    column = column.to(outputs.values.dtype)
    expected = {p: torch.zeros_like(p, dtype=_accumulated(p)) for p in parameters}
    used: set[nn.Parameter] = set()
    for n in range(size):
        found = torch.autograd.grad(outputs.values[n], parameters, column[n], retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                used.add(parameter)
                expected[parameter] += gradient.to(expected[parameter].dtype).square()
    totals = {p: torch.zeros_like(total) for p, total in expected.items()}
    _add_batch(totals, tape, outputs, [column])
    reached = {p for p, uses in tape.calls.items() if any(call.gradient is not None for _, call in uses)}
    largest = max(float(total.max()) for total in expected.values() if total.numel())
    # Of what was reached, gradients that are nothing but rounding are not compared.
    floors = {p: 1e-9 * largest if p in reached else 0.0 for p in used}
    bounds = {p: _TOLERANCE * max(float(expected[p].max()), floors[p]) for p in used}
    return [p for p in parameters if p in used and float((totals[p] - expected[p]).abs().max()) > bounds[p]]


def _first(batch: Batch, count: int) -> Any:
    """Return the first examples of a batch."""
    size = size_of(batch)

    def cut(value: Any) -> Any:
        return value[:count] if isinstance(value, Tensor) and value.ndim and len(value) == size else value

    if isinstance(batch, Mapping):
        return {key: cut(value) for key, value in batch.items()}
    inputs = {k: cut(v) for k, v in batch[0].items()} if isinstance(batch[0], Mapping) else cut(batch[0])
    return inputs, cut(batch[1])
