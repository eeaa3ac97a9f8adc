"""Which slot of an optimizer belongs to which parameter; plain data in, plain data out.

An optimizer's file numbers the parameters in the order in which they were handed over. A Hugging Face Trainer hands
over two groups, with and without weight decay, and the rule that splits them has changed twice. So every rule is
tried, and a mapping is accepted only if it is the only one that fits all sizes and shapes.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from squisher_mergekit.errors import MismatchError, NamingError
from squisher_mergekit.models.checkpoint_names import LAYER_NORM, NAMES_CURE, Parameter, Shape

Names = list[list[str | None]]


# Modules whose parameters transformers up to 4.52 did not decay, beside torch's LayerNorm: those which its modelling
# files had registered. Norms of Qwen2, Mistral, Mixtral, Gemma and Phi-3 were not.
_REGISTERED_NORMS = frozenset(
    {
        "LlamaRMSNorm", "T5LayerNorm", "LongT5LayerNorm", "SwitchTransformersLayerNorm", "Pix2StructLayerNorm",
        "Pop2PianoLayerNorm", "IdeficsRMSNorm", "ChameleonRMSNorm", "GraniteMoeRMSNorm", "OlmoeRMSNorm",
        "MoshiRMSNorm", "NemotronLayerNorm1P", "RecurrentGemmaRMSNorm", "ZambaRMSNorm", "MegaRMSNorm",
    }
)  # fmt: skip
_SINCE_4_53 = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def _until_4_48(parameter: Parameter) -> bool:
    return not (parameter.types & (_REGISTERED_NORMS | {LAYER_NORM})) and "bias" not in parameter.name


def _until_4_52(parameter: Parameter) -> bool:
    patterns = ("bias", "layernorm", "rmsnorm")
    return _until_4_48(parameter) and not any(pattern in parameter.name.lower() for pattern in patterns)


def _since_4_53(parameter: Parameter) -> bool:
    return LAYER_NORM not in parameter.types and not _SINCE_4_53.search(parameter.name.lower())


DECAY_RULES: dict[str, Callable[[Parameter], bool]] = {
    "the weight-decay split of transformers up to 4.48": _until_4_48,
    "that of transformers 4.49 to 4.52": _until_4_52,
    "that of transformers since 4.53": _since_4_53,
}


def candidates(parameters: Sequence[Parameter], sizes: Sequence[int]) -> dict[str, list[list[Parameter]]]:
    """Return rule -> parameters group by group, for every rule that makes such groups.

    Args:
        parameters: In the model's order.
        sizes: How many parameters each group of the file has.
    """
    rules: dict[str, list[list[Parameter]]] = {}
    if len(sizes) == 2:
        rules = {
            rule: [[p for p in parameters if p.trainable and decays(p) is kind] for kind in (True, False)]
            for rule, decays in DECAY_RULES.items()
        }
    filled = [number for number, size in enumerate(sizes) if size]
    if len(filled) == 1:
        rules["the model's order"] = [list(parameters) if number in filled else [] for number in range(len(sizes))]
    return rules


def assign(
    slots: Sequence[Sequence[Shape | None]],
    parameters: Sequence[Parameter],
    changed: Collection[str] | None,
    place: str,
) -> Names:
    """Find the one way to give every slot its parameter.

    Args:
        slots: Group by group the shape of each slot, None where the optimizer never stepped it.
        parameters: The model's, in order. There may be more than slots: frozen ones were not handed over.
        changed: Parameters known to have been trained, as they differ from the base model; None if there is no base.
        place: File, for messages.

    Returns:
        Group by group the name of each slot; None for a slot that was never stepped and could be one of several.

    Raises:
        NamingError: No way fits, or several do.
    """
    sizes = [len(group) for group in slots]
    known = [[shape is not None for shape in group] for group in slots]
    found: dict[tuple[str | None, ...], str] = {}
    chosen: Names = []
    for rule, groups in candidates(parameters, sizes).items():
        ways = [places(group, some, changed or ()) for group, some in zip(slots, groups, strict=True)]
        if None in ways:
            continue
        _refuse_ambiguous(ways, slots, groups, place, _cure(sum(sizes) < len(parameters) and changed is None))
        names = [
            [some[low].name if low == high else None for low, high in way or ()]
            for way, some in zip(ways, groups, strict=True)
        ]
        # Two rules may agree on all that was stepped and differ in the rest, of which nothing is said then.
        chosen = [
            [a if a == b else None for a, b in zip(*two, strict=True)]
            for two in zip(chosen or names, names, strict=True)
        ]
        pairs = zip(_flat(names), _flat(known), strict=True)
        found.setdefault(tuple(name for name, stepped in pairs if stepped), rule)
    if not found:
        raise _no_way(slots, parameters, changed is not None, place)
    if len(found) > 1:
        shown = " + ".join(map(str, sizes))
        raise NamingError(
            f"the {shown} parameters in {place} must fit the model in one way only, but fit by the rules of "
            f"{' and of '.join(found.values())}; give {_cure(sum(sizes) < len(parameters) and changed is None)}"
        )
    return chosen


def places(
    slots: Sequence[Shape | None], parameters: Sequence[Parameter], forced: Collection[str]
) -> list[tuple[int, int]] | None:
    """Return the first and the last parameter that each slot can be, or None if there is no way.

    Slots keep the order of the parameters, and may skip some. The slot-wise smaller places of two ways are a way as
    well, and so are the larger: all slots can stand at their first places at once, and the way is unique where first
    is last.

    Args:
        slots: Shapes; None where the optimizer never stepped: that fits any but a forced one.
        parameters: What to choose from, in order; one that is not trainable fits None alone.
        forced: Names that must be chosen.

    Example:
        >>> a, b = Parameter("a", (3,)), Parameter("b", (3,))
        >>> places([(3,)], [a, b], forced=[]), places([(3,)], [a, b], forced=["b"])
        ([(0, 1)], [(1, 1)])
    """
    count, spare = len(slots), len(parameters) - len(slots)
    if spare < 0:
        return None
    must = [parameter.name in forced for parameter in parameters]

    def fits(i: int, skipped: int) -> bool:
        parameter = parameters[i + skipped]
        if slots[i] is None:
            return not must[i + skipped]
        return parameter.trainable and slots[i] == parameter.shape

    # before[i][k]: slots[:i] can take their places among parameters[:i + k]; after[i][k]: slots[i:] among the others.
    before = [[False] * (spare + 1) for _ in range(count + 1)]
    after = [[False] * (spare + 1) for _ in range(count + 1)]
    for i in range(count + 1):
        for k in range(spare + 1):
            skips = k > 0 and before[i][k - 1] and not must[i + k - 1]
            before[i][k] = (i == k == 0) or skips or (i > 0 and before[i - 1][k] and fits(i - 1, k))
    for i in range(count, -1, -1):
        for k in range(spare, -1, -1):
            skips = k < spare and after[i][k + 1] and not must[i + k]
            after[i][k] = (i == count and k == spare) or skips or (i < count and after[i + 1][k] and fits(i, k))
    if not after[0][0]:
        return None
    possible = [
        [i + k for k in range(spare + 1) if before[i][k] and fits(i, k) and after[i + 1][k]] for i in range(count)
    ]
    return [(some[0], some[-1]) for some in possible]


def _refuse_ambiguous(
    ways: Sequence[list[tuple[int, int]] | None],
    slots: Sequence[Sequence[Shape | None]],
    groups: Sequence[Sequence[Parameter]],
    place: str,
    cure: str,
) -> None:
    """Refuse stepped slots that could be one parameter or another."""
    number = -1
    for way, group, some in zip(ways, slots, groups, strict=True):
        for (low, high), shape in zip(way or (), group, strict=True):
            number += 1
            if low != high and shape is not None:
                raise NamingError(
                    f"the {sum(map(len, slots))} parameters in {place} must fit the {sum(map(len, groups))} of the "
                    f"model in one way only, but number {number}, of shape {list(shape)}, can be {some[low].name} or "
                    f"{some[high].name}; give {cure}"
                )


def _no_way(
    slots: Sequence[Sequence[Shape | None]], parameters: Sequence[Parameter], based: bool, place: str
) -> NamingError | MismatchError:
    """Say why no rule fits: a shape, where all group sizes are right, else the numbers."""
    sizes = [len(group) for group in slots]
    shown = " + ".join(map(str, sizes))
    for groups in candidates(parameters, sizes).values():
        if [len(group) for group in groups] != sizes:
            continue
        for shape, parameter in zip(_flat(slots), _flat(groups), strict=True):
            if shape not in (None, parameter.shape):
                return MismatchError(
                    f"{parameter.name} has shape {list(parameter.shape)} in the model, but {list(shape)} in {place}; "
                    "give the --model that was trained"
                )
    why = "they fit by none of the rules known"
    if sum(sizes) > len(parameters):
        why = "there are more of them (transformers before 5 kept the experts of a mixture one by one)"
    elif len(sizes) > 2:
        why = f"they are in {len(sizes)} groups, where a Trainer makes two and others one"
    other = "the --base that training began with" if based else "the --model that was trained"
    return NamingError(
        f"the {shown} parameters in {place} must fit the {len(parameters)} of the model in number, order and shape, "
        f"but {why}; give {other}, or {NAMES_CURE}"
    )


def _cure(base_helps: bool) -> str:
    base = "--base DIR, the weights before training, which tell the frozen ones apart, or "
    return f"{base if base_helps else ''}{NAMES_CURE}"


def _flat(groups: Sequence[Sequence[Any]]) -> Iterator[Any]:
    for group in groups:
        yield from group


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
