"""Names of slots in groups by layers: trainers with a layer-wise decay of the learning rate give each layer its own.

timm and the scripts after BEiT's make up to two groups for each layer, with and without weight decay, and record
``lr_scale`` in both. The layers follow the model's order, so that each has the parameters after those of the one before.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from squisher_mergekit.errors import RefusedError
from squisher_mergekit.models.names import ParameterInfo, Shape
from squisher_mergekit.optimizers.assign_names import Names, assign

_SCALE = "lr_scale"


def assign_by_layers(
    slots: Sequence[Sequence[Shape | None]],
    settings: Sequence[Mapping[str, Any]],
    parameters: Sequence[ParameterInfo],
    location: str,
) -> Names | None:
    """Return the name of each slot, group by group; None where the groups are not those of layers in the model's order.

    Args:
        slots: Shape of each slot, group by group; None where the optimizer never stepped it.
        settings: Settings of each group.
        parameters: The model's parameters, in order.
        location: File, for messages.

    Example:
        >>> a, b = ParameterInfo("a", (3,)), ParameterInfo("b", (3,))
        >>> assign_by_layers([[(3,)], [(3,)]], [{"lr_scale": 0.5}, {"lr_scale": 1.0}], [a, b], "last.pth.tar")
        [['a'], ['b']]
    """
    scales = [group.get(_SCALE) for group in settings]
    layers = [(scale, [k for k, _ in run]) for scale, run in groupby(enumerate(scales), key=lambda pair: pair[1])]
    known = len(scales) == len(slots) and all(isinstance(scale, int | float) for scale in scales)
    in_order = len({scale for scale, _ in layers}) == len(layers) > 1
    if not known or not in_order or sum(map(len, slots)) != len(parameters):
        return None
    names: Names = []
    first = 0
    for _, numbers in layers:
        groups = [slots[number] for number in numbers]
        count = sum(map(len, groups))
        try:
            names += assign(groups, parameters[first : first + count], None, location)
        except RefusedError:  # the layers are in another order, or divided otherwise
            return None
        first += count
    return names
