"""Elastic weight consolidation with the Hugging Face Trainer: each run is a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from transformers import TrainerCallback

from squisher_mergekit.applications.ewc.penalty import EWCPenalty
from squisher_mergekit.errors import ConfigError, UnsupportedStateError
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.parameters import unwrap_model, uses_deepspeed, uses_fsdp1
from squisher_mergekit.optimizers.live import TrainingInfo, squisher_of, states_of, unwrap_optimizer
from squisher_mergekit.tensors.sharded import OnRankZero, sharded_modules
from squisher_mergekit.training.callback import examples_per_step
from squisher_mergekit.training.gradients import GradientSquares
from squisher_mergekit.training.writing import attempt, checkpoint_of, resumed_from

SQUARES_FOLDER = "ewc_squares"
Source = Literal["separate", "optimizer"]


def live_squisher(model: nn.Module, optimizer: Any, examples_per_step: float | None = None) -> Fisher:
    """Return the second moments of an optimizer in memory as a Fisher.

    The tensors are not copied: they change with the next step. After a task under a penalty they include the gradient
    of the penalty, so that the importance of a weight grows from task to task with its own penalty. A moving average of
    the task's gradient (:class:`~squisher_mergekit.training.GradientSquares`) does not.

    Args:
        model: The model in training, wrapped or not.
        optimizer: The optimizer that trains the model.
        examples_per_step: Examples per step, over all processes and accumulation.

    Raises:
        RefusedError: The optimizer has no second moment, or it does not fit the model; or the model is sharded.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> model(torch.tensor([[1.0, 2.0]])).sum().backward()
        >>> optimizer.step()
        >>> live_squisher(model, optimizer).scaled("weight")
        tensor([[1., 4.]])
    """
    if sharded_modules(model) or uses_fsdp1(model):
        raise UnsupportedStateError(
            "a Fisher in memory must have whole tensors, but FSDP shards them; take save_squisher, and "
            "load_fisher in all processes"
        )
    bare = [unwrap_optimizer(optimizer)]
    states = states_of(model, bare, OnRankZero())
    return squisher_of(model, bare, states, None, TrainingInfo(examples_per_step=examples_per_step))[0]


class EWCCallback(TrainerCallback):  # type: ignore[misc]
    """Callback that trains a task under the penalty of earlier tasks, and adds the task to the penalty at the end.

    One penalty and one callback serve all tasks, with one Trainer per task. The callback adds the gradient of the
    penalty once per optimizer step: after accumulation and the average over processes, before clipping. The logged loss
    is that of the task. Each line of the Trainer's ``log_history`` gets ``ewc_penalty`` and ``ewc_ratio`` (see
    :meth:`~.EWCPenalty.ratio`); reporters such as TensorBoard copy the line earlier and do not get them.

    At the end of training the callback adds the weights and their Fisher to the penalty. The Fisher is a moving average
    of the squared gradient, without the penalty and before clipping. Each checkpoint has the average in
    ``ewc_squares``, and a resumed run continues from it. The penalty itself does not change within a task: save its
    ``state_dict`` between tasks, and load it before a run resumes.

    Args:
        penalty: Penalty of the earlier tasks; training adds the new task.
        source: ``separate`` uses that average. ``optimizer`` uses the optimizer's second moments, which include the
            gradient of the penalty, clipping, and earlier tasks of the same optimizer.
        beta: Decay of the average.
        num_examples: Number of examples of a task, for ``scale="dataset"``.
        at_end: Add the task when training ends; if False, call :meth:`finish_task`.

    Raises:
        ConfigError: An argument is out of range.

    Example:
        >>> penalty = EWCPenalty(lam=100.0)
        >>> callback = EWCCallback(penalty)
        >>> # for task in tasks:
        >>> #     Trainer(model, args, train_dataset=task, callbacks=[callback]).train()
    """

    def __init__(
        self,
        penalty: EWCPenalty,
        *,
        source: Source = "separate",
        beta: float = 0.999,
        num_examples: int | None = None,
        at_end: bool = True,
    ) -> None:
        if source not in ("separate", "optimizer"):
            raise ConfigError(f"source must be separate or optimizer, found {source!r}")
        GradientSquares(nn.Module(), beta)  # raises for a wrong decay before training begins
        self.penalty, self.source, self.beta = penalty, source, beta
        self.num_examples, self.at_end = num_examples, at_end
        self.squares: GradientSquares | None = None
        self._model: nn.Module | None = None
        self._optimizer: Any = None
        self._batch: float | None = None
        self._due = False
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Register the hook on the model's outputs; load the average of a resumed checkpoint."""
        model, self._optimizer = kwargs["model"], kwargs["optimizer"]
        self._model = unwrap_model(model)
        if uses_fsdp1(model) or uses_deepspeed(model, self._optimizer) or sharded_modules(model):
            raise UnsupportedStateError(
                "EWCCallback needs the whole gradient of each parameter, but FSDP or DeepSpeed shards it; "
                "train with DDP, or with FSDP2 in a loop of your own (EWCPenalty.add_gradient)"
            )
        self._batch = examples_per_step(args, state, model)
        self.squares = GradientSquares(model, self.beta) if self.source == "separate" else None
        if state.global_step and self.squares is not None:
            squares = self.squares
            attempt(
                "the average of the resumed checkpoint was not loaded",
                lambda: squares.load_fisher(read_fisher(resumed_from(args, state) / SQUARES_FOLDER)),
            )
        self._remove()
        # Hooks on the engine of autograd cannot be compiled.
        watch: Any = torch.compiler.disable(self._watch_outputs)  # type: ignore[no-untyped-call]
        self._hook = self._model.register_forward_hook(watch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the last backward pass of this step."""
        self._due = True

    def _watch_outputs(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """Register hooks that add the penalty after the last backward pass of a step."""
        if not (self._due and module.training and _ends_a_step()):
            return
        for tensor in _tensors(outputs):  # the loss may use any of them
            if tensor.requires_grad:
                reached: Any = tensor
                reached.register_hook(lambda _: _when_gradients_are_whole(self._add))

    def _add(self) -> None:
        model = self._model
        if not self._due or model is None:
            return
        self._due = False
        scale = _loss_scale(self._optimizer)
        _multiply(model, 1 / scale)
        if self.squares is not None:
            self.squares.update()
        self.penalty.add_gradient(model)
        _multiply(model, scale)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise if the penalty was not added in this step.

        Raises:
            UnsupportedStateError: No backward pass reached the outputs of the model.
        """
        if self._due:
            raise UnsupportedStateError(
                "EWC adds its gradient when the backward pass from the model's outputs has ended, but none came by the "
                f"outputs of {type(self._model).__name__}; let it return tensors, or take add_gradient in an own loop"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the penalty and its ratio to the log."""
        if not logs or "loss" not in logs or not self.penalty.tasks:
            return
        with torch.no_grad():
            found = {"ewc_penalty": float(self.penalty(kwargs["model"])), "ewc_ratio": self.penalty.ratio()}
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the average into the checkpoint."""
        squares, folder = self.squares, checkpoint_of(args, state)
        if squares is not None and squares.squares:
            attempt(
                f"no average could be written to {folder}",
                lambda: squares.save(folder / SQUARES_FOLDER, weights=folder, examples_per_step=self._batch),
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the task to the penalty."""
        self._remove()
        if self.at_end:
            self.finish_task(kwargs["model"])

    def finish_task(self, model: nn.Module) -> None:
        """Add the present weights and their Fisher to the penalty.

        Args:
            model: The trained model.

        Raises:
            RefusedError: There is no Fisher, or it does not fit the model.
        """
        if self.squares is not None:
            fisher: Mapping[str, Tensor] = self.squares.fisher()
        else:
            fisher = live_squisher(model, self._optimizer)
        self.penalty.add(model, fisher, self.num_examples, examples_per_step=self._batch)

    def _remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _ends_a_step() -> bool:
    """Return True if an optimizer step follows this batch, from accelerate's gradient state."""
    from accelerate.state import GradientState

    return bool(GradientState().sync_gradients)


def _tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors in the outputs of a model."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = tuple(outputs.values())
    return [tensor for output in outputs for tensor in _tensors(output)] if isinstance(outputs, tuple | list) else []


def _when_gradients_are_whole(work: Callable[[], None]) -> None:
    """Run a function at the end of the present backward pass, when all gradients are complete.

    DDP and FSDP2 complete the gradients in callbacks of the engine; a callback queued by a callback runs after those.
    """
    engine: Any = Variable._execution_engine
    engine.queue_callback(lambda: engine.queue_callback(work))


def _loss_scale(optimizer: Any) -> float:
    """Return the loss scale of float16 training; a power of two, so that dividing by it is exact."""
    scaler = getattr(optimizer, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


@torch.no_grad()
def _multiply(model: nn.Module, factor: float) -> None:
    """Multiply all gradients in place."""
    if factor != 1.0:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
