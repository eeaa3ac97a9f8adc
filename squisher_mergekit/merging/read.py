"""One tensor of a Fisher, read and brought to the scale that a merge wants."""

from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.fisher.config import FisherConfig, Scaling
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging.density import Rows
from squisher_mergekit.tensors.safetensors import MemoryStore


class LoadedFisher(TypedDict):
    """A raw tensor (None: no information) and the factor that brings it to the scale of the merge.

    For a ``density`` below 1: ``scores``, the tensor before the floor, None if that is the same; ``origin``, theta_0,
    None if the base is an input itself; ``rows``, of a re-ordered vocabulary, see :class:`.density.Rows`.
    """

    tensor: Tensor | None
    scale: float
    name: str
    location: str
    density: float
    scores: Tensor | None
    origin: Tensor | None
    rows: Rows | None


def load_tensor(
    source: Mapping[str, Tensor] | None,
    name: str,
    *,
    scaling: Scaling,
    normalize: str,
    floor: float,
    fisher_scale: float,
    density: float = 1.0,
) -> LoadedFisher:
    """Read one tensor of a Fisher.

    The factor is ``fisher_scale * debiasing / normalizer``; it stays apart from the tensor, which is a view of the
    mapped file unless an offset or a floor has to be applied: ``max(F, floor * mean(F))``.

    Args:
        source: A Fisher, or a plain mapping of tensors that are taken as they are; None for no information.
        name: The tensor's name in ``source``.
        scaling: As in the YAML.
        normalize: ``none``, ``mean`` or ``l2`` of the whole model.
        floor: Relative to the mean over the tensor.
        fisher_scale: Factor on this model's Fisher.
        density: Share of this model's task vector that is kept.

    Returns:
        The tensor and its factor.

    Raises:
        ConfigError: The normalizer is 0, or a number that the scaling needs is not recorded.
    """
    if source is None:
        return no_fisher(name)
    fisher = source if isinstance(source, Fisher) else Fisher(MemoryStore(source), FisherConfig(statistic="mean"))
    stored = fisher.resolve(name) or name
    scale = fisher_scale * fisher.factor(stored, scaling)
    if normalize != "none":
        value = fisher.moments(scaling)[0 if normalize == "mean" else 1]
        if not value > 0:
            raise ConfigError(f"normalize: {normalize} needs a positive Fisher, but all of {fisher.location} is 0")
        scale /= value
    tensor = fisher[stored]
    if fisher.config.offset(scaling):
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        tensor = wide - fisher.offset(stored, scaling)
    scores = None
    if floor > 0 and tensor.numel():
        scores = tensor if density < 1 else None
        tensor = tensor.clamp_min(floor * tensor.mean(dtype=torch.float64).item())
    none = no_fisher(stored, fisher.location)
    return {**none, "tensor": tensor, "scale": scale, "density": density, "scores": scores}


def no_fisher(name: str, location: str = "") -> LoadedFisher:
    """Return what stands for a Fisher where there is none."""
    return LoadedFisher(
        tensor=None, scale=1.0, name=name, location=location, density=1.0, scores=None, origin=None, rows=None
    )
