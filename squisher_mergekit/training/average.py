"""Moving average of the per-example Fisher during training."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from squisher_mergekit._deprecated import deprecated_names
from squisher_mergekit.errors import ConfigError
from squisher_mergekit.estimators.accumulator import FisherAccumulator
from squisher_mergekit.estimators.output_gradients import Labels
from squisher_mergekit.estimators.tasks import count_examples
from squisher_mergekit.fisher import compact
from squisher_mergekit.fisher.by_parameter import in_memory
from squisher_mergekit.fisher.config import OptimizerInfo
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import to_dtype
from squisher_mergekit.models.fingerprint import fingerprint
from squisher_mergekit.models.parameters import unwrap_model
from squisher_mergekit.tensors.sharded import OnRankZero, is_sharded
from squisher_mergekit.training.writing import attempt, checkpoint_of, replace_fisher, resumed_from

AVERAGE_FOLDER = "fisher_average"


class FisherAverageCallback(TrainerCallback):  # type: ignore[misc]
    """Callback of the Hugging Face Trainer that averages ``F = beta F + (1 - beta) mean_n g_n^2`` over some batches.

    Adam squares the mean gradient of a batch; this average squares the gradient of each example. It costs one forward
    and backward pass per batch that it uses, and one check at the first batch (``scripts/benchmarks/average.py``
    measures the cost). The first process writes the average, or its mean over the processes, into ``fisher_average`` in
    each checkpoint and in the output folder. A resumed run continues from the average in its checkpoint.

    Args:
        beta: Decay per batch, between 0 and 1.
        share: Share of the optimizer steps whose first batch is used.
        labels: ``true`` or ``sampled``, see :func:`~squisher_mergekit.estimate_fisher`.
        dtype: Dtype of the file: float32 or bfloat16.
        compress: Compression of the file, as for :func:`~squisher_mergekit.extract`.

    Raises:
        ConfigError: An argument is out of range.

    Source: the moving average of the true Fisher, named as future work in "Fishers for Free?" (Li et al., ICML 2025).

    Example:
        >>> callback = FisherAverageCallback(beta=0.9, share=0.1)
        >>> # Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    """

    def __init__(
        self,
        beta: float = 0.95,
        share: float = 0.05,
        labels: Labels = "true",
        dtype: torch.dtype | str = torch.float32,
        compress: str | None = None,
    ) -> None:
        if not 0 < beta < 1:
            raise ConfigError(f"beta must be between 0 and 1, found {beta}")
        if not 0 < share <= 1:
            raise ConfigError(f"share must be above 0 and at most 1, found {share}")
        self.beta, self.every, self.labels = beta, max(1, round(1 / share)), labels
        self.dtype, self.compress = to_dtype(dtype), compress
        compact.check_name(compress)
        self.updates = 0
        self._accumulator: FisherAccumulator | None = None  # its tensors are the average
        self._batch: dict[str, Any] | None = None
        self._due = False
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Register the hook that records batches; load the average of a resumed checkpoint."""
        model = unwrap_model(kwargs["model"])
        self._accumulator = FisherAccumulator(model, self.labels, seed=args.seed)
        self.updates = 0
        if state.global_step:
            attempt("the average of the resumed checkpoint was not loaded", lambda: self._resume(args, state))
        self._hook = model.register_forward_pre_hook(self._record, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the first batch of this step if the step is due."""
        self._due = state.global_step % self.every == 0
        self._batch = None

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._due and module.training and not args:
            self._batch = {key: value for key, value in kwargs.items() if isinstance(value, Tensor)}
            self._due = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the recorded batch to the average, before the weights change."""
        batch, accumulator, self._batch = self._batch, self._accumulator, None
        if batch is None or accumulator is None:
            return
        share = (1 - self.beta) / _global_size(count_examples(batch), accumulator)
        for average in accumulator.accumulators.values():
            average.mul_(self.beta / share)
        accumulator.add(_beside(accumulator, batch))
        for average in accumulator.accumulators.values():
            average.mul_(share)
        self.updates += 1

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the average into the checkpoint."""
        self._write(checkpoint_of(args, state))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the average into the output folder."""
        if self._hook is not None:
            self._hook.remove()
        self._write(Path(args.output_dir))

    def fisher(self) -> Fisher:
        """Return the present average; its tensors are not copied and change with the next batch.

        Raises:
            ConfigError: No batch has been added.
        """
        if self._accumulator is None or not self.updates:
            raise ConfigError("an average needs at least one batch, and none was seen; train first")
        return self._fisher(self._accumulator, None)

    def _fisher(self, accumulator: FisherAccumulator, on_rank_zero: OnRankZero | None) -> Fisher:
        info = OptimizerInfo(beta2=self.beta)
        return accumulator.fisher(on_rank_zero, statistic="ema", steps=self.updates, optimizer=info)

    def _write(self, folder: Path) -> None:
        if self._accumulator is not None and self.updates:
            accumulator = self._accumulator
            attempt(
                f"no average of the Fisher could be written to {folder}", lambda: self._replace(accumulator, folder)
            )

    def _replace(self, accumulator: FisherAccumulator, folder: Path) -> None:
        _mean_of_processes(accumulator)
        on_rank_zero = OnRankZero()
        fisher = self._fisher(accumulator, on_rank_zero)

        def work() -> None:
            weights_fingerprint = fingerprint(folder) if folder.is_dir() else None
            fisher.config = fisher.config.model_copy(update={"weights_fingerprint": weights_fingerprint})
            replace_fisher(fisher, folder / AVERAGE_FOLDER, self.dtype, self.compress)

        on_rank_zero.run(work)

    def _resume(self, args: Any, state: Any) -> None:
        """Load the average of the resumed checkpoint."""
        fisher = read_fisher(resumed_from(args, state) / AVERAGE_FOLDER)
        beta = fisher.config.optimizer.beta2 if fisher.config.optimizer else None
        if beta != self.beta:
            raise ConfigError(f"the saved average must be one with beta {self.beta}, found {beta}; give that beta")
        assert self._accumulator is not None
        tensors, steps = in_memory(self._accumulator.model, fisher)
        try:
            self._accumulator.restore(tensors.__getitem__)
        except BaseException:
            self._accumulator.reset()
            raise
        self.updates = max(steps.values())


def _beside(accumulator: FisherAccumulator, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch on the model's GPU: DataParallel gives each of its copies a part on another one."""
    first, *others = {parameter.device for parameter in accumulator.accumulators}
    return {key: value if others else value.to(first) for key, value in batch.items()}


def _global_size(size: int, accumulator: FisherAccumulator) -> int:
    """Return the number of examples in a batch, over all processes if the accumulators are sharded."""
    if not accumulator.sharded:
        return size
    count = torch.tensor(size, device=next(iter(accumulator.accumulators)).device)
    dist.all_reduce(count)
    return int(count)


def _mean_of_processes(accumulator: FisherAccumulator) -> None:
    """Replace the averages by their mean over the processes; sharded averages include all processes already."""
    if dist.is_initialized():
        for average in accumulator.accumulators.values():
            if not is_sharded(average):
                dist.all_reduce(average)
                average /= dist.get_world_size()


if not TYPE_CHECKING:
    __getattr__ = deprecated_names(__name__, {"FisherAverage": f"{__name__}:FisherAverageCallback"})
