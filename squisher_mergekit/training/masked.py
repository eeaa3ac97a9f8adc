"""Training inside a mask: all other weights keep their values, bit for bit."""

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

# Suffix of torch.nn.utils.prune for the name of a masked weight.
_PRUNED = "_orig"


class MaskedTraining:
    """Training of the weights in a mask: the others keep, bit for bit, their values from the time of :meth:`attach`.

    For a FISH mask those are the pre-trained values, for a pruned network 0. A zero gradient does not keep a weight in
    place, as weight decay and momentum move it as well. Therefore

    * gradients are masked during the backward pass, before accumulation, averaging over processes and clipping, so that
      the gradient norm is that of the trained weights;
    * on attaching, the optimizer's statistics of the other weights (momenta, second moments) become 0;
    * after each ``optimizer.step()`` the other weights are restored.

    The mask takes a byte per weight. Each tensor that is not trained whole takes a copy, unless its other weights are
    all 0. Buffers, such as the running statistics of BatchNorm, change. Parameters that are frozen on attaching must
    stay frozen, and the optimizer's state must be loaded before. Averages over rows or columns (Adafactor) are not
    cleared, as they have no entry for a single weight.

    Args:
        model: The model in training, wrapped by DDP, accelerate or torch.compile or not.
        optimizer: A torch optimizer or a sequence of several, wrapped by accelerate or not.
        mask: A :class:`~squisher_mergekit.applications.masks.Mask` or its file, by names on disk; or a mapping from
            names in memory to bool tensors, true where weights are trained. It must cover every trained parameter.

    Raises:
        MismatchError: The mask lacks a trained parameter, has an unknown name, or a shape differs; or the optimizer
            trains no parameter of the model.
        UnsupportedStateError: Weights are sharded or in flat buffers (FSDP, DeepSpeed, tensor parallelism).

    Source: section 3.4 of "Fishers for Free?" (Li et al., ICML 2025); Sung et al., 2021, train in this way.

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
        self.optimizers = [unwrap_optimizer(each) for each in several]
        read = read_mask(mask) if isinstance(mask, str | Path) else mask
        trained = {name: p for name, p in parameters_of(model).items() if p.requires_grad}
        _check_optimizers(self.optimizers, trained.values())
        masks = _by_name(model, read, trained)
        # A tensor that is trained whole needs no hook.
        partial = {name: kept for name, kept in masks.items() if not bool(kept.all())}
        self._off = [(trained[name], ~kept.to(trained[name].device)) for name, kept in partial.items()]
        self._held: list[HeldParameter] = []
        self._hooks: list[Any] = []

    def attach(self) -> MaskedTraining:
        """Hold the weights outside the mask at their present values."""
        if self._hooks:
            return self
        self._held = [HeldParameter.now(parameter, off) for parameter, off in self._off]
        for held in self._held:
            parameter: Any = held.parameter
            self._hooks.append(parameter.register_hook(held.masked))
            held.clear(optimizer.state.get(held.parameter, {}) for optimizer in self.optimizers)
        self._hooks += [optimizer.register_step_post_hook(self._restore) for optimizer in self.optimizers]
        return self

    def detach(self) -> None:
        """Release all weights; weights, gradients and the optimizer's state do not change."""
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
    def _restore(self, *_: Any) -> None:
        for held in self._held:
            torch.where(held.off, held.value, held.parameter, out=held.parameter)


@dataclass(frozen=True)
class HeldParameter:
    """Parameter whose entries outside the mask are held.

    Attributes:
        parameter: The parameter.
        off: bool, true at the held entries.
        value: Values of the held entries, 0 elsewhere; a scalar 0 if all are 0.
    """

    parameter: nn.Parameter
    off: Tensor
    value: Tensor

    @classmethod
    def now(cls, parameter: nn.Parameter, off: Tensor) -> HeldParameter:
        """Return a parameter with the present values of its entries outside the mask."""
        value = parameter.detach().masked_fill(~off, 0)
        # Compare bits: a negative zero must be kept.
        nonzero = bool(value.reshape(-1).view(torch.uint8).any())
        return cls(parameter, off, value if nonzero else value.new_zeros(()))

    def masked(self, gradient: Tensor) -> Tensor:
        """Return the gradient with 0 at the held entries, even for NaN."""
        if not gradient.is_sparse:
            return gradient.masked_fill(self.off, 0)
        rows, values = gradient._indices(), gradient._values()
        kept = values.masked_fill(self.off[tuple(rows)], 0)
        return torch.sparse_coo_tensor(rows, kept, gradient.shape, check_invariants=False)

    @torch.no_grad()
    def clear(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Set the gradient and the optimizer's statistics of the held entries to 0."""
        if self.parameter.grad is not None:
            self.parameter.grad = self.masked(self.parameter.grad)
        for state in states:
            for key, tensor in state.items():
                if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape == self.parameter.shape:
                    tensor.masked_fill_(self.off.to(tensor.device), _zero_of(key, tensor, state))


def _zero_of(key: str, tensor: Tensor, state: Mapping[str, Any]) -> int:
    """Return the entry that stands for 0: an 8-bit state of bitsandbytes has codes, whose values are in ``qmap``."""
    levels = state.get(f"qmap{key.removeprefix('state')}")
    return int(levels.abs().argmin()) if tensor.dtype == torch.uint8 and levels is not None else 0


class MaskCallback(TrainerCallback):  # type: ignore[misc]
    """Callback of the Hugging Face Trainer for training inside a mask (see :class:`MaskedTraining`).

    All other weights keep their values from the start of training, or from the checkpoint of a resumed run. If an error
    ends the training, call :meth:`detach` before you train the model without the mask.

    Args:
        mask: The mask, as for :class:`MaskedTraining`.

    Example:
        >>> callback = MaskCallback({"weight": torch.tensor([[True, False]])})
        >>> # Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    """

    def __init__(self, mask: Mask | Mapping[str, Tensor] | str | Path) -> None:
        self.mask = read_mask(mask) if isinstance(mask, str | Path) else mask
        self._training: MaskedTraining | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hold the weights outside the mask; the state of a checkpoint is loaded by then."""
        self.detach()
        self._training = MaskedTraining(kwargs["model"], kwargs["optimizer"], self.mask).attach()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Release all weights."""
        self.detach()

    def detach(self) -> None:
        """Release all weights."""
        if self._training is not None:
            self._training.detach()
        self._training = None


def _refuse_parts(model: nn.Module, optimizers: Sequence[Any]) -> None:
    kind = None
    if uses_fsdp1(model) or any(is_sharded(parameter) for parameter in model.parameters()):
        kind = "FSDP or tensor parallelism holds them in parts"
    elif any(uses_deepspeed(model, optimizer) for optimizer in optimizers):
        kind = "DeepSpeed holds them in flat buffers"
    elif any(type(unwrap_optimizer(each)).__name__ == "ZeroRedundancyOptimizer" for each in optimizers):
        kind = "ZeroRedundancyOptimizer spreads their state over the processes"
    if kind is not None:
        raise UnsupportedStateError(f"weights in a mask must be whole in each process, but {kind}; train with DDP")


def _check_optimizers(optimizers: Sequence[Any], parameters: Any) -> None:
    trained = {id(parameter) for parameter in parameters}
    for optimizer in optimizers:
        if not hasattr(optimizer, "register_step_post_hook"):
            raise UnsupportedStateError(
                f"an optimizer must be one of torch (torch.optim.Optimizer), found {type(optimizer).__name__}; "
                "its steps cannot be undone outside the mask; take an optimizer of torch"
            )
        if not any(id(parameter) in trained for group in optimizer.param_groups for parameter in group["params"]):
            raise MismatchError(
                f"an optimizer must train parameters of the model, but {type(optimizer).__name__} has none of them; "
                "make it after the model is wrapped and moved, from model.parameters()"
            )


def _by_name(
    model: nn.Module, mask: Mask | Mapping[str, Tensor], trained: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return the mask of each trained parameter."""
    given = mask.by_parameter(model) if isinstance(mask, Mask) else mask
    known = parameters_of(model)
    names = {name: name for name in known} | {_unpruned(name): name for name in known}
    unknown = next((name for name in given if name not in names), None)
    if unknown is not None:
        raise MismatchError(
            f"a mask must be of the model's parameters, but {unknown} is none of {type(unwrap_model(model)).__name__}'s"
            "; give the mask of this model"
        )
    found = {names[name]: tensor for name, tensor in given.items() if names[name] in trained}
    for name, parameter in trained.items():
        tensor = found.get(name)
        if tensor is None or tensor.shape != parameter.shape or tensor.dtype != torch.bool:
            found_shape = "missing" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"
            raise MismatchError(
                f"a mask must have a bool tensor for each parameter that is trained, but {name} is "
                f"{list(parameter.shape)} and its mask {found_shape}; give one, or freeze the parameter"
            )
    return found


def _unpruned(name: str) -> str:
    """Return the name on disk of a weight that torch.nn.utils.prune masks."""
    return name.removesuffix(_PRUNED)
