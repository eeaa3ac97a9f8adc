"""Accumulator of squared gradients over batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from squisher_mergekit.errors import ConfigError, UnsupportedStateError
from squisher_mergekit.estimators.output_gradients import Labels, batch_seed
from squisher_mergekit.estimators.per_example.accumulate import accumulate_batch, accumulate_joint, zero_accumulators
from squisher_mergekit.estimators.per_example.tape import Tape
from squisher_mergekit.estimators.per_example.verify import TapedModel, Verification, mixing_parameters, verify
from squisher_mergekit.estimators.tasks import (
    Batch,
    Datum,
    Forward,
    Outputs,
    Task,
    count_examples,
    infer_task,
    run_model,
)
from squisher_mergekit.fisher.config import Coverage, Estimator, FisherConfig
from squisher_mergekit.fisher.files import TIED
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.convert import store_moments
from squisher_mergekit.models.parameters import describe, memory_names, unwrap_model, uses_fsdp1
from squisher_mergekit.tensors.safetensors import MemoryStore, TensorStore
from squisher_mergekit.tensors.sharded import OnRankZero, distributed_like, gathered, is_sharded, sharded_modules

Grouping = Literal["example", "batch"]
_ESTIMATORS: dict[tuple[Labels, Grouping], Estimator] = {
    ("true", "example"): "empirical",
    ("sampled", "example"): "sampled",
    ("exact", "example"): "exact",
    ("predicted", "example"): "predicted",
    ("true", "batch"): "joint_empirical",
    ("sampled", "batch"): "joint_sampled",
}


class FisherAccumulator:
    """Running sums of squared gradients; :func:`~squisher_mergekit.estimate_fisher` explains the arguments.

    ``accumulators``: parameter -> sum, shaped like it and sharded as it is.

    Raises:
        ConfigError: The arguments do not fit together, or nothing is to be trained.
        UnsupportedStateError: The model's parameters are kept in a way that they cannot be differentiated in.

    Example:
        >>> accumulator = FisherAccumulator(nn.Linear(2, 1), task="regression")
        >>> accumulator.add((torch.ones(3, 2), torch.zeros(3, 1)))
        >>> accumulator.examples
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
        check_labels(labels, grouping)
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ConfigError(f"num_samples must be a whole number of at least 1, found {num_samples!r}")
        check_model(model, grouping)
        self.model = unwrap_model(model)
        self.accumulators = zero_accumulators(
            parameter for parameter in self.model.parameters() if parameter.requires_grad
        )
        self.batches = 0
        self._count: Tensor | int = 0
        self._labels, self._grouping, self._num_samples, self._datum = labels, grouping, num_samples, datum
        self._task, self._forward, self._noise, self._seed = task, forward, noise, seed
        self._verify = verify and grouping == "example"
        self._verification: Verification | None = None
        self._restored = False

    @property
    def examples(self) -> int:
        """How many examples were added, or tokens if these are the data."""
        return int(self._count)

    @property
    def sharded(self) -> bool:
        """Whether several processes hold the accumulators in parts."""
        return any(is_sharded(total) for total in self.accumulators.values())

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
        with _eval_mode(self.model):
            self._task = infer_task(self._task, self.model, batch)
            number = self.batches if number is None else number
            if self._grouping == "batch":
                outputs = run_model(self.model, batch, self._task, self._forward)
                accumulate_joint(self.accumulators, outputs, self._output_gradients(outputs, number, counts))
            else:
                outputs = self._add_per_example(batch, number, counts)
        self.batches += 1
        if counts:
            self._count = self._count + (outputs.size if self._datum == "example" else outputs.tokens)

    def _add_per_example(self, batch: Batch, number: int, counts: bool) -> Outputs:
        taped_model = TapedModel(self.model, self._task, self._forward)
        if self._verification is None:
            self._verification = (
                self._verify_first_batch(taped_model, batch)
                if self._verify
                else Verification({}, None, set(self.accumulators))
            )
        accumulators = {p: total for p, total in self.accumulators.items() if p in self._verification.verified}
        while True:
            with taped_model.run(batch, self._verification.owner_of, self._verification.broadcast_modules) as (
                tape,
                outputs,
            ):
                self._check_mixing(tape, outputs)
                others = [p for p in tape.without_call(self.accumulators) if not is_sharded(p)]
                reached: set[nn.Parameter] = set()
                output_gradients = self._output_gradients(outputs, number, counts)
                used_directly = accumulate_batch(accumulators, tape, outputs, output_gradients, others, reached=reached)
            # What the examples so far have not used, such as a seldom expert, has yet to be proven.
            new = (reached - self._verification.verified) | set(used_directly)
            if not new:
                return outputs
            if not self._verify or new <= self._verification.verified:
                self._refuse_unverified(new.pop())
            accumulators = {p: self.accumulators[p] for p in new}
            again = verify(taped_model, batch, self._verification, count_examples(batch))
            self._verification = Verification(
                again.owner_of, again.broadcast_modules, self._verification.verified | again.verified | new
            )

    def _verify_first_batch(self, taped_model: TapedModel, batch: Batch) -> Verification:
        if self._restored:
            return verify(taped_model, batch)
        try:
            return verify(taped_model, batch, scratch=self.accumulators)
        finally:
            for total in self.accumulators.values():
                total.zero_()

    def _check_mixing(self, tape: Tape, outputs: Outputs) -> None:
        """See that examples still lie where they are looked for, at the second batch, the fourth, and so on."""
        if self._verify and self.batches and not self.batches & (self.batches + 1):
            for parameter, error in mixing_parameters(tape, outputs, self.accumulators, retain_graph=True).items():
                name = memory_names(self.model)[id(parameter)]
                raise UnsupportedStateError(
                    f"the gradients of {name} cannot be told apart in batch {self.batches + 1}, as its module is given "
                    "other parts of the examples each time; freeze it, or take grouping batch"
                ) from error

    def _output_gradients(self, outputs: Outputs, number: int, counts: bool) -> Iterator[Tensor]:
        if self._datum == "token" and outputs.values.ndim < 3:
            raise ConfigError(
                f"datum token needs a model whose outputs are one a token, found shape {list(outputs.values.shape)}; "
                "take datum example"
            )
        generator = torch.Generator(outputs.values.device).manual_seed(batch_seed(self._seed, number))
        for output_gradient in outputs.output_gradients(
            self._labels, self._num_samples, self._noise, generator, self._datum
        ):
            yield output_gradient if counts else output_gradient * 0

    def _refuse_unverified(self, parameter: nn.Parameter) -> None:
        name = memory_names(self.model)[id(parameter)]
        raise UnsupportedStateError(
            f"{name} is used without a call of the module that holds it, and its gradients cannot be told apart; give "
            "examples that use it first, with verify=True, or freeze it"
        )

    def reduce(self) -> None:
        """Add up what all processes have, which must all call this; each has the sums over all batches then."""
        if not dist.is_initialized():
            return
        for total in self.accumulators.values():
            if not is_sharded(total):  # those are summed up already
                dist.all_reduce(total)
        device = next(iter(self.accumulators)).device
        count = torch.as_tensor(self._count, dtype=torch.int64, device=device).clone()
        dist.all_reduce(count)
        self._count = count

    def reset(self) -> None:
        """Forget what :meth:`reduce` has left with the first process; to be called in all but that one."""
        for total in self.accumulators.values():
            if not is_sharded(total):
                total.zero_()
        self._count = 0

    def divide(self) -> None:
        """Turn the sums into means over the examples."""
        examples = self.examples
        for total in self.accumulators.values():
            total /= examples

    def named_accumulators(self) -> dict[str, Tensor]:
        """Return name in memory -> total."""
        names = memory_names(self.model)
        return {names[id(p)]: total for p, total in self.accumulators.items()}

    def restore(self, read: Callable[[str], Tensor], examples: int = 0) -> None:
        """Go on from sums that were kept; of sharded ones each process takes its part.

        Args:
            read: Returns the total of a name in memory.
            examples: How many are in them.
        """
        for name, total in self.named_accumulators().items():
            total.copy_(distributed_like(read(name), total, total.dtype))
        self._restored, self._count = True, examples

    def fisher(self, on_rank_zero: OnRankZero | None = None, **metadata: Any) -> Fisher:
        """Return the sums by the names on disk. They are the living ones, not copies.

        Args:
            on_rank_zero: Reads sharded sums one by one; without it all processes gather all of them on the CPU.
            metadata: Further keys of the metadata.
        """
        named = self.named_accumulators()
        tensors: dict[str, Any] = {}
        for name, total in named.items():
            if not is_sharded(total):
                tensors[name] = total
            else:
                tensors[name] = on_rank_zero.add(total) if on_rank_zero else gathered(total).cpu()
        store, aliases, adapter = _disk_store(self.model, tensors)
        config = FisherConfig(
            estimator=_ESTIMATORS[self._labels, self._grouping],
            parameters="adapter" if adapter else "model",
            coverage=Coverage(
                **{"with": len(store.infos)}, without={other: f"{TIED}{name}" for other, name in aliases.items()}
            ),
            datum=self._datum,
            **metadata,
        )
        return Fisher(store, config, aliases)


def check_labels(labels: Labels, grouping: Grouping) -> None:
    """Refuse labels and a grouping that do not fit together.

    Raises:
        ConfigError: They do not.
    """
    if (labels, grouping) not in _ESTIMATORS:
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


def _disk_store(model: nn.Module, tensors: Mapping[str, Any]) -> tuple[TensorStore, Mapping[str, str], bool]:
    """Return the tensors by their names on disk, other names of tied ones, and whether they are an adapter's."""
    described = describe(model)
    if described.adapter is not None:
        return MemoryStore({described.adapter[name]: tensor for name, tensor in tensors.items()}), {}, True
    names = described.checkpoint_names
    store = store_moments("memory", tensors, names, ())
    stored = {recipe.key: name for name, recipe in store.recipes.items()}
    aliases = {other: stored[name] for other, name in (names.aliases if names else {}).items() if name in stored}
    return store, aliases, False


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
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
