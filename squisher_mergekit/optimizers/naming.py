"""Which slot of an optimizer belongs to which parameter; plain data in, plain data out.

An optimizer's file numbers the parameters in the order in which they were handed over. A Hugging Face Trainer hands
over two groups, with and without weight decay, and the rule that splits them has changed twice. So every rule is
tried, and a mapping is accepted only if it is the only one that fits all sizes and shapes.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from squisher_mergekit.errors import NamingError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a model.

    ``types``: class names of the modules around it, without the root; ``torch.LayerNorm`` for that class and its heirs.
    """

    name: str
    shape: Shape
    types: frozenset[str] = frozenset()


# Modules whose parameters transformers up to 4.52 did not decay, beside torch's LayerNorm: those which its modelling
# files had registered. Norms of Qwen2, Mistral, Mixtral, Gemma and Phi-3 were not.
_REGISTERED_NORMS = frozenset(
    {
        "LlamaRMSNorm", "T5LayerNorm", "LongT5LayerNorm", "SwitchTransformersLayerNorm", "Pix2StructLayerNorm",
        "Pop2PianoLayerNorm", "IdeficsRMSNorm", "ChameleonRMSNorm", "GraniteMoeRMSNorm", "OlmoeRMSNorm",
        "MoshiRMSNorm", "NemotronLayerNorm1P", "RecurrentGemmaRMSNorm", "ZambaRMSNorm", "MegaRMSNorm",
    }
)  # fmt: skip
_LAYER_NORM = "torch.LayerNorm"


def _until_4_48(parameter: Parameter) -> bool:
    return not (parameter.types & (_REGISTERED_NORMS | {_LAYER_NORM})) and "bias" not in parameter.name


def _until_4_52(parameter: Parameter) -> bool:
    patterns = ("bias", "layernorm", "rmsnorm")
    return _until_4_48(parameter) and not any(pattern in parameter.name.lower() for pattern in patterns)


_SINCE_4_53 = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def _since_4_53(parameter: Parameter) -> bool:
    return _LAYER_NORM not in parameter.types and not _SINCE_4_53.search(parameter.name.lower())


DECAY_RULES: dict[str, Callable[[Parameter], bool]] = {
    "transformers up to 4.48": _until_4_48,
    "transformers 4.49 to 4.52": _until_4_52,
    "transformers since 4.53": _since_4_53,
}


def candidates(parameters: Sequence[Parameter], groups: int) -> dict[str, list[list[str]]]:
    """Return rule -> names group by group, for every rule that makes so many groups.

    Args:
        parameters: In the model's order.
        groups: How many groups the file has.
    """
    if groups == 1:
        return {"the model's order": [[parameter.name for parameter in parameters]]}
    if groups != 2:
        return {}
    return {
        rule: [[p.name for p in parameters if decays(p) is kind] for kind in (True, False)]
        for rule, decays in DECAY_RULES.items()
    }


def assign(
    slots: Sequence[Sequence[Shape | None]],
    parameters: Sequence[Parameter],
    changed: Collection[str] | None,
    place: str,
) -> list[list[str]]:
    """Find the one way to give every slot its parameter.

    Args:
        slots: Group by group the shape of each slot, None where the optimizer never stepped it.
        parameters: The model's, in order. There may be more than slots: frozen ones were not handed over.
        changed: Parameters known to have been trained, as they differ from the base model; None if there is no base.
        place: File, for messages.

    Returns:
        Group by group the name of each slot.

    Raises:
        NamingError: No way fits, or several do.
    """
    shapes = {parameter.name: parameter.shape for parameter in parameters}
    known = [[shape is not None for shape in group] for group in slots]
    found: dict[tuple[str, ...], tuple[str, list[list[str]]]] = {}
    ambiguous = []
    for rule, names in candidates(parameters, len(slots)).items():
        ways = [embeddings(group, some, shapes, changed or ()) for group, some in zip(slots, names, strict=True)]
        if not all(ways):
            continue
        if any(len(way) > 1 for way in ways):
            ambiguous.append(rule)
        chosen = [way[0] for way in ways]
        stepped = tuple(
            name
            for group, mask in zip(chosen, known, strict=True)
            for name, yes in zip(group, mask, strict=True)
            if yes
        )
        found.setdefault(stepped, (rule, chosen))
    if len(found) == 1 and not ambiguous:
        return next(iter(found.values()))[1]
    sizes = " + ".join(str(len(group)) for group in slots)
    if not found:
        raise NamingError(
            f"the {sizes} parameters in {place} must fit the {len(parameters)} of the model in number, order and "
            "shape, but fit under no known rule; give the right --model, or --names FILE with one name a line"
        )
    cure = "--names FILE with one name a line"
    if ambiguous and changed is None:
        cure = f"--base DIR, the model before training, which tells the frozen ones apart, or {cure}"
    raise NamingError(
        f"the {sizes} parameters in {place} must fit the model in one way only, but several fit "
        f"({', '.join(ambiguous or [rule for rule, _ in found.values()])}); give {cure}"
    )


def embeddings(
    slots: Sequence[Shape | None], names: Sequence[str], shapes: Mapping[str, Shape], forced: Collection[str]
) -> list[list[str]]:
    """Return the ways to give slots names, in order and by shape; at most two, as more make no difference.

    Args:
        slots: Shapes; None fits any.
        names: The names to choose from, in order.
        shapes: Their shapes.
        forced: Names that must be chosen.

    Example:
        >>> embeddings([(3,)], ["a", "b"], {"a": (3,), "b": (3,)}, forced=["b"])
        [['b']]
    """
    count, total = len(slots), len(names)
    must = set(forced)

    def fits(i: int, j: int) -> bool:
        return slots[i] is None or slots[i] == shapes[names[j]]

    # ways[i][j]: in how many ways slots[i:] fit names[j:], counted up to 2.
    ways = [[0] * (total + 1) for _ in range(count + 1)]
    ways[count][total] = 1
    for j in range(total - 1, -1, -1):
        for i in range(count, -1, -1):
            skip = 0 if names[j] in must else ways[i][j + 1]
            take = ways[i + 1][j + 1] if i < count and fits(i, j) else 0
            ways[i][j] = min(2, skip + take)
    found: list[list[str]] = []

    def walk(i: int, j: int, chosen: list[str]) -> None:
        while j < total and len(found) < 2 and ways[i][j]:
            takes = i < count and fits(i, j) and ways[i + 1][j + 1] > 0
            skips = names[j] not in must and ways[i][j + 1] > 0
            if takes and skips:
                walk(i, j + 1, list(chosen))
            if takes:
                chosen.append(names[j])
                i += 1
            j += 1
        if i == count and j == total and len(found) < 2:
            found.append(chosen)

    walk(0, 0, [])
    return found
