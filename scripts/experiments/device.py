"""Device of the models of an experiment: the CPU, or a GPU that ``--device`` names."""

from collections.abc import Mapping

import torch
from torch import Tensor

_chosen = torch.device("cpu")


def use(name: str) -> None:
    """Choose the device of models, texts and merges.

    Args:
        name: Name of the device, such as ``cuda``.
    """
    global _chosen
    _chosen = torch.device(name)


def chosen() -> torch.device:
    """Return the chosen device."""
    return _chosen


def card() -> str | None:
    """Return the name of the chosen GPU, or None for the CPU."""
    return None if _chosen.type == "cpu" else torch.cuda.get_device_name(_chosen)


def placed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the chosen device."""
    return {name: tensor.to(_chosen) for name, tensor in tensors.items()}
