"""A moving average of the per-example Fisher, kept while training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.estimators.accumulator import FisherAccumulator
from squisher_mergekit.estimators.output_gradients import Labels
from squisher_mergekit.estimators.tasks import count_examples
from squisher_mergekit.fisher import compact
from squisher_mergekit.fisher.by_parameter import in_memory
from squisher_mergekit.fisher.config import OptimizerInfo
from squisher_mergekit.fisher.files import read_fisher, to_dtype
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.fingerprint import fingerprint
from squisher_mergekit.models.parameters import unwrap_model
from squisher_mergekit.tensors.sharded import OnRankZero, is_sharded
from squisher_mergekit.training.writing import attempt, checkpoint_of, replace_fisher, resumed_from

AVERAGE_FOLDER = "fisher_average"


class FisherAverage(TrainerCallback):  # type: ignore[misc]
    """Keeps ``F = beta F + (1 - beta) mean_n g_n^2`` over a share of the batches, for the Hugging Face Trainer.

    Adam squares the mean gradient of a batch; this squares the gradient of each example. It costs a pass of its own
    over each batch that it looks at, and once a check (``scripts/bench_average`` measures it). Written into
    ``fisher_average`` in each checkpoint and in the output folder, by the first process; of several processes the
    mean. A resumed run goes on from its checkpoint's.

    Args:
        beta: Decay a batch.
        share: Of the optimizer's steps, of which the first batch is looked at.
        labels: ``true`` or ``sampled``, see :func:`~squisher_mergekit.estimate_fisher`.
        dtype: float32 or bfloat16, of the file.
        compress: As for :func:`~squisher_mergekit.extract`.

    Raises:
        ConfigError: An argument is out of its range.

    Source: the moving average of the true Fisher that the paper names as future work.

    Example:
        >>> callback = FisherAverage(beta=0.9, share=0.1)
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
        self._sums: FisherAccumulator | None = None  # its accumulators are the average
        self._batch: dict[str, Any] | None = None
        self._due = False
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what the model is given from now on."""
        model = unwrap_model(kwargs["model"])
        self._sums = FisherAccumulator(model, self.labels, seed=args.seed)
        self.updates = 0
        if state.global_step:
            attempt("the resumed checkpoint's average was not taken up", lambda: self._resume(args, state))
        self._hook = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See whether this step's first batch is to be kept."""
        self._due = state.global_step % self.every == 0
        self._batch = None

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._due and module.training and not args:
            self._batch = {key: value for key, value in kwargs.items() if isinstance(value, Tensor)}
            self._due = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the batch into the average, at the weights that its gradient is of."""
        batch, sums, self._batch = self._batch, self._sums, None
        if batch is None or sums is None:
            return
        share = (1 - self.beta) / _everywhere(count_examples(batch), sums)
        for total in sums.accumulators.values():
            total.mul_(self.beta / share)
        sums.add(batch)
        for total in sums.accumulators.values():
            total.mul_(share)
        self.updates += 1

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write into the checkpoint."""
        self._write(checkpoint_of(args, state))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write into the output folder."""
        if self._hook is not None:
            self._hook.remove()
        self._write(Path(args.output_dir))

    def fisher(self) -> Fisher:
        """Return the average as it is now, in its living tensors: they change with the next batch.

        Raises:
            ConfigError: No batch has been seen.
        """
        if self._sums is None or not self.updates:
            raise ConfigError("an average needs at least one batch, and none was seen; train first")
        return self._fisher(self._sums, None)

    def _fisher(self, sums: FisherAccumulator, together: OnRankZero | None) -> Fisher:
        info = OptimizerInfo(beta2=self.beta)
        return sums.fisher(together, statistic="ema", steps=self.updates, optimizer=info)

    def _write(self, folder: Path) -> None:
        if self._sums is not None and self.updates:
            sums = self._sums
            attempt(f"no average of the Fisher could be written to {folder}", lambda: self._replace(sums, folder))

    def _replace(self, sums: FisherAccumulator, folder: Path) -> None:
        _mean_of_processes(sums)
        together = OnRankZero()
        fisher = self._fisher(sums, together)

        def work() -> None:
            mark = fingerprint(folder) if folder.is_dir() else None
            fisher.config = fisher.config.model_copy(update={"weights_fingerprint": mark})
            replace_fisher(fisher, folder / AVERAGE_FOLDER, self.dtype, self.compress)

        together.run(work)

    def _resume(self, args: Any, state: Any) -> None:
        """Go on from the average in the checkpoint that training goes on from."""
        fisher = read_fisher(resumed_from(args, state) / AVERAGE_FOLDER)
        beta = fisher.config.optimizer.beta2 if fisher.config.optimizer else None
        if beta != self.beta:
            raise ConfigError(f"the average must be one with beta {self.beta}, found {beta}; give that one")
        assert self._sums is not None
        tensors, steps = in_memory(self._sums.model, fisher)
        self._sums.restore(tensors.__getitem__)
        self.updates = max(steps.values())


def _everywhere(size: int, sums: FisherAccumulator) -> int:
    """Return how many examples are added at once: of sharded sums those of all processes."""
    if not sums.sharded:
        return size
    count = torch.tensor(size, device=next(iter(sums.accumulators)).device)
    dist.all_reduce(count)
    return int(count)


def _mean_of_processes(sums: FisherAccumulator) -> None:
    """Give all processes the mean of their averages; sharded ones are of all already."""
    if dist.is_initialized():
        for total in sums.accumulators.values():
            if not is_sharded(total):
                dist.all_reduce(total)
                total /= dist.get_world_size()
