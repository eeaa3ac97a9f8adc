"""Train some weights of a model and leave the others as they are, to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from squisher_mergekit.applications.masks import Mask, read_mask
from squisher_mergekit.errors import MismatchError, UnsupportedStateError
from squisher_mergekit.models.parameters import parameters_of, unwrap_model, uses_deepspeed, uses_fsdp1
from squisher_mergekit.optimizers.live import unwrap_optimizer
from squisher_mergekit.tensors.sharded import is_sharded

# What torch.nn.utils.prune calls a weight whose name it has taken.
_PRUNED = "_orig"


class MaskedTraining:
    """Change only the weights in a mask: the others keep, bit for bit, the value that they have when it is attached.

    For a FISH mask that is the pre-trained value, for a pruned network 0. A gradient of 0 does not hold a weight:
    decay and momentum move it as well. So

    * gradients are masked within the backward pass, before they are accumulated, averaged over processes or clipped:
      a norm is that of the live weights alone;
    * once, what the optimizer keeps of the other weights from before (momenta, second moments) becomes 0;
    * after each ``optimizer.step()`` the other weights are put back.

    It costs a byte a weight for the mask, and a copy of each tensor that is not kept whole, or where all that is off
    the mask is 0, none. Buffers, such as the running statistics of BatchNorm, are no weights: they move. What is frozen
    when it is attached must stay so, and load the optimizer's state before. Averages over a tensor's rows or columns
    (Adafactor) are not cleared; they have no entry of one weight.

    Args:
        model: The model in training, wrapped by DDP, accelerate or torch.compile or not.
        optimizer: Any of torch's, one or a sequence of several, wrapped by accelerate or not.
        mask: A :class:`~squisher_mergekit.applications.masks.Mask` or its file, by the names on disk; or a mapping from
            the names in memory to bool tensors, true where weights are trained. Of each parameter that is trained.

    Raises:
        MismatchError: The mask lacks a parameter that is trained, names one that the model has not, or a shape differs;
            or the optimizer trains none of the model's.
        UnsupportedStateError: Weights lie in parts or flat buffers (FSDP, DeepSpeed, tensor parallelism).

    Source: section 3.4 of "Fishers for Free?" (Li et al., ICML 2025); Sung et al., 2021, train this way.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> before = model.weight.detach().clone()
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        >>> with MaskedTraining(model, optimizer, {"weight": torch.tensor([[True, False]])}):
        ...     model(torch.tensor([[1.0, 2.0]])).sum().backward()
        ...     optimizer.step()
        >>> (model.weight == before).tolist()
        [[False, True]]
    """

    def __init__(self, model: nn.Module, optimizer: Any, mask: Mask | Mapping[str, Tensor] | str | Path) -> None:
        several = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        _refuse_parts(model, several)
        self.optimizers = [unwrap_optimizer(one) for one in several]
        read = read_mask(mask) if isinstance(mask, str | Path) else mask
        live = {name: p for name, p in parameters_of(model).items() if p.requires_grad}
        _check_optimizers(self.optimizers, live.values())
        masks = _by_name(model, read, live)
        # Where all of a tensor is trained nothing has to be done.
        self._off = [(live[name], ~one.to(live[name].device)) for name, one in masks.items() if not bool(one.all())]
        self._held: list[_Held] = []
        self._hooks: list[Any] = []

    def attach(self) -> MaskedTraining:
        """Hold the weights off the mask from now on."""
        if self._hooks:
            return self
        self._held = [_Held.now(parameter, off) for parameter, off in self._off]
        for held in self._held:
            parameter: Any = held.parameter
            self._hooks.append(parameter.register_hook(held.masked))
            held.clear(optimizer.state.get(held.parameter, {}) for optimizer in self.optimizers)
        self._hooks += [one.register_step_post_hook(self._put_back) for one in self.optimizers]
        return self

    def detach(self) -> None:
        """Hold nothing any more; weights, gradients and the optimizer's state stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._held = [], []

    def __enter__(self) -> MaskedTraining:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @torch.no_grad()
    def _put_back(self, *of_the_hook: Any) -> None:
        for held in self._held:
            torch.where(held.off, held.value, held.parameter, out=held.parameter)


@dataclass(frozen=True)
class _Held:
    """A parameter, which of its entries are off the mask, and their values; 0 elsewhere."""

    parameter: nn.Parameter
    off: Tensor
    value: Tensor

    @classmethod
    def now(cls, parameter: nn.Parameter, off: Tensor) -> _Held:
        value = parameter.detach().masked_fill(~off, 0)
        # The bits are looked at: a zero with a sign is another one.
        something = bool(value.reshape(-1).view(torch.uint8).any())
        return cls(parameter, off, value if something else value.new_zeros(()))

    def masked(self, gradient: Tensor) -> Tensor:
        """Return a gradient that is 0 off the mask, whatever it was there."""
        if not gradient.is_sparse:
            return gradient.masked_fill(self.off, 0)
        rows, values = gradient._indices(), gradient._values()
        live = values.masked_fill(self.off[tuple(rows)], 0)
        return torch.sparse_coo_tensor(rows, live, gradient.shape, check_invariants=False)

    @torch.no_grad()
    def clear(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Set to 0 what was gathered of the entries off the mask: the gradient, and what optimizers keep."""
        if self.parameter.grad is not None:
            self.parameter.grad = self.masked(self.parameter.grad)
        for tensor in (one for state in states for one in state.values()):
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape == self.parameter.shape:
                tensor.masked_fill_(self.off.to(tensor.device), 0)


class MaskCallback(TrainerCallback):  # type: ignore[misc]
    """Train only the weights in a mask, with the Hugging Face Trainer (see :class:`MaskedTraining`).

    The others keep the value that they have when training begins or is taken up again from a checkpoint. If training is
    broken off by an error, call :meth:`detach` before the model is trained otherwise.

    Args:
        mask: As for :class:`MaskedTraining`.

    Example:
        >>> callback = MaskCallback({"weight": torch.tensor([[True, False]])})
        >>> # Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    """

    def __init__(self, mask: Mask | Mapping[str, Tensor] | str | Path) -> None:
        self.mask = read_mask(mask) if isinstance(mask, str | Path) else mask
        self._training: MaskedTraining | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hold the weights off the mask, after the state of a checkpoint was loaded."""
        self.detach()
        self._training = MaskedTraining(kwargs["model"], kwargs["optimizer"], self.mask).attach()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hold nothing any more."""
        self.detach()

    def detach(self) -> None:
        """Hold nothing any more."""
        if self._training is not None:
            self._training.detach()
        self._training = None


def _refuse_parts(model: nn.Module, optimizers: Sequence[Any]) -> None:
    kind = None
    if uses_fsdp1(model) or any(is_sharded(parameter) for parameter in model.parameters()):
        kind = "FSDP or tensor parallelism holds them in parts"
    elif any(uses_deepspeed(model, one) for one in optimizers):
        kind = "DeepSpeed holds them in flat buffers"
    elif any(type(unwrap_optimizer(one)).__name__ == "ZeroRedundancyOptimizer" for one in optimizers):
        kind = "ZeroRedundancyOptimizer spreads their state over the processes"
    if kind is not None:
        raise UnsupportedStateError(f"weights in a mask must be whole in each process, but {kind}; train with DDP")


def _check_optimizers(optimizers: Sequence[Any], parameters: Any) -> None:
    trained = {id(parameter) for parameter in parameters}
    for optimizer in optimizers:
        if not hasattr(optimizer, "register_step_post_hook"):
            raise UnsupportedStateError(
                f"an optimizer must be one of torch (torch.optim.Optimizer), found {type(optimizer).__name__}; "
                "what it does after a step could not be undone"
            )
        if not any(id(parameter) in trained for group in optimizer.param_groups for parameter in group["params"]):
            raise MismatchError(
                f"an optimizer must train parameters of the model, but {type(optimizer).__name__} has none of them; "
                "make it after the model is wrapped and moved, from model.parameters()"
            )


def _by_name(
    model: nn.Module, mask: Mask | Mapping[str, Tensor], live: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return the mask of each parameter that is trained."""
    given = mask.by_parameter(model) if isinstance(mask, Mask) else mask
    known = parameters_of(model)
    names = {name: name for name in known} | {_unpruned(name): name for name in known}
    strange = next((name for name in given if name not in names), None)
    if strange is not None:
        raise MismatchError(
            f"a mask must be of the model's parameters, but {strange} is none of {type(unwrap_model(model)).__name__}'s"
            "; give the mask of this model"
        )
    found = {names[name]: tensor for name, tensor in given.items() if names[name] in live}
    for name, parameter in live.items():
        tensor = found.get(name)
        if tensor is None or tensor.shape != parameter.shape or tensor.dtype != torch.bool:
            what = "missing" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"
            raise MismatchError(
                f"a mask must have a bool tensor for each parameter that is trained, but {name} is "
                f"{list(parameter.shape)} and its mask {what}; give one, or freeze the parameter"
            )
    return found


def _unpruned(name: str) -> str:
    """Return the name that a weight has on disk if torch.nn.utils.prune masks it."""
    return name.removesuffix(_PRUNED)
