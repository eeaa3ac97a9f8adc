"""Parameters in the training of a model of sentence-transformers that are not the transformer's.

Further modules follow the transformer in the model. The trainer gives the optimizer the parameters of the loss, in
which the model is one module: in each group, the model's parameters follow one another, before or after the loss's.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from squisher_mergekit.errors import CorruptFileError, NamingError
from squisher_mergekit.models.decay_groups import candidates, variants
from squisher_mergekit.models.names import NAMES_CURE, ParameterInfo, Shape
from squisher_mergekit.tensors.input_files import is_name, read_json
from squisher_mergekit.tensors.safetensors import read_header, safetensors_files

_FILE = "modules.json"
_NUMBER = re.compile(r"\d+")
# Parameters of torch's recurrent layers, of which each direction of each layer has some, in this order.
_RECURRENT = re.compile(r"(weight_ih|weight_hh|bias_ih|bias_hh|weight_hr)_l(\d+)(_reverse)?")
_OF_RECURRENT = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def has_modules(folder: Path) -> bool:
    """Return True for the folder of a model of sentence-transformers."""
    return (folder / _FILE).is_file()


def module_parameters(folder: Path) -> list[ParameterInfo]:
    """Return the parameters of the modules after the transformer, in the order of the model; empty without modules.

    The name has the folder of the module: ``2_Dense/linear.weight``. The weights come before the biases.

    Args:
        folder: Folder of the model.

    Raises:
        CorruptFileError: ``modules.json`` or a module's file is damaged.
    """
    file = folder / _FILE
    modules: Any = read_json(file) if file.is_file() else []
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CorruptFileError(f"{file} must be a list of modules; copy it again")
    return [parameter for module in modules for parameter in _parameters(folder, module.get("path"), file)]


def _parameters(folder: Path, path: Any, file: Path) -> Iterator[ParameterInfo]:
    if not path:  # the transformer, at the root
        return
    if not is_name(path) or Path(path).name != path or not _NUMBER.match(path):
        raise CorruptFileError(f"{file} must name folders beside it, found {path!r:.50}; copy it again")
    infos = {
        name: info for f in safetensors_files(folder / path, "model") for name, info in read_header(f).infos.items()
    }
    for name in sorted(infos, key=_order):
        if infos[name].is_floating_point:
            yield ParameterInfo(f"{path}/{name}", infos[name].shape, frozenset({path.partition("_")[2]}))


def _order(name: str) -> tuple[list[tuple[int, str]], tuple[int, bool, int]]:
    """Return the sort key of a parameter's name in its module: layer 2 precedes layer 10, the weight the bias."""
    module, _, own = name.rpartition(".")
    place = [(int(part), "") if part.isdecimal() else (-1, part) for part in module.split(".")]
    found = _RECURRENT.fullmatch(own)
    if found is None:
        return place, (0, False, own.endswith("bias"))
    return place, (int(found[2]), found[3] is not None, _OF_RECURRENT.index(found[1]))


def assign_beside_loss(
    slots: Sequence[Sequence[Shape | None]], parameters: Sequence[ParameterInfo], location: str
) -> list[list[str | None]]:
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
    found: dict[tuple[tuple[str | None, ...], ...], list[list[str | None]]] = {}
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
