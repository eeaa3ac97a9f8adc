"""Factors of the gradients of matrices, recorded during training."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.errors import ConfigError, UnsupportedStateError
from squisher_mergekit.fisher.config import FactorsInfo
from squisher_mergekit.fisher.factors.blocks import block_shape, second_moments
from squisher_mergekit.fisher.factors.mapping import SIDES, Side
from squisher_mergekit.fisher.factors.sides import (
    attach,
    check_count,
    check_settings,
    names_on_disk,
    sides_in_memory,
)
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.parameters import parameters_of, uses_deepspeed, uses_fsdp1
from squisher_mergekit.tensors.sharded import is_sharded
from squisher_mergekit.training.gradients import gradient_norm

LOG = logging.getLogger("squisher_mergekit")


class GradientFactors:
    """Moving averages of ``G G^T`` (rows) and ``G^T G`` (columns) of the gradient G of each matrix, in blocks.

    ``L_t = beta L_(t-1) + (1 - beta) G_t G_t^T``, ``L_0 = 0``, over every k-th optimizer step. Rows are those of a
    matrix ``[out, in]``; for a Conv1D of GPT-2, which is ``[in, out]``, ``rows`` records over the second axis.
    Embeddings, vectors and tensors with other axes have no factor. :meth:`update` reads the present gradients, after
    accumulation and clipping. The averages are on the devices of the parameters, in float32 (float64 for float64).

    Args:
        model: The model in training, wrapped or not.
        factors: ``rows``, ``columns``, or ``kron`` for both.
        every: Number of optimizer steps per recorded gradient.
        block: Number of consecutive rows (or columns) in a block.
        beta: Decay per recorded gradient, between 0 and 1.

    Raises:
        ConfigError: An argument is out of its range.
        UnsupportedStateError: The gradients are in flat buffers or sharded (FSDP, DeepSpeed).

    Example:
        >>> model = nn.Linear(2, 1)
        >>> factors = GradientFactors(model, "columns", beta=0.5)
        >>> model(torch.tensor([[1.0, 2.0]])).sum().backward()
        >>> factors.update()
        True
        >>> factors.moments["columns"]["weight"]
        tensor([[[0.5000, 1.0000],
                 [1.0000, 2.0000]]])
    """

    def __init__(
        self, model: nn.Module, factors: str = "rows", every: int = 1, block: int = 128, beta: float = 0.95
    ) -> None:
        check_arguments(factors, every, block, beta)
        if uses_fsdp1(model) or uses_deepspeed(model, None) or any(map(is_sharded, model.parameters())):
            raise UnsupportedStateError(
                "factors need the whole gradient of each matrix, but FSDP and DeepSpeed shard it; train with DDP or "
                "in one process, or estimate factors from data (squisher estimate --factors)"
            )
        self.model, self.every, self.block, self.beta = model, every, block, beta
        self.steps = 0
        self.moments: dict[Side, dict[str, Tensor]] = {"rows": {}, "columns": {}}
        self._seen = 0
        self._sides = sides_in_memory(model, factors)
        self._parameters = parameters_of(model)

    @torch.no_grad()
    def update(self, norm: Tensor | None = None, step: int | None = None) -> bool:
        """Add the present gradients if the step is due; call the method before ``optimizer.step()``.

        Args:
            norm: L2 norm of all gradients, if it is known already.
            step: Number of optimizer steps so far; by default the number of earlier calls.

        Returns:
            True if the gradients were added; False if the step is not due, there are none, or one is not finite.
        """
        number = self._seen if step is None else step
        self._seen = number + 1
        if number % self.every:
            return False
        trained = {name: p for name, p in self._parameters.items() if name in self._sides and p.grad is not None}
        norm = gradient_norm(trained.values()) if norm is None else norm
        if not trained or not torch.isfinite(norm).item():
            return False
        for name, parameter in trained.items():
            gradient: Any = parameter.grad
            gradient = gradient.to(torch.promote_types(parameter.dtype, torch.float32))
            for side in self._sides[name]:
                moment = second_moments(gradient if side == "rows" else gradient.mT, self.block)
                average = self.moments[side].setdefault(name, torch.zeros_like(moment))
                average.mul_(self.beta).add_(moment, alpha=1 - self.beta)
        self.steps += 1
        return True

    def attach(self, fisher: Fisher) -> Fisher:
        """Return a Fisher of the model with the factors; those of matrices that it lacks are left out."""
        if not self.steps:
            LOG.warning("no factors were recorded: no step had gradients; give a smaller every=, or train longer")
            return fisher
        info = FactorsInfo(source="recorded", statistic="ema", decay=self.beta, every=self.every, steps=self.steps)
        return attach(self.model, fisher, self.moments, info)

    def load_fisher(self, fisher: Fisher) -> None:
        """Continue from the factors of a saved Fisher.

        Raises:
            ConfigError: The Fisher has no recorded factors, or factors of another decay, spacing or block.
        """
        info = fisher.factors.info
        found = None if info is None else (info.source, info.decay, info.every)
        if info is None or found != ("recorded", self.beta, self.every):
            raise ConfigError(
                f"the saved factors must be recorded ones with beta {self.beta} every {self.every} steps, found "
                f"{found}; give those settings"
            )
        loaded: dict[Side, dict[str, Tensor]] = {"rows": {}, "columns": {}}
        for name, stored in names_on_disk(self.model, fisher).items():
            for side in self._sides.get(name, ()):
                if stored not in fisher.factors.side(side):
                    continue
                factor, parameter = fisher.factors.side(side)[stored], self._parameters[name]
                wanted = block_shape(parameter.shape[SIDES.index(side)], self.block)
                if tuple(factor.shape) != wanted:
                    raise ConfigError(
                        f"the saved factors must have blocks of {self.block}, but that of {stored} has the shape "
                        f"{list(factor.shape)}; give block={factor.shape[-1]}"
                    )
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                loaded[side][name] = factor.to(parameter.device, dtype, copy=True)
        self.moments, self.steps = loaded, info.steps or 0


def check_arguments(factors: str, every: int, block: int, beta: float) -> None:
    """Refuse arguments of :class:`GradientFactors` that are out of their range.

    Raises:
        ConfigError: An argument is out of its range.
    """
    check_settings(factors, block)
    check_count("every", every)
    if not 0 < beta < 1:
        raise ConfigError(f"beta of factors must be between 0 and 1, found {beta}")
