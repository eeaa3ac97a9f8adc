"""A Hugging Face model without its weights: which parameters it has, in which order, and how they are named on disk."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.errors import CorruptFileError, NamingError, UnsupportedStateError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a model.

    ``types``: class names of the modules around it, the root excepted, and of their bases. ``trainable``: it asks for
    a gradient unless somebody freezes it.
    """

    name: str
    shape: Shape
    types: frozenset[str] = frozenset()
    trainable: bool = True

    @property
    def numel(self) -> int:
        """How many entries it has."""
        return math.prod(self.shape)


LAYER_NORM = "torch.nn.LayerNorm"


NAMES_CURE = "--names FILE with one name a line, line i for the optimizer's parameter i"


Convert = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class CheckpointNames:
    """What a model's class tells.

    ``parameters``: in the model's order, tied ones once, under their first name. ``first``: every name in memory ->
    that first name. ``sources``: name on disk -> the parameters that its tensor is made of, by ``convert``. ``shapes``:
    of the tensors on disk. ``aliases``: other name on disk of a tied tensor -> the one that is kept.
    """

    parameters: tuple[Parameter, ...]
    first: Mapping[str, str]
    sources: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    convert: Convert = field(repr=False)


def checkpoint_names(folder: Path, stored: Collection[str] = ()) -> CheckpointNames:
    """Build the model that a folder's ``config.json`` describes, on the meta device: no weights, no memory.

    Args:
        folder: Where ``config.json`` lies.
        stored: The names in its weights, if there are weights.

    Returns:
        Its parameters and their names on disk.

    Raises:
        NamingError: There is no ``config.json``.
        CorruptFileError: It is none that transformers can build a model from.
        UnsupportedStateError: transformers converts the model's weights by more than moving elements.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise NamingError(
            f"the order of a model's parameters follows from its config.json, but {folder} has none; "
            f"give --model DIR, or {NAMES_CURE}"
        )
    return _cached(file.absolute(), file.stat().st_mtime_ns, frozenset(stored))


@lru_cache(maxsize=16)
def _cached(file: Path, _changed_at: int, stored: frozenset[str]) -> CheckpointNames:
    return of_model(meta_model(file.parent), stored)


def meta_model(folder: Path) -> nn.Module:
    """Build the model of a ``config.json`` without weights; a model's own code is never run.

    Raises:
        CorruptFileError: It is none that transformers can build a model from.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        names = config.architectures or []
        model_class = getattr(transformers, names[0], None) if names else None
        if model_class is None:
            raise ValueError(f"transformers {transformers.__version__} has no architecture {names}")
        with torch.device("meta"):
            model: nn.Module = model_class(config)
    except Exception as error:  # a config can make a model's constructor raise nearly anything
        raise CorruptFileError(
            f"{folder / 'config.json'} must describe a model of transformers' own, but {str(error)[:200]}; "
            f"give {NAMES_CURE}"
        ) from error
    return model


def of_model(model: nn.Module, stored: Collection[str] = ()) -> CheckpointNames:
    """Describe a model of transformers.

    A model is saved under the names that it was loaded from: BERT's LayerNorm.gamma, an older prefix, packed experts.
    So the conversions are taken that the stored names show to be in use, and the usual ones where there are none.

    Args:
        model: On any device.
        stored: The names in its weights, if there are weights.

    Raises:
        UnsupportedStateError: transformers converts its weights by more than moving elements.
    """
    if stored:
        found = _described(model, _steps_in_use(model, stored))
        if found.sources.keys() <= set(stored):
            return found
    return _described(model, _usual_steps(model))


def _described(model: nn.Module, steps: Sequence[Any]) -> CheckpointNames:
    modules = dict(model.named_modules())
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parameters = tuple(
        Parameter(name, tuple(p.shape), types_around(name, modules), p.requires_grad)
        for name, p in model.named_parameters()
    )
    # Of tied parameters, save_pretrained keeps the one whose name is not among the tied keys.
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    kept = {same[0]: next((name for name in same if name not in tied), same[0]) for same in names.values()}
    reverse = _reverse_conversion(model, steps)

    def convert(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return reverse({kept[name]: tensor for name, tensor in tensors.items()})

    tensors = {p.name: torch.empty(p.shape, device="meta") for p in parameters}
    whole = convert(tensors)
    aliases: dict[str, str] = {}
    for same in names.values():
        stored = [(name, tuple(reverse({name: tensors[same[0]]}))) for name in same] if len(same) > 1 else []
        main = dict(stored).get(kept[same[0]], ())
        for name, others in stored:
            if name != kept[same[0]] and len(others) == len(main):
                aliases.update(zip(others, main, strict=True))
    return CheckpointNames(
        parameters,
        {name: same[0] for same in names.values() for name in same},
        _sources(tensors, whole, convert),
        {name: tuple(tensor.shape) for name, tensor in whole.items()},
        aliases,
        convert,
    )


def types_around(name: str, modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """Return the class names of the modules that a parameter lies in, the root left out, and of their bases."""
    path = name.split(".")[:-1]
    around = [modules[".".join(path[: i + 1])] for i in range(len(path))]
    types = {base.__name__ for module in around for base in type(module).__mro__}
    return frozenset(types | ({LAYER_NORM} if any(isinstance(m, nn.LayerNorm) for m in around) else set()))


def _usual_steps(model: nn.Module) -> list[Any]:
    """Return the conversions that save_pretrained reverts of a model that was loaded from no files."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    steps = get_model_conversion_mapping(model, add_legacy=False)
    return [step for step in steps if not isinstance(step, PrefixChange)]


def _steps_in_use(model: nn.Module, stored: Collection[str]) -> list[Any]:
    """Return the conversions that loading weights of these names would use, which are those that saving reverts."""
    from transformers import core_model_loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    steps: list[Any] = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, core_model_loading.WeightRenaming)]
    converters = [step for step in steps if isinstance(step, core_model_loading.WeightConverter)]
    for name in sorted(stored, key=core_model_loading.dot_natural_key):  # the order of loading; some depend on it
        core_model_loading.rename_source_key(name, renamings, converters)
    return [step for step in steps if step.was_used()]


def _reverse_conversion(model: nn.Module, steps: Sequence[Any]) -> Convert:
    """Return transformers' own way from the names in memory to the names on disk.

    Raises:
        UnsupportedStateError: It does more than move elements: it would not hold for squared gradients.
    """
    from transformers import core_model_loading

    if not steps:
        return dict
    for step in steps:
        for part in (step, *getattr(step, "operations", ())):
            if type(part).__module__ != core_model_loading.__name__:
                raise UnsupportedStateError(
                    f"the weights of {type(model).__name__} are converted by {type(part).__name__} when saved, "
                    "which may do more than move elements and so does not hold for a Fisher; estimate one from data"
                )
    target: Any = model

    def reverse(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        target._weight_conversions = list(steps)  # where save_pretrained looks for them
        converted: Mapping[str, Tensor] = core_model_loading.revert_weight_conversion(target, dict(tensors))
        return converted

    return reverse


def _sources(
    tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor], convert: Convert
) -> dict[str, tuple[str, ...]]:
    """Find by trial which parameters each stored tensor is made of.

    Most are made of one alone: those that come out of it alone as they come out of all together, with no entry lost
    and none claimed by two. The others need all of the rest; if that does not add up, everything needs everything.
    """
    sources: dict[str, tuple[str, ...]] = {}
    rest = []
    for name, tensor in tensors.items():
        try:
            alone = convert({name: tensor})
        except Exception:  # an operation that needs other tensors beside this one fails in its own way
            alone = {}
        same = all(out in whole and part.shape == whole[out].shape for out, part in alone.items())
        if same and not sources.keys() & alone.keys() and sum(p.numel() for p in alone.values()) == tensor.numel():
            sources.update(dict.fromkeys(alone, (name,)))
        else:
            rest.append(name)
    if not rest and sources.keys() == whole.keys():
        return sources
    try:
        together = convert({name: tensors[name] for name in rest})
    except Exception:
        together = {}
    if not sources.keys() & together.keys() and sources.keys() | together.keys() == whole.keys():
        return sources | dict.fromkeys(together, tuple(rest))
    return dict.fromkeys(whole, tuple(tensors))
