"""Which slot of several optimizers belongs to which parameter, where each got some of the model's, in its order."""

from collections.abc import Collection, Iterator, Sequence

from squisher_mergekit.errors import NamingError
from squisher_mergekit.optimizers.assign_names import NAMES_CURE, Names, Parameter, Shape

# So many ways to have come so far at one parameter are followed; where there are more, the way is hardly unique.
_MOST = 50_000

State = tuple[int, ...]


def divide(
    sequences: Sequence[Sequence[Shape | None]],
    parameters: Sequence[Parameter],
    changed: Collection[str] | None,
    needed: Sequence[Sequence[bool]],
    place: str,
) -> Names:
    """Find the one way to deal a model's parameters out to several optimizers.

    Args:
        sequences: Of each optimizer (or group of one) the shapes of its slots, None where nothing tells.
        parameters: The model's, in order. There may be more than slots: frozen ones were not handed over.
        changed: Parameters known to have been trained; None if there is no base model.
        needed: Which slots have a second moment; of these each must have one place only.
        place: File, for messages.

    Returns:
        Sequence by sequence the name of each slot; None for one that needs none and could be one of several.

    Raises:
        NamingError: No way fits, or several do.

    Example:
        >>> embed, norm, up = Parameter("embed", (5, 3)), Parameter("norm", (3,)), Parameter("up", (3, 3))
        >>> divide([[(3, 3)], [(5, 3), (3,)]], [embed, norm, up], None, [[False], [True, True]], "optimizers.pt")
        [['up'], ['embed', 'norm']]
    """
    shown = " + ".join(str(len(sequence)) for sequence in sequences)
    possible = _possible(sequences, parameters, set(changed or ()), place)
    if possible is None:
        raise NamingError(
            f"the {shown} parameters of the optimizers in {place} must be the model's {len(parameters)}, dealt out in "
            f"its order, but do not fit in number and shape; give the --model that was trained, or {NAMES_CURE}"
        )
    names: Names = []
    for k, sequence in enumerate(sequences):
        places = [sorted(possible[k, i]) for i in range(len(sequence))]
        for i, some in enumerate(places):
            if len(some) > 1 and needed[k][i]:
                raise NamingError(
                    f"the {shown} parameters of the optimizers in {place} must fit the model in one way only, but one "
                    f"of shape {list(sequence[i] or ())} can be {parameters[some[0]].name} or "
                    f"{parameters[some[-1]].name}; give {NAMES_CURE}"
                )
        names.append([parameters[some[0]].name if len(some) == 1 else None for some in places])
    return names


def _possible(
    sequences: Sequence[Sequence[Shape | None]], parameters: Sequence[Parameter], forced: Collection[str], place: str
) -> dict[tuple[int, int], set[int]] | None:
    """Return (sequence, slot) -> the parameters it can be in some way to deal all of them out; None without a way."""
    ends = tuple(len(sequence) for sequence in sequences)
    spare = len(parameters) - sum(ends)
    if spare < 0:
        return None
    before = _reachable(sequences, parameters, forced, spare, place)
    good = {ends} & before[-1]
    possible: dict[tuple[int, int], set[int]] = {}
    for number in range(len(parameters) - 1, -1, -1):
        steps = [
            (state, k)
            for state in before[number]
            for k, new in _next(state, number, sequences, parameters[number], forced, spare)
            if new in good
        ]
        for state, k in steps:
            if k is not None:
                possible.setdefault((k, state[k]), set()).add(number)
        good = {state for state, _ in steps}
    return possible if good else None


def _reachable(
    sequences: Sequence[Sequence[Shape | None]],
    parameters: Sequence[Parameter],
    forced: Collection[str],
    spare: int,
    place: str,
) -> list[set[State]]:
    """Return before each parameter, and after the last, how many slots of each sequence can have found theirs."""
    states = [{tuple(0 for _ in sequences)}]
    for number, parameter in enumerate(parameters):
        here = {new for state in states[-1] for _, new in _next(state, number, sequences, parameter, forced, spare)}
        if len(here) > _MOST:
            raise NamingError(f"the parameters of the optimizers in {place} fit in too many ways; give {NAMES_CURE}")
        states.append(here)
    return states


def _next(
    state: State,
    number: int,
    sequences: Sequence[Sequence[Shape | None]],
    parameter: Parameter,
    forced: Collection[str],
    spare: int,
) -> Iterator[tuple[int | None, State]]:
    """Yield which sequence can take a parameter (None: it is left out), and how far all are then."""
    must = parameter.name in forced
    if not must and number - sum(state) < spare:
        yield None, state
    for k, sequence in enumerate(sequences):
        if state[k] < len(sequence):
            shape = sequence[state[k]]
            if (not must) if shape is None else (parameter.trainable and shape == parameter.shape):
                yield k, (*state[:k], state[k] + 1, *state[k + 1 :])
