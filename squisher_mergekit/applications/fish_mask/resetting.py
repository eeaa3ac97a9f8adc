"""Reset of the weights outside a mask to their pre-trained values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from squisher_mergekit.applications.fish_mask.bases import base_of
from squisher_mergekit.applications.fish_mask.heads import weights_in_memory
from squisher_mergekit.applications.masks import Mask
from squisher_mergekit.errors import MismatchError
from squisher_mergekit.models.parameters import parameters_of
from squisher_mergekit.models.weights import Weights, check_alike
from squisher_mergekit.tensors.safetensors import TensorInfo


def reset_values(tuned: Tensor, base: Tensor, mask: Tensor) -> Tensor:
    """Return the trained values inside a mask and the pre-trained ones outside: ``m theta + (1 - m) theta_0``.

    Args:
        tuned: Weight after training.
        base: Weight before training, of the same shape.
        mask: bool, of the same shape.

    Source: section 3.4 of "Fishers for Free?" (Li et al., ICML 2025).

    Example:
        >>> reset_values(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0]), torch.tensor([True, False])).tolist()
        [1.0, 6.0]
    """
    return torch.where(mask, tuned, base)


@torch.no_grad()
def reset(model: nn.Module, base: nn.Module | Mapping[str, Tensor], mask: Mask | Mapping[str, Tensor]) -> None:
    """Reset the weights of a model outside a mask to their pre-trained values, bit for bit.

    Args:
        model: The trained model, changed in place.
        base: The model before training, or its parameters by name in memory.
        mask: A mask, or a mapping from names in memory to bool tensors.

    Raises:
        MismatchError: The mask or the base does not fit the model, or the base lacks a parameter that the mask does not
            keep whole. The model is then unchanged.

    Example:
        >>> model, base = nn.Linear(2, 1, bias=False), {"weight": torch.tensor([[5.0, 6.0]])}
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 2.0]]))
        >>> reset(model, base, {"weight": torch.tensor([[True, False]])})
        >>> model.weight.tolist()
        [[1.0, 6.0]]
    """
    masked = mask.by_parameter(model) if isinstance(mask, Mask) else mask
    parameters = parameters_of(model)
    before = {name: p.detach() for name, p in parameters_of(base).items()} if isinstance(base, nn.Module) else base
    tuned, base_weights = (
        weights_in_memory({name: p.detach() for name, p in parameters.items()}),
        weights_in_memory(before),
    )
    view = ResetView(
        tuned, base_of(base_weights, tuned), Mask({name: kept.cpu().bool() for name, kept in masked.items()})
    )
    view.check()
    for name, parameter in parameters.items():
        if name in view.base.infos and not view.kept_whole(name):
            kept, original = masked[name].to(parameter.device), view.base.read(name).to(parameter.device)
            parameter.copy_(reset_values(parameter, original, kept))


@dataclass(frozen=True)
class ResetView:
    """Trained weights that are reset outside a mask as they are read.

    Attributes:
        tuned: The trained weights.
        base: The pre-trained weights, by the same names.
        mask: The mask.
    """

    tuned: Weights
    base: Weights
    mask: Mask

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name -> header of the tensor."""
        return self.tuned.infos

    def check(self) -> None:
        """Check the names and shapes of mask and base.

        Raises:
            MismatchError: A name or shape differs, or the base has no value for a weight to reset.
        """
        self.mask.check(self.tuned.infos, self.tuned.folder)
        shared = []
        for name in self.mask:
            theirs = self.base.infos.get(name)
            if theirs is not None and theirs.shape == self.tuned.infos[name].shape:
                shared.append(name)
            elif not self.kept_whole(name):
                found = "has none" if theirs is None else f"has {list(theirs.shape)}"
                raise MismatchError(
                    f"a weight off the mask takes its pre-trained value, but of {name}, "
                    f"{list(self.tuned.infos[name].shape)}, {self.base.folder} {found}; give the model that this one "
                    "was trained from, or a mask that keeps it whole (--head)"
                )
        check_alike(self.tuned, self.base, shared)

    def kept_whole(self, name: str) -> bool:
        """Return True if the mask keeps all of a tensor."""
        return bool(self.mask[name].all())

    def read(self, name: str) -> Tensor:
        """Return one tensor; a tensor that the mask does not name is not reset."""
        tuned, base = self.tuned.read(name), self.base.infos.get(name)
        if name not in self.mask or base is None or base.shape != tuple(tuned.shape):
            return tuned
        return reset_values(tuned, self.base.read(name), self.mask[name])
