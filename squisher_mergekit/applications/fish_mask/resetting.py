"""A trained model whose weights off a mask have their pre-trained values back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from squisher_mergekit.applications.fish_mask.bases import base_of
from squisher_mergekit.applications.fish_mask.heads import of_tensors
from squisher_mergekit.applications.masks import Mask
from squisher_mergekit.errors import MismatchError
from squisher_mergekit.models.parameters import parameters_of
from squisher_mergekit.models.weights import Weights, check_alike
from squisher_mergekit.tensors.safetensors import TensorInfo


def reset_values(tuned: Tensor, base: Tensor, mask: Tensor) -> Tensor:
    """Return the trained values on the mask, and the pre-trained ones off it: ``m theta + (1 - m) theta_0``, by choice.

    Args:
        tuned: The weight after training.
        base: Before it.
        mask: bool; all shaped alike.

    Source: section 3.4 of "Fishers for Free?" (Li et al., ICML 2025).

    Example:
        >>> reset_values(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0]), torch.tensor([True, False])).tolist()
        [1.0, 6.0]
    """
    return torch.where(mask, tuned, base)


@torch.no_grad()
def reset(model: nn.Module, base: nn.Module | Mapping[str, Tensor], mask: Mask | Mapping[str, Tensor]) -> None:
    """Give a live model's weights off the mask their pre-trained values back, to the bit.

    Args:
        model: That was trained; it is changed.
        base: The model that it was trained from, or its parameters by name in memory.
        mask: By the names on disk, or a mapping from the names in memory to bool tensors.

    Raises:
        MismatchError: The mask or the base is of another model; or the base lacks a parameter that is not kept whole.
            The model is then as before.

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
    tuned, below = of_tensors({name: p.detach() for name, p in parameters.items()}), of_tensors(before)
    view = Reset(tuned, base_of(below, tuned), Mask({name: one.cpu().bool() for name, one in masked.items()}))
    view.check()
    for name, parameter in parameters.items():
        if name in view.base.infos and not view.kept_whole(name):
            mask_here, base_here = masked[name].to(parameter.device), view.base.read(name).to(parameter.device)
            parameter.copy_(reset_values(parameter, base_here, mask_here))


@dataclass(frozen=True)
class Reset:
    """A trained model whose weights off a mask have their pre-trained values, worked out when read."""

    tuned: Weights
    base: Weights
    mask: Mask

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name -> header."""
        return self.tuned.infos

    def check(self) -> None:
        """Refuse a mask or base of another model, by headers and what is kept whole.

        Raises:
            MismatchError: A name or shape differs, or the base has no value for a weight that is to have it.
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
        """Return whether all of a tensor is kept."""
        return bool(self.mask[name].all())

    def read(self, name: str) -> Tensor:
        """Return one tensor; what the mask does not name is the trained model's."""
        tuned, base = self.tuned.read(name), self.base.infos.get(name)
        if name not in self.mask or base is None or base.shape != tuple(tuned.shape):
            return tuned
        return reset_values(tuned, self.base.read(name), self.mask[name])
