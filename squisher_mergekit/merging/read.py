"""One tensor of a Fisher, read at the scale of a merge."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.fisher.config import FisherConfig, Scaling
from squisher_mergekit.fisher.factors.mapping import SIDES, Side
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging.coupling.recorded import read_side
from squisher_mergekit.merging.density import Rows
from squisher_mergekit.tensors.devices.transfer import moved
from squisher_mergekit.tensors.safetensors import MemoryStore
from squisher_mergekit.tensors.topk import Cut


@dataclass(frozen=True)
class LoadedFisher:
    """One tensor of a Fisher, and the factor that brings it to the scale of the merge.

    Attributes:
        name: Name in the Fisher.
        location: Place of the Fisher, for messages.
        tensor: The raw tensor; None if there is no information.
        scale: The factor.
        density: Share of the task vector that is kept.
        rank_scale: Factor on F that makes scores of one model comparable, for a density below 1.
        scores: The tensor before the floor, for a density below 1; None if it is the same.
        origin: theta_0, for a density below 1; None if the base is an input itself.
        rows: Rows of a re-ordered vocabulary, for a density below 1.
        factors: Recorded factors over the rows and over the columns; None for a side without.
        cut: Threshold of the whole model for this tensor; None if the tensor keeps its own share.
    """

    name: str
    location: str = ""
    tensor: Tensor | None = None
    scale: float = 1.0
    density: float = 1.0
    rank_scale: float = 1.0
    scores: Tensor | None = None
    origin: Tensor | None = None
    rows: Rows | None = None
    factors: tuple[Tensor | None, Tensor | None] = (None, None)
    cut: Cut | None = None

    def to(self, device: torch.device) -> "LoadedFisher":
        """Return the same with all tensors on a device."""

        def there(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else moved(tensor, device)

        rows = None
        if self.rows is not None:
            shared, unbased, axis = self.rows
            rows = Rows(shared.to(device), unbased.to(device), axis)
        tensor, scores, origin = there(self.tensor), there(self.scores), there(self.origin)
        factors = (there(self.factors[0]), there(self.factors[1]))
        return replace(self, tensor=tensor, scores=scores, origin=origin, rows=rows, factors=factors)

    def padded(self, axis: int, size: int) -> "LoadedFisher":
        """Return the same with rows of 0 added along an axis, up to a size."""

        def grown(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            shape = [size - length if i == axis else length for i, length in enumerate(tensor.shape)]
            return torch.cat([tensor, tensor.new_zeros(shape)], axis)

        return replace(self, tensor=grown(self.tensor), scores=grown(self.scores))


def load_tensor(
    source: Mapping[str, Tensor] | None,
    name: str,
    *,
    scaling: Scaling,
    normalize: str,
    floor: float,
    fisher_scale: float,
    density: float = 1.0,
    density_by: str = "fisher",
    sides: Sequence[Side] = (),
    ranks: Fisher | None = None,
) -> LoadedFisher:
    """Read one tensor of a Fisher.

    The factor is ``fisher_scale * debiasing / normalizer``. The tensor is a view of the mapped file unless an offset or
    a floor changes it: ``max(F, floor * mean(F))``.

    Args:
        source: A Fisher, or a plain mapping of tensors that need no scale; None for no information.
        name: Name of the tensor in ``source``.
        scaling: Scale of the Fisher, as in the YAML.
        normalize: Divisor over the whole model: ``none``, ``mean`` or ``l2``.
        floor: Smallest F, relative to the mean over the tensor.
        fisher_scale: Factor on this model's Fisher.
        density: Share of this model's task vector that is kept.
        density_by: Score that ranks the entries for the density.
        sides: Sides whose recorded factors the merge needs, where there are some.
        ranks: Fisher with all tensors of the model, where ``source`` has this one alone.

    Returns:
        The tensor and its factor.

    Raises:
        ConfigError: The normalizer is 0, or a number that the scaling needs is not recorded.
    """
    if source is None:
        return LoadedFisher(name)
    fisher = source if isinstance(source, Fisher) else Fisher(MemoryStore(source), FisherConfig(statistic="mean"))
    stored = fisher.resolve(name) or name
    scale = fisher_scale * fisher.factor(stored, scaling)
    if normalize != "none":
        value = fisher.moments(scaling)[0 if normalize == "mean" else 1]
        if not value > 0:
            raise ConfigError(f"normalize: {normalize} needs a positive Fisher, but all of {fisher.location} is 0")
        scale /= value
    if not math.isfinite(scale):
        raise ConfigError(
            f"the scale of {name} in {fisher.location} must be finite, but fisher_scale {fisher_scale:g} times its "
            f"factor leaves the range of float64 with normalize: {normalize}; choose a smaller fisher_scale"
        )
    tensor = fisher[stored]
    if fisher.config.offset(scaling):
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        tensor = wide - fisher.offset(stored, scaling)
    scores = None
    if floor > 0 and tensor.numel():
        scores = tensor if density < 1 else None
        least = floor * tensor.mean(dtype=torch.float64).item()
        # A narrow dtype would round the floor, in float16 to 0.
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).clamp_min(least)
    rows, columns = (read_side(fisher, stored, side) if side in sides else None for side in SIDES)
    rank_scale = 1.0
    if density < 1 and density_by in ("fisher", "change"):
        rank_scale = _rank_scale(fisher, stored, scaling, fisher if ranks is None else ranks, density_by == "change")
    return LoadedFisher(stored, fisher.location, tensor, scale, density, rank_scale, scores, factors=(rows, columns))


def _rank_scale(fisher: Fisher, name: str, scaling: Scaling, whole: Fisher, by_change: bool) -> float:
    """Return the factor on one tensor of a Fisher for scores over all tensors, those of the ``whole`` Fisher.

    Apart from steps that differ between tensors it is a power of two, so that equal scores stay equal. For scores by F
    that power is 1, as a smaller one takes the least F to 0; for ``F d^2`` it is near the reciprocal of the norm, so
    that scores stay within float32.
    """
    first = next(iter(whole), name)
    ratio = fisher.factor(name, scaling) / whole.factor(first, scaling)
    if not by_change:
        return ratio
    norm = whole.config.norm or 1.0
    return ratio * 2.0 ** -min(max(math.frexp(norm)[1], -120), 120)
