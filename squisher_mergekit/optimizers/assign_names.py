"""Assignment of an optimizer's slots to a model's parameters, from shapes and order alone; plain data in and out.

An optimizer's file numbers the parameters in the order in which the optimizer received them. A Hugging Face Trainer
makes two groups, with and without weight decay, and the rule that splits them has changed twice. Other trainers split
by the number of axes. Every rule is tried, and an assignment is accepted only if no other one fits all sizes and
shapes. Groups that follow no known rule are accepted if one division alone fits.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from squisher_mergekit.errors import MismatchError, NamingError
from squisher_mergekit.models.decay_groups import AXES_RULES, DECAY_RULES, Rule, candidates, variants
from squisher_mergekit.models.names import NAMES_CURE, ParameterInfo, Shape
from squisher_mergekit.tensors.safetensors import resized_rows

Names = list[list[str | None]]
_MOST_SHOWN = 8


def assign(
    slots: Sequence[Sequence[Shape | None]],
    parameters: Sequence[ParameterInfo],
    trained: Collection[str] | None,
    location: str,
) -> Names:
    """Find the only assignment of parameters to the slots of one optimizer.

    Assignments that leave out no trainable parameter come first; then those that leave out frozen ones.

    Args:
        slots: Shape of each slot, group by group; None where the optimizer never stepped it.
        parameters: The model's parameters, in order; more than slots where frozen ones were not given to the optimizer.
        trained: Parameters that differ from the base model; None if there is no base.
        location: File, for messages.

    Returns:
        Name of each slot, group by group; None for a slot that was never stepped and fits several parameters.

    Raises:
        NamingError: No assignment fits, or several do.
        MismatchError: A parameter has another shape in the model.
    """
    sizes = [len(group) for group in slots]
    trainable, free = variants(parameters)
    needed = {parameter.name for parameter in trainable}
    searches: list[tuple[Mapping[str, Rule], Collection[str]]] = [(DECAY_RULES, ()), (AXES_RULES, ())]
    if sum(sizes) >= len(needed):
        searches.insert(0, (DECAY_RULES | AXES_RULES, needed))
    for rules, kept in searches:
        names = _assign_by(candidates(free, sizes, rules), slots, len(parameters), trained, kept, location)
        if names is not None:
            return names
    if sum(size > 0 for size in sizes) > 1:
        stepped = [[shape is not None for shape in group] for group in slots]
        names = _divided(
            slots,
            parameters,
            trained,
            stepped,
            f"the several groups in {location}",
            f"they are in {len(sizes)} groups that no known rule makes, and ",
        )
        if names is not None:
            return names
    raise _no_assignment(slots, parameters, trained is not None, location)


def _assign_by(
    rules: Mapping[str, Sequence[Sequence[ParameterInfo]]],
    slots: Sequence[Sequence[Shape | None]],
    total: int,
    trained: Collection[str] | None,
    kept: Collection[str],
    location: str,
) -> Names | None:
    """Return the names by the rules that fit; None if no rule fits.

    Raises:
        NamingError: Two rules fit with different names, or one fits in several ways.
    """
    sizes = [len(group) for group in slots]
    known = [[shape is not None for shape in group] for group in slots]
    cure = _cure(sum(sizes) < total and trained is None)
    found: dict[tuple[str | None, ...], str] = {}
    chosen: Names = []
    for rule, groups in rules.items():
        ranges = [positions(group, members, trained or (), kept) for group, members in zip(slots, groups, strict=True)]
        if None in ranges:
            continue
        _refuse_ambiguous(ranges, slots, groups, location, cure)
        names = [
            [members[first].name if first == last else None for first, last in group_ranges or ()]
            for group_ranges, members in zip(ranges, groups, strict=True)
        ]
        # Two rules may agree on all stepped slots and differ in the others, which then get no name.
        chosen = [
            [a if a == b else None for a, b in zip(*two, strict=True)]
            for two in zip(chosen or names, names, strict=True)
        ]
        pairs = zip(_flat(names), _flat(known), strict=True)
        found.setdefault(tuple(name for name, stepped in pairs if stepped), rule)
    if len(found) > 1:
        raise NamingError(
            f"the {_shown(slots)} parameters in {location} must fit the model in one way only, but fit by the rules of "
            f"{' and of '.join(found.values())}; give {cure}"
        )
    return chosen if found else None


def positions(
    slots: Sequence[Shape | None],
    parameters: Sequence[ParameterInfo],
    forced: Collection[str],
    kept: Collection[str] = (),
) -> list[tuple[int, int]] | None:
    """Return the first and the last parameter that each slot can be; None if no assignment fits.

    Slots keep the order of the parameters, and may skip some. The slot-wise minimum of two assignments is an assignment
    too, and so is the maximum. All slots can therefore take their first positions at once, and an assignment is unique
    where first and last position agree.

    Args:
        slots: Shapes; None for a slot that was never stepped, which fits every parameter but a forced one.
        parameters: The parameters to choose from, in order.
        forced: Names that must be chosen, by a slot with a shape.
        kept: Names that must be chosen, by any slot.

    Example:
        >>> a, b = ParameterInfo("a", (3,)), ParameterInfo("b", (3,))
        >>> positions([(3,)], [a, b], forced=[]), positions([(3,)], [a, b], forced=["b"])
        ([(0, 1)], [(1, 1)])
    """
    count, spare = len(slots), len(parameters) - len(slots)
    if spare < 0:
        return None
    stepped = [parameter.name in forced for parameter in parameters]
    must = [is_forced or parameter.name in kept for is_forced, parameter in zip(stepped, parameters, strict=True)]

    def fits(i: int, skipped: int) -> bool:
        if slots[i] is None:
            return not stepped[i + skipped]
        return slots[i] == parameters[i + skipped].shape

    # before[i][k]: slots[:i] fit among parameters[:i + k]; after[i][k]: slots[i:] fit among the other parameters.
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
    return [(fitting[0], fitting[-1]) for fitting in possible]


def _refuse_ambiguous(
    ranges: Sequence[list[tuple[int, int]] | None],
    slots: Sequence[Sequence[Shape | None]],
    groups: Sequence[Sequence[ParameterInfo]],
    location: str,
    cure: str,
) -> None:
    """Refuse stepped slots that fit several parameters."""
    number = -1
    for group_ranges, group, members in zip(ranges, slots, groups, strict=True):
        for (first, last), shape in zip(group_ranges or (), group, strict=True):
            number += 1
            if first != last and shape is not None:
                raise NamingError(
                    f"the {sum(map(len, slots))} parameters in {location} must fit the {sum(map(len, groups))} of the "
                    f"model in one way only, but number {number}, of shape {list(shape)}, can be {members[first].name} "
                    f"or {members[last].name}; give {cure}"
                )


def _no_assignment(
    slots: Sequence[Sequence[Shape | None]], parameters: Sequence[ParameterInfo], based: bool, location: str
) -> NamingError | MismatchError:
    """Return the error that explains why no rule fits: a shape, where all group sizes are right, else the numbers."""
    sizes = [len(group) for group in slots]
    for groups in (groups for variant in variants(parameters) for groups in candidates(variant, sizes).values()):
        if [len(group) for group in groups] != sizes:
            continue
        pairs = list(zip(_flat(slots), _flat(groups), strict=True))
        rows = resized_rows((shape, parameter.shape) for shape, parameter in pairs if shape is not None)
        for shape, parameter in pairs:
            if shape not in (None, parameter.shape):
                if rows is not None and rows[0] < rows[1]:
                    return MismatchError(
                        f"{parameter.name} has {rows[1]} rows in the model, but {rows[0]} in {location}: the "
                        "embeddings were resized after training; run squisher extract on the checkpoint with the "
                        "trained weights, and give that Fisher: the new rows then count as unseen (F = 0)"
                    )
                return MismatchError(
                    f"{parameter.name} has shape {list(parameter.shape)} in the model, but {list(shape)} in "
                    f"{location}; give the --model that was trained, or {NAMES_CURE}"
                )
    why = "they fit by none of the rules known"
    if sum(sizes) > len(parameters):
        why = "there are more of them (transformers before 5 kept the experts of a mixture one by one)"
    elif len(sizes) > 2:
        why = f"they are in {len(sizes)} groups that do not divide the model's order"
    other = "the --base that training began with" if based else "the --model that was trained"
    return NamingError(
        f"the {_shown(slots)} parameters in {location} must fit the {len(parameters)} of the model in number, order "
        f"and shape, but {why}; give {other}, or {NAMES_CURE}"
    )


def _cure(base_helps: bool) -> str:
    base = "--base DIR, the weights before training, which show the frozen parameters, or "
    return f"{base if base_helps else ''}{NAMES_CURE}"


def _shown(groups: Sequence[Sequence[Any]]) -> str:
    """Return the sizes of the groups, of many the first.

    Example:
        >>> _shown(["ab", "c"]), _shown(["a"] * 21)
        ('2 + 1', '1 + 1 + 1 + 1 + ... (21 groups)')
    """
    sizes = [str(len(group)) for group in groups]
    return " + ".join(sizes if len(sizes) <= _MOST_SHOWN else [*sizes[:4], f"... ({len(sizes)} groups)"])


def _flat(groups: Sequence[Sequence[Any]]) -> Iterator[Any]:
    for group in groups:
        yield from group


# Limit of the search: more partial assignments than this at one parameter hardly lead to a unique one.
_MOST = 50_000

# Partial assignment: the number of slots of each sequence that have their parameter.
Progress = tuple[int, ...]


def divide(
    sequences: Sequence[Sequence[Shape | None]],
    parameters: Sequence[ParameterInfo],
    trained: Collection[str] | None,
    needed: Sequence[Sequence[bool]],
    location: str,
) -> Names:
    """Find the only division of a model's parameters among several optimizers.

    Args:
        sequences: Shapes of the slots of each optimizer, or of each of its groups; None where unknown.
        parameters: The model's parameters, in order; more than slots where frozen ones were not given to an optimizer.
        trained: Parameters that differ from the base model; None if there is no base.
        needed: True for the slots with a second moment, which must fit one parameter only.
        location: File, for messages.

    Returns:
        Name of each slot, sequence by sequence; None for a slot without a second moment that fits several parameters.

    Raises:
        NamingError: No division fits, or several do.

    Example:
        >>> embed, norm, up = ParameterInfo("embed", (5, 3)), ParameterInfo("norm", (3,)), ParameterInfo("up", (3, 3))
        >>> divide([[(3, 3)], [(5, 3), (3,)]], [embed, norm, up], None, [[False], [True, True]], "optimizers.pt")
        [['up'], ['embed', 'norm']]
    """
    names = _divided(sequences, parameters, trained, needed, f"the optimizers in {location}", "")
    if names is None:
        raise NamingError(
            f"the {_shown(sequences)} parameters of the optimizers in {location} must be the model's "
            f"{len(parameters)}, dealt out in its order, but do not fit in number and shape; give the --model that was "
            f"trained, or {NAMES_CURE}"
        )
    return names


def _divided(
    sequences: Sequence[Sequence[Shape | None]],
    parameters: Sequence[ParameterInfo],
    trained: Collection[str] | None,
    needed: Sequence[Sequence[bool]],
    whose: str,
    why: str,
) -> Names | None:
    """Return the names by the only division; None if no division fits.

    Raises:
        NamingError: Several divisions fit.
    """
    trainable, free = variants(parameters)
    forced = set(trained or ())
    possible = None
    for kept in ({parameter.name for parameter in trainable}, set[str]()):
        possible = possible or _possible(sequences, free, forced, kept, whose)
    if possible is None:
        return None
    names: Names = []
    for k, sequence in enumerate(sequences):
        fitting = [sorted(possible[k, i]) for i in range(len(sequence))]
        for i, numbers in enumerate(fitting):
            if len(numbers) > 1 and needed[k][i]:
                raise NamingError(
                    f"the {_shown(sequences)} parameters of {whose} must fit the model in one way only, but "
                    f"{why}one of shape {list(sequence[i] or ())} can be {parameters[numbers[0]].name} or "
                    f"{parameters[numbers[-1]].name}; give {NAMES_CURE}"
                )
        names.append([parameters[numbers[0]].name if len(numbers) == 1 else None for numbers in fitting])
    return names


def _possible(
    sequences: Sequence[Sequence[Shape | None]],
    parameters: Sequence[ParameterInfo],
    forced: Collection[str],
    kept: Collection[str],
    whose: str,
) -> dict[tuple[int, int], set[int]] | None:
    """Return (sequence, slot) -> numbers of the parameters that fit in some division; None if there is no division."""
    ends = tuple(len(sequence) for sequence in sequences)
    spare = len(parameters) - sum(ends)
    if spare < 0:
        return None
    before = _reachable(sequences, parameters, forced, kept, spare, whose)
    good = {ends} & before[-1]
    possible: dict[tuple[int, int], set[int]] = {}
    for number in range(len(parameters) - 1, -1, -1):
        steps = [
            (progress, k)
            for progress in before[number]
            for k, new in _next(progress, number, sequences, parameters[number], forced, kept, spare)
            if new in good
        ]
        for progress, k in steps:
            if k is not None:
                possible.setdefault((k, progress[k]), set()).add(number)
        good = {progress for progress, _ in steps}
    return possible if good else None


def _reachable(
    sequences: Sequence[Sequence[Shape | None]],
    parameters: Sequence[ParameterInfo],
    forced: Collection[str],
    kept: Collection[str],
    spare: int,
    whose: str,
) -> list[set[Progress]]:
    """Return the partial assignments that can be reached before each parameter, and after the last."""
    reached: list[set[Progress]] = [{tuple(0 for _ in sequences)}]
    for number, parameter in enumerate(parameters):
        following = {
            new
            for progress in reached[-1]
            for _, new in _next(progress, number, sequences, parameter, forced, kept, spare)
        }
        if len(following) > _MOST:
            raise NamingError(f"the parameters of {whose} fit in too many ways; give {NAMES_CURE}")
        reached.append(following)
    return reached


def _next(
    progress: Progress,
    number: int,
    sequences: Sequence[Sequence[Shape | None]],
    parameter: ParameterInfo,
    forced: Collection[str],
    kept: Collection[str],
    spare: int,
) -> Iterator[tuple[int | None, Progress]]:
    """Yield each sequence that can take a parameter (None leaves the parameter out), with the progress after it."""
    must = parameter.name in forced
    if not must and parameter.name not in kept and number - sum(progress) < spare:
        yield None, progress
    for k, sequence in enumerate(sequences):
        if progress[k] < len(sequence):
            shape = sequence[progress[k]]
            if (not must) if shape is None else shape == parameter.shape:
                yield k, (*progress[:k], progress[k] + 1, *progress[k + 1 :])
