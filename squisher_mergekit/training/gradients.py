"""Moving average of the squared gradient, independent of the optimizer."""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.errors import ConfigError, MismatchError, UnsupportedStateError
from squisher_mergekit.fisher.by_parameter import in_memory
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.parameters import describe, parameters_of, uses_deepspeed, uses_fsdp1
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.live import LAYOUT, TrainingInfo, fisher_of, unwrap_optimizer
from squisher_mergekit.optimizers.second_moments import Moment
from squisher_mergekit.optimizers.slots import OptimizerSlot
from squisher_mergekit.tensors.lazy import MaybeLazy
from squisher_mergekit.tensors.safetensors import check_shape
from squisher_mergekit.tensors.sharded import OnRankZero, distributed_like, is_sharded
from squisher_mergekit.training.writing import Attach, SavedFisher, replace_fisher


class GradientSquares(SavedFisher):
    """Moving average of the squared gradient: ``a_t = beta a_(t-1) + (1 - beta) g_t^2``, ``a_0 = 0``.

    Like Adam's second moment, it averages the squared batch gradient over about ``1 / (1 - beta)`` steps. It has its
    own memory, and survives a reset of the optimizer. :meth:`update` reads the present gradients: after clipping the
    clipped ones, before ``unscale_`` of a GradScaler the scaled ones. With a penalty in the loss (EWC), call
    :meth:`update` after the backward pass of the task's loss and before that of the penalty, so that the average
    excludes the penalty.

    The averages are on the devices of the parameters, in float32 (float64 for float64); each process has the average of
    its own shards.

    Args:
        model: The model in training, wrapped or not. Create the average after wrapping, before the first step.
        beta: Decay, between 0 and 1.

    Raises:
        ConfigError: ``beta`` is out of range.
        UnsupportedStateError: The gradients are in flat buffers (FSDP1, DeepSpeed).

    Example:
        >>> model = nn.Linear(2, 1)
        >>> squares = GradientSquares(model, beta=0.75)
        >>> model(torch.tensor([[1.0, 2.0]])).sum().backward()
        >>> squares.update()
        True
        >>> squares.fisher().scaled("weight")
        tensor([[1., 4.]])
    """

    def __init__(self, model: nn.Module, beta: float = 0.999) -> None:
        if not 0 < beta < 1:
            raise ConfigError(f"beta must be between 0 and 1, found {beta}")
        if uses_fsdp1(model) or uses_deepspeed(model, None):
            raise UnsupportedStateError(
                "a moving average of gradients needs those of each parameter, but FSDP1 and DeepSpeed keep them in "
                "flat buffers; train with DDP or FSDP2, or save the optimizer's second moments (save_squisher)"
            )
        self.model = model
        self.beta = beta
        self.squares: dict[str, Tensor] = {}
        self.steps: dict[str, int] = {}
        self._parameters = parameters_of(model)

    @torch.no_grad()
    def update(self, norm: Tensor | None = None) -> bool:
        """Add the present gradients; call the method in all processes, before ``optimizer.step()``.

        Args:
            norm: L2 norm of all gradients, if it is known already.

        Returns:
            True if the gradients were added; False if there are none, or one is not finite (an overflow of float16).
        """
        trained = {name: p for name, p in self._parameters.items() if p.grad is not None}
        if not trained:
            return False
        norm = gradient_norm(trained.values()) if norm is None else norm
        if not torch.isfinite(norm).item():
            return False
        for name, parameter in trained.items():
            if name not in self.squares:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                self.squares[name], self.steps[name] = torch.zeros_like(parameter, dtype=dtype), 0
            average: Any = self.squares[name]
            gradient: Any = parameter.grad
            if is_sharded(average):
                gradient = gradient.redistribute(placements=average.placements).to_local()
                average = average.to_local()
            gradient = gradient.to(average.dtype)
            average.mul_(self.beta).addcmul_(gradient, gradient, value=1 - self.beta)
            self.steps[name] += 1
        return True

    def fisher(self, weights: str | Path | None = None, info: TrainingInfo | None = None) -> Fisher:
        """Return the average as a Fisher by names on disk; the model must not be sharded.

        The tensors are not copied: they change with the next update.

        Args:
            weights: Folder of the weights saved at this step, if any.
            info: Metadata of the training run.

        Raises:
            MismatchError: No gradient was added yet, or the average does not fit the weights.
        """
        return self._fisher(self.squares, None if weights is None else Path(weights), info or TrainingInfo())

    def write(
        self,
        out: Path,
        weights: Path | None,
        info: TrainingInfo,
        dtype: torch.dtype,
        compress: str | None,
        attach: Attach | None = None,
    ) -> None:
        """Write the average, with factors if ``attach`` adds some; :meth:`save` with its arguments resolved."""
        on_rank_zero = OnRankZero()
        stored = {name: on_rank_zero.add(t) if is_sharded(t) else t for name, t in self.squares.items()}

        def work() -> None:
            fisher = self._fisher(stored, weights, info)
            replace_fisher(fisher if attach is None else attach(fisher), out, dtype, compress)

        on_rank_zero.run(work)

    def state_dict(self) -> dict[str, Any]:
        """Return ``beta``, and ``steps`` and ``squares`` by names in memory; sharded tensors stay sharded."""
        return {"beta": self.beta, "steps": dict(self.steps), "squares": dict(self.squares)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state of :meth:`state_dict`, in place of the present one.

        Args:
            state: The state.

        Raises:
            ConfigError: The state has another decay.
            MismatchError: A name or a shape does not fit the model.
        """
        if state["beta"] != self.beta:
            raise ConfigError(f"the average must be one with beta {self.beta}, found {state['beta']}; give that beta")
        for name, tensor in state["squares"].items():
            if name not in self._parameters:
                raise MismatchError(
                    f"an average must fit the model's parameters, but {name} is none of them; give that model"
                )
            check_shape(name, tuple(tensor.shape), tuple(self._parameters[name].shape), "the state of GradientSquares")
        squares = {}
        for name, tensor in state["squares"].items():
            parameter = self._parameters[name]
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            squares[name] = distributed_like(tensor, parameter, dtype).clone()
        self.squares, self.steps = squares, dict(state["steps"])

    def load_fisher(self, fisher: Fisher) -> None:
        """Load a saved average; bit for bit if the file is in float32 and not compressed.

        Args:
            fisher: The saved average.

        Raises:
            ConfigError: The average has another decay.
            MismatchError: A shape does not fit the model.
        """
        squares, steps = in_memory(self.model, fisher)
        beta = fisher.config.optimizer.beta2 if fisher.config.optimizer else None
        self.load_state_dict({"beta": beta, "squares": squares, "steps": steps})

    def _fisher(self, stored: Mapping[str, MaybeLazy], weights: Path | None, info: TrainingInfo) -> Fisher:
        kind = Moment("squares", "ema", self.beta)
        if not stored:
            raise MismatchError(
                "a moving average needs at least one gradient, found none; call update() after backward()"
            )
        slots = {
            name: OptimizerSlot(name, name, kind, tensor, self.steps[name], tuple(tensor.shape))
            for name, tensor in stored.items()
        }
        on_disk = None if weights is None else Weights(weights)
        described = describe(self.model, on_disk.infos if on_disk is not None else ())
        saved = RawState((weights or Path("training")) / "the moving average", (), layout=LAYOUT)
        fisher = fisher_of(slots, described, saved, on_disk, info)
        fisher.config = fisher.config.model_copy(update={"estimator": "ema_empirical"})
        return fisher


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the L2 norm of all gradients as one vector, over all shards.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradient_norm([weight])
        tensor(5.)
    """
    meshes: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            meshes[getattr(parameter.grad, "device_mesh", None)].append(parameter.grad)
    norms: list[Any] = [nn.utils.get_total_norm(gradients) for gradients in meshes.values()]
    whole = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]
    if not whole:
        return torch.tensor(0.0)
    joined: Tensor = torch.stack([norm.to(whole[0].device, torch.float32) for norm in whole])
    total: Tensor = torch.linalg.vector_norm(joined)
    return total


def unscale(optimizer: Any) -> None:
    """Divide the gradients by the loss scale of float16 training, as the next step would do, unless this is done.

    Args:
        optimizer: An optimizer, wrapped by accelerate or not; without a GradScaler nothing happens.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> unscale(torch.optim.SGD([weight]))
    """
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None and scaler.is_enabled():
        with contextlib.suppress(RuntimeError):  # unscaled already, for clipping
            scaler.unscale_(unwrap_optimizer(optimizer))
