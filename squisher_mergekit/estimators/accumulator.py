"""Sums of squared gradients that grow batch by batch, in one process or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from squisher_mergekit.errors import ConfigError, UnsupportedStateError
from squisher_mergekit.estimators.output_gradients import Labels, batch_seed
from squisher_mergekit.estimators.per_example.accumulate import add_batch, add_joint, no_totals
from squisher_mergekit.estimators.per_example.tape import Tape
from squisher_mergekit.estimators.per_example.verify import Proof, Trial, mixed, prove
from squisher_mergekit.estimators.tasks import Batch, Datum, Forward, Outputs, Task, choose, run, size_of
from squisher_mergekit.fisher.config import Coverage, Estimator, FisherConfig
from squisher_mergekit.fisher.files import TIED
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.convert import store_moments
from squisher_mergekit.models.parameters import describe, memory_names, unwrap_model, uses_fsdp1
from squisher_mergekit.tensors.safetensors import MemoryStore, TensorStore
from squisher_mergekit.tensors.sharded import OnRankZero, distributed_like, gathered, is_sharded, sharded_modules

Grouping = Literal["example", "batch"]
_NAMES: dict[tuple[Labels, Grouping], Estimator] = {
    ("true", "example"): "empirical",
    ("sampled", "example"): "sampled",
    ("exact", "example"): "exact",
    ("predicted", "example"): "predicted",
    ("true", "batch"): "joint_empirical",
    ("sampled", "batch"): "joint_sampled",
}


class Sums:
    """Sums of squared gradients over batches; see :func:`~squisher_mergekit.estimate_fisher` for the arguments.

    ``totals``: parameter -> sum, shaped like it and sharded as it is.

    Raises:
        ConfigError: The arguments do not go together, or nothing is to be trained.
        UnsupportedStateError: The model's parameters are kept in a way that they cannot be differentiated in.

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
        datum: Datum = "example",
    ) -> None:
        check_kind(labels, grouping)
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ConfigError(f"num_samples must be a whole number of at least 1, found {num_samples!r}")
        check_model(model, grouping)
        self.model = unwrap_model(model)
        self.totals = no_totals(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        self.batches = 0
        self._count: Tensor | int = 0
        self._labels, self._grouping, self._draws, self._datum = labels, grouping, num_samples, datum
        self._task, self._forward, self._noise, self._seed = task, forward, noise, seed
        self._verify = verify and grouping == "example"
        self._proof: Proof | None = None
        self._restored = False

    @property
    def examples(self) -> int:
        """How many examples were added, or tokens if these are the data."""
        return int(self._count)

    @property
    def sharded(self) -> bool:
        """Whether several processes hold the totals in parts."""
        return any(is_sharded(total) for total in self.totals.values())

    def add(self, batch: Batch, number: int | None = None, *, counts: bool = True) -> None:
        """Add the squared gradients of a batch.

        Args:
            batch: Of this process. If the model is sharded, all processes must add one.
            number: The batch's, which its drawn labels depend on; by default how many came before.
            counts: Whether it counts. One that does not adds nothing: it keeps the other processes company.

        Raises:
            ConfigError: It lacks something.
            UnsupportedStateError: The model mixes its examples.
        """
        with _evaluating(self.model):
            self._task = choose(self._task, self.model, batch)
            number = self.batches if number is None else number
            if self._grouping == "batch":
                outputs = run(self.model, batch, self._task, self._forward)
                add_joint(self.totals, outputs, self._columns(outputs, number, counts))
            else:
                outputs = self._add_examples(batch, number, counts)
        self.batches += 1
        if counts:
            self._count = self._count + (outputs.size if self._datum == "example" else outputs.tokens)

    def _add_examples(self, batch: Batch, number: int, counts: bool) -> Outputs:
        trial = Trial(self.model, self._task, self._forward)
        if self._proof is None:
            self._proof = self._first_proof(trial, batch) if self._verify else Proof({}, None, set(self.totals))
        totals = {p: total for p, total in self.totals.items() if p in self._proof.proven}
        while True:
            with trial.taped(batch, self._proof.moved, self._proof.spread) as (tape, outputs):
                self._look_again(tape, outputs)
                others = [p for p in tape.without_call(self.totals) if not is_sharded(p)]
                arrived: set[nn.Parameter] = set()
                columns = self._columns(outputs, number, counts)
                raw = add_batch(totals, tape, outputs, columns, others, arrived=arrived)
            # What the examples so far have not used, such as a seldom expert, has yet to be proven.
            new = (arrived - self._proof.proven) | set(raw)
            if not new:
                return outputs
            if not self._verify or new <= self._proof.proven:
                self._refuse(new.pop())
            totals = {p: self.totals[p] for p in new}
            again = prove(trial, batch, self._proof, size_of(batch))
            self._proof = Proof(again.moved, again.spread, self._proof.proven | again.proven | new)

    def _first_proof(self, trial: Trial, batch: Batch) -> Proof:
        if self._restored:
            return prove(trial, batch)
        try:
            return prove(trial, batch, scratch=self.totals)
        finally:
            for total in self.totals.values():
                total.zero_()

    def _look_again(self, tape: Tape, outputs: Outputs) -> None:
        """See that examples still lie where they are looked for, at the second batch, the fourth, and so on."""
        if self._verify and self.batches and not self.batches & (self.batches + 1):
            for parameter, error in mixed(tape, outputs, self.totals, keep=True).items():
                name = memory_names(self.model)[id(parameter)]
                raise UnsupportedStateError(
                    f"the gradients of {name} cannot be told apart in batch {self.batches + 1}, as its module is given "
                    "other parts of the examples each time; freeze it, or take grouping batch"
                ) from error

    def _columns(self, outputs: Outputs, number: int, counts: bool) -> Iterator[Tensor]:
        if self._datum == "token" and outputs.values.ndim < 3:
            raise ConfigError(
                f"datum token needs a model whose outputs are one a token, found shape {list(outputs.values.shape)}; "
                "take datum example"
            )
        generator = torch.Generator(outputs.values.device).manual_seed(batch_seed(self._seed, number))
        for column in outputs.columns(self._labels, self._draws, self._noise, generator, self._datum):
            yield column if counts else column * 0

    def _refuse(self, parameter: nn.Parameter) -> None:
        name = memory_names(self.model)[id(parameter)]
        raise UnsupportedStateError(
            f"{name} is used without a call of the module that holds it, and its gradients cannot be told apart; give "
            "examples that use it first, with verify=True, or freeze it"
        )

    def reduce(self) -> None:
        """Add up what all processes have, which must all call this; each has the sums over all batches then."""
        if not dist.is_initialized():
            return
        for total in self.totals.values():
            if not is_sharded(total):  # those are summed up already
                dist.all_reduce(total)
        device = next(iter(self.totals)).device
        count = torch.as_tensor(self._count, dtype=torch.int64, device=device).clone()
        dist.all_reduce(count)
        self._count = count

    def start_again(self) -> None:
        """Forget what :meth:`reduce` has left with the first process; to be called in all but that one."""
        for total in self.totals.values():
            if not is_sharded(total):
                total.zero_()
        self._count = 0

    def divide(self) -> None:
        """Turn the sums into means over the examples."""
        examples = self.examples
        for total in self.totals.values():
            total /= examples

    def named(self) -> dict[str, Tensor]:
        """Return name in memory -> total."""
        names = memory_names(self.model)
        return {names[id(p)]: total for p, total in self.totals.items()}

    def restore(self, total_of: Callable[[str], Tensor], examples: int = 0) -> None:
        """Go on from sums that were kept; of sharded ones each process takes its part.

        Args:
            total_of: Returns the total of a name in memory.
            examples: How many are in them.
        """
        for name, total in self.named().items():
            total.copy_(distributed_like(total_of(name), total, total.dtype))
        self._restored, self._count = True, examples

    def fisher(self, together: OnRankZero | None = None, **known: Any) -> Fisher:
        """Return the sums by the names on disk. They are the living ones, not copies.

        Args:
            together: What sharded sums are to be read through; without it they are gathered on the CPU at once, by all
                processes, which must all call this.
            known: Further keys of the metadata.
        """
        named = self.named()
        tensors: dict[str, Any] = {}
        for name, total in named.items():
            if not is_sharded(total):
                tensors[name] = total
            else:
                tensors[name] = together.add(total) if together else gathered(total).cpu()
        store, aliases, adapter = _on_disk(self.model, tensors)
        config = FisherConfig(
            estimator=_NAMES[self._labels, self._grouping],
            parameters="adapter" if adapter else "model",
            coverage=Coverage(
                **{"with": len(store.infos)}, without={other: f"{TIED}{name}" for other, name in aliases.items()}
            ),
            datum=self._datum,
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


def check_model(model: nn.Module, grouping: Grouping) -> None:
    """Refuse a model whose parameters cannot be differentiated as they are kept.

    Raises:
        ConfigError: All are frozen.
        UnsupportedStateError: They are flattened, or another process has them.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError("a Fisher needs parameters that ask for a gradient, but all are frozen; set requires_grad")
    if uses_fsdp1(model) or any(hasattr(parameter, "ds_id") for parameter in parameters):
        raise UnsupportedStateError(
            "a Fisher needs each layer's parameters as they are, but FSDP1 and DeepSpeed keep them flattened and cut "
            "up; take FSDP2 (fully_shard), or a model in each process"
        )
    if not any(is_sharded(parameter) for parameter in parameters):
        return
    if not sharded_modules(model):
        raise UnsupportedStateError(
            "a sharded model must be one of FSDP2, but its tensors are split in another way, such as tensor "
            "parallelism; take fully_shard, or a model in each process"
        )
    if grouping == "batch":
        raise UnsupportedStateError(
            "grouping batch squares the gradient of one process's batch, but FSDP2 adds up those of all processes; "
            "take grouping example, or a model in each process"
        )


def _on_disk(model: nn.Module, tensors: Mapping[str, Any]) -> tuple[TensorStore, Mapping[str, str], bool]:
    """Return the tensors by their names on disk, other names of tied ones, and whether they are an adapter's."""
    described = describe(model)
    if described.adapter is not None:
        return MemoryStore({described.adapter[name]: tensor for name, tensor in tensors.items()}), {}, True
    bones = described.checkpoint_names
    store = store_moments("memory", tensors, bones, ())
    kept = {recipe.key: name for name, recipe in store.recipes.items()}
    aliases = {other: kept[name] for other, name in (bones.aliases if bones else {}).items() if name in kept}
    return store, aliases, False


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode and uncompiled, and put every module back into its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with ExitStack() as stack:
        for module, mode in modes:
            stack.callback(setattr, module, "training", mode)
        stack.enter_context(torch.enable_grad())
        # Hooks are no part of what was compiled without them.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
