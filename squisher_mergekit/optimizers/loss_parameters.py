"""Assignment of an optimizer's slots where the loss has parameters of its own, beside those of the model.

The trainer of sentence-transformers gives the optimizer the parameters of the loss, in which the model is one module.
In each group, the model's parameters therefore follow one another, before or after those of the loss.
"""

from collections.abc import Sequence

from squisher_mergekit.errors import NamingError
from squisher_mergekit.models.decay_groups import candidates, variants
from squisher_mergekit.models.names import NAMES_CURE, ParameterInfo, Shape
from squisher_mergekit.optimizers.assign_names import Names


def assign_beside_loss(
    slots: Sequence[Sequence[Shape | None]], parameters: Sequence[ParameterInfo], location: str
) -> Names:
    """Find the only place of a model's parameters among more slots.

    Args:
        slots: Shape of each slot, group by group; None where the optimizer never stepped it.
        parameters: The model's parameters, in order; all of them were given to the optimizer.
        location: File, for messages.

    Returns:
        Name of each slot, group by group; None for a slot of the loss.

    Raises:
        NamingError: No place fits, or several do.

    Example:
        >>> up, norm = ParameterInfo("up", (3, 5)), ParameterInfo("norm", (3,))
        >>> assign_beside_loss([[(3, 5), (2, 9)], [(1,), (3,)]], [up, norm], "optimizer.pt")
        [['up', None], [None, 'norm']]
    """
    found: dict[tuple[tuple[str | None, ...], ...], Names] = {}
    _, free = variants(parameters)
    for groups in candidates(free, [len(group) for group in slots]).values():
        places = [_places(group, members) for group, members in zip(slots, groups, strict=True)]
        if any(len(group_places) > 1 for group_places in places) and all(places):
            raise _unclear(slots, parameters, location, "in one place only, but fit in several")
        if all(places):
            names = [
                _names(len(group), members, start)
                for group, members, (start,) in zip(slots, groups, places, strict=True)
            ]
            stepped = tuple(
                tuple(name for name, shape in zip(own, group, strict=True) if shape is not None)
                for own, group in zip(names, slots, strict=True)
            )
            found.setdefault(stepped, names)
    if len(found) != 1:
        raise _unclear(slots, parameters, location, "in one way, but fit in several" if found else "but do not")
    return next(iter(found.values()))


def _places(slots: Sequence[Shape | None], parameters: Sequence[ParameterInfo]) -> list[int]:
    """Return the slots at which all parameters can begin, one after another."""
    shapes = [parameter.shape for parameter in parameters]
    return [
        start
        for start in range(len(slots) - len(shapes) + 1)
        if all(slot in (None, shape) for slot, shape in zip(slots[start:], shapes, strict=False))
    ]


def _names(count: int, parameters: Sequence[ParameterInfo], start: int) -> list[str | None]:
    names = [parameter.name for parameter in parameters]
    return [None] * start + names + [None] * (count - start - len(names))


def _unclear(
    slots: Sequence[Sequence[Shape | None]], parameters: Sequence[ParameterInfo], location: str, why: str
) -> NamingError:
    sizes = " + ".join(str(len(group)) for group in slots)
    return NamingError(
        f"the {len(parameters)} parameters of the model must be found among the {sizes} in {location}, of which some "
        f"are the loss's (or an adapter's), {why}; give {NAMES_CURE}"
    )
