"""Accumulator of squared gradients over batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from squisher_mergekit.errors import ConfigError, UnsupportedStateError
from squisher_mergekit.estimators.cuda_graph import graphs_for
from squisher_mergekit.estimators.factors import attach_sums, make_factor_sums
from squisher_mergekit.estimators.output_gradients import Labels, batch_seed
from squisher_mergekit.estimators.per_example.accumulate import (
    Accumulators,
    accumulate_batch,
    accumulate_joint,
    zero_accumulators,
)
from squisher_mergekit.estimators.per_example.host_sums import HostSums
from squisher_mergekit.estimators.per_example.verify import TapedModel, Verification, check_mixing, verify
from squisher_mergekit.estimators.requirements import ESTIMATORS, Grouping, check_labels, check_model, check_task
from squisher_mergekit.estimators.tasks import (
    Batch,
    Datum,
    Forward,
    Outputs,
    Task,
    count_examples,
    eval_mode,
    infer_task,
    run_model,
)
from squisher_mergekit.fisher.config import Coverage, FisherConfig, OptimizerInfo, Statistic
from squisher_mergekit.fisher.files import TIED
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.convert import disk_store
from squisher_mergekit.models.parameters import memory_names, unwrap_model
from squisher_mergekit.tensors.sharded import OnRankZero, distributed_like, gathered, is_sharded, sum_over_processes


class FisherAccumulator:
    """Running sums of squared gradients over batches and processes.

    Args:
        model: See :func:`~squisher_mergekit.estimate_fisher`, as for all arguments.
        labels: See there.
        grouping: See there.
        num_samples: See there.
        task: See there.
        forward: See there.
        noise: See there.
        seed: See there.
        verify: See there.
        datum: See there.
        offload: See there.
        cuda_graph: See there.
        factors: See there.
        block: See there.

    Attributes:
        model: The model without wrappers.
        accumulators: Parameter -> sum of squared gradients, with the shape and sharding of the parameter.
        names: Parameter -> name in memory.
        batches: Number of batches of this process.

    Raises:
        ConfigError: The arguments do not fit together, or all parameters are frozen.
        UnsupportedStateError: The parameters are flattened, or sharded in another way than by FSDP2.

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
        *,
        offload: bool = False,
        cuda_graph: bool = True,
        factors: str | None = None,
        block: int = 128,
    ) -> None:
        check_labels(labels, grouping)
        check_task(task, datum)
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ConfigError(f"num_samples must be a whole number of at least 1, found {num_samples!r}")
        check_model(model, grouping, offload)
        self.model = unwrap_model(model)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._host = torch.device("cpu") if offload else None
        self.accumulators = zero_accumulators(parameters, self._host)
        self._host_sums = HostSums(parameters[0].device) if offload else None
        graphs = cuda_graph and grouping == "example" and not offload and factors is None
        self._graphs = graphs_for(parameters) if graphs else None
        names = memory_names(self.model)
        self.names = {parameter: names[id(parameter)] for parameter in self.accumulators}
        self._factors = make_factor_sums(self.model, self.names, factors, block)
        self.batches = 0
        self._count: Tensor | int = 0
        self._labels, self._grouping, self._num_samples, self._datum = labels, grouping, num_samples, datum
        self._task, self._forward, self._noise, self._seed = task, forward, noise, seed
        self._verify = verify and grouping == "example"
        self._verification: Verification | None = None
        self._restored = False

    @property
    def examples(self) -> int:
        """Number of examples added so far; of tokens with ``datum="token"``."""
        return int(self._count)

    @property
    def sharded(self) -> bool:
        """True if the accumulators are sharded over several processes."""
        return any(is_sharded(total) for total in self.accumulators.values())

    def add(self, batch: Batch, number: int | None = None, *, counts: bool = True) -> None:
        """Add the squared gradients of a batch.

        Args:
            batch: A batch of this process. All processes of a sharded model must call this equally often.
            number: Number of the batch, which seeds its drawn labels; by default the number of batches before.
            counts: If False, only take part in collectives (this rank has run out of batches).

        Raises:
            ConfigError: The batch lacks labels, or its outputs do not fit ``datum``.
            UnsupportedStateError: The model mixes its examples.
        """
        with eval_mode(self.model):
            self._task = infer_task(self._task, self.model, batch)
            number = self.batches if number is None else number
            if self._grouping == "batch":
                outputs = run_model(self.model, batch, self._task, self._forward)
                output_gradients = self._output_gradients(outputs, batch_seed(self._seed, number), counts)
                accumulate_joint(self.accumulators, outputs, output_gradients, self._host_sums, self._factors)
                added = self._size_of(outputs)
            else:
                added = self._add_per_example(batch, number, counts)
        if self._host_sums is not None:
            self._host_sums.wait()
        self.batches += 1
        if counts:
            self._count = self._count + added

    def _size_of(self, outputs: Outputs) -> Tensor | int:
        """Return the number of data in a batch."""
        return outputs.size if self._datum == "example" else outputs.tokens

    def _add_per_example(self, batch: Batch, number: int, counts: bool) -> Tensor | int:
        """Add the squares of per-example gradients, by a CUDA graph where that is faster; return the number of data."""
        taped_model = TapedModel(self.model, self._task, self._forward)
        if self._verification is None:
            self._verification = self._verify_first_batch(taped_model, batch)
        seed = batch_seed(self._seed, number)
        # The first batch compiles kernels, which says nothing of the time of its launches.
        if self._graphs is None or not counts or not self.batches:
            return self._add_eagerly(taped_model, batch, seed, counts)
        return self._graphs.add(
            batch,
            seed,
            self._graph_state(),
            lambda mark: self._add_eagerly(taped_model, batch, seed, counts, mark),
            lambda batch, generator: self._add_captured(taped_model, batch, generator),
            (lambda: self._check_alone(taped_model, batch)) if self._verify else None,
            due=self._is_checked(),
        )

    def _graph_state(self) -> Any:
        """Return everything besides the batch that a captured pass depends on."""
        known, device = self._verification, next(iter(self.accumulators)).device.type
        assert known is not None
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        memory = tuple(tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers()))
        return len(known.verified), len(known.owner_of), narrow, memory

    def _add_captured(self, taped_model: TapedModel, batch: Batch, generator: torch.Generator) -> Tensor | int:
        """Add a batch without waiting for the device; return the number of data.

        Raises:
            UnsupportedStateError: The batch uses parameters that no earlier batch used, or the pass writes to a buffer.
        """
        versions = [buffer._version for buffer in self.model.buffers()]
        outputs, new = self._accumulate(taped_model, batch, self._verified_accumulators(), generator)
        if new:
            raise UnsupportedStateError("a batch must use the parameters of the batches before, but has further ones")
        if versions != [buffer._version for buffer in self.model.buffers()]:  # a check would write to it meanwhile
            raise UnsupportedStateError("a forward pass must not write to a buffer of the model, but one does")
        return self._size_of(outputs)

    def _verified_accumulators(self) -> Accumulators:
        """Return the accumulators of the parameters whose squares are verified."""
        assert self._verification is not None
        return {p: total for p, total in self.accumulators.items() if p in self._verification.verified}

    def _accumulate(
        self,
        taped_model: TapedModel,
        batch: Batch,
        accumulators: Accumulators,
        draw: int | torch.Generator,
        counts: bool = True,
        mark: Callable[[], None] | None = None,
        check: bool = False,
    ) -> tuple[Outputs, set[nn.Parameter]]:
        """Add a batch to some accumulators; return its outputs, and the parameters that have yet to be verified.

        ``mark`` is called between forward and backward pass. ``check`` asks for a check that no layer mixes examples.
        """
        known = self._verification
        assert known is not None
        with taped_model.run(batch, known.owner_of, known.broadcast_modules) as (tape, outputs):
            if mark is not None:
                mark()
            if check:
                check_mixing(tape, outputs, self.names, self.batches, retain_graph=True)
            others = [p for p in tape.without_call(self.accumulators) if not is_sharded(p)]
            reached: set[nn.Parameter] = set()
            output_gradients = self._output_gradients(outputs, draw, counts)
            used_directly = accumulate_batch(
                accumulators, tape, outputs, output_gradients, others, None, reached, self._host_sums, self._factors
            )
        return outputs, (reached - known.verified) | set(used_directly)

    def _add_eagerly(
        self,
        taped_model: TapedModel,
        batch: Batch,
        seed: int,
        counts: bool,
        mark: Callable[[], None] | None = None,
    ) -> Tensor | int:
        """Add a batch, and verify the parameters that it uses first; return the number of data."""
        accumulators = self._verified_accumulators()
        while True:
            known = self._verification
            assert known is not None
            outputs, new = self._accumulate(taped_model, batch, accumulators, seed, counts, mark, self._is_checked())
            # No earlier example used these parameters (a rarely chosen expert, say): verify them now.
            if not new:
                return self._size_of(outputs)
            if not self._verify or new <= known.verified:
                self._refuse_unverified(new.pop())
            accumulators = {p: self.accumulators[p] for p in new}
            scratch = zero_accumulators(self.accumulators, self._host)
            found = verify(taped_model, batch, known, count_examples(batch), scratch)
            self._verification = replace(found, verified=known.verified | found.verified | new)

    def _verify_first_batch(self, taped_model: TapedModel, batch: Batch) -> Verification:
        """Return the verification of the first batch; the accumulators serve as scratch memory while they are zero."""
        if not self._verify:
            return Verification({}, None, set(self.accumulators))
        if self._restored:
            return verify(taped_model, batch, scratch=zero_accumulators(self.accumulators, self._host))
        try:
            return verify(taped_model, batch, scratch=self.accumulators)
        finally:
            for total in self.accumulators.values():
                total.zero_()

    def _is_checked(self) -> bool:
        """Return True at the second batch, the fourth, the eighth and so on."""
        return self._verify and self.batches > 0 and not self.batches & (self.batches + 1)

    def _check_alone(self, taped_model: TapedModel, batch: Batch) -> None:
        """Check a batch that a graph adds."""
        known = self._verification
        assert known is not None
        with taped_model.run(batch, known.owner_of, known.broadcast_modules) as (tape, outputs):
            check_mixing(tape, outputs, self.names, self.batches, retain_graph=False)

    def _output_gradients(self, outputs: Outputs, draw: int | torch.Generator, counts: bool) -> Iterator[Tensor]:
        """Yield the gradients at the outputs of a batch; zeros for a batch that does not count.

        ``draw`` is the seed of drawn labels, or the generator that draws them.
        """
        if self._datum == "token" and outputs.values.ndim < 3:
            raise ConfigError(
                f"datum token needs a model with outputs for each token, found shape {list(outputs.values.shape)}; "
                "take datum example"
            )
        generator = torch.Generator(outputs.values.device).manual_seed(draw) if isinstance(draw, int) else draw
        for output_gradient in outputs.output_gradients(
            self._labels, self._num_samples, self._noise, generator, self._datum
        ):
            yield output_gradient if counts else output_gradient * 0

    def _refuse_unverified(self, parameter: nn.Parameter) -> None:
        """Raise for a parameter that gets a gradient without a recorded call."""
        raise UnsupportedStateError(
            f"{self.names[parameter]} must be used by a call of the module that registers it, but is used outside it; "
            "give examples that use it first, with verify=True, or freeze it"
        )

    def reduce(self) -> None:
        """Sum the accumulators over all processes, which must all call this; each then has the total."""
        if not dist.is_initialized():
            return
        for parameter, total in self.accumulators.items():
            if not is_sharded(total):  # sharded ones already are sums over all processes
                sum_over_processes(total, parameter.device)
        for parameter, _, total in self._factors or ():
            sum_over_processes(total, parameter.device)
        device = next(iter(self.accumulators)).device
        count = torch.as_tensor(self._count, dtype=torch.int64, device=device).clone()
        dist.all_reduce(count)
        self._count = count

    def reset(self) -> None:
        """Set the accumulators to zero, on ranks whose sums rank 0 has after :meth:`reduce`."""
        for total in self.named_sums().values():
            if not is_sharded(total):
                total.zero_()
        self._count = 0

    def divide(self) -> None:
        """Divide the sums by the number of examples."""
        examples = self.examples
        for total in self.named_sums().values():
            total /= examples

    def named_accumulators(self) -> dict[str, Tensor]:
        """Return name in memory -> accumulator."""
        return {self.names[p]: total for p, total in self.accumulators.items()}

    def named_sums(self) -> dict[str, Tensor]:
        """Return name -> running sum: the accumulators, and the sums of factors as ``NAME.SIDE``."""
        factors = {f"{self.names[p]}.{side}": total for p, side, total in self._factors or ()}
        return self.named_accumulators() | factors

    def restore(self, read: Callable[[str], Tensor], examples: int = 0) -> None:
        """Load the accumulators of a checkpoint; sharded ones take this rank's shard.

        Args:
            read: Function from a name in memory to its whole accumulator.
            examples: Number of examples in the accumulators.
        """
        for name, total in self.named_sums().items():
            total.copy_(distributed_like(read(name), total, total.dtype))
        self._restored, self._count = True, examples

    def fisher(
        self,
        on_rank_zero: OnRankZero | None = None,
        *,
        statistic: Statistic,
        num_examples: int | None = None,
        steps: int | None = None,
        optimizer: OptimizerInfo | None = None,
    ) -> Fisher:
        """Return the accumulators under their names on disk, as views, not copies.

        Args:
            on_rank_zero: Gathers sharded accumulators one by one when rank 0 reads them; without it all processes
                gather all of them on the CPU.
            statistic: Statistic that the accumulators are.
            num_examples: Number of examples in the accumulators.
            steps: Number of updates of a moving average.
            optimizer: Decay of a moving average.
        """
        named = self.named_accumulators()
        tensors: dict[str, Any] = {}
        for name, total in named.items():
            if not is_sharded(total):
                tensors[name] = total
            else:
                tensors[name] = on_rank_zero.add(total) if on_rank_zero else gathered(total).cpu()
        store, aliases, adapter = disk_store(self.model, tensors)
        config = FisherConfig(
            estimator=ESTIMATORS[self._labels, self._grouping],
            parameters="adapter" if adapter else "model",
            coverage=Coverage(
                **{"with": len(store.infos)}, without={other: f"{TIED}{name}" for other, name in aliases.items()}
            ),
            datum=self._datum,
            statistic=statistic,
            num_examples=num_examples,
            steps=steps,
            optimizer=optimizer,
        )
        fisher = Fisher(store, config, aliases)
        if self._factors is None:
            return fisher
        return attach_sums(fisher, self.model, self.names, self._factors, statistic, num_examples)
