"""A Hugging Face model without its weights: which parameters it has, in which order, and how they are named on disk."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.errors import CorruptFileError, NotFoundError, UnsupportedStateError
from squisher_mergekit.optimizers.naming import Parameter

Convert = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Skeleton:
    """What a model's class tells.

    ``parameters``: in the model's order, tied ones once. ``aliases``: other name of a tied parameter -> the kept one.
    ``sources``: name on disk -> the parameters in memory that it is made of; ``convert`` makes the one of the others.
    """

    parameters: tuple[Parameter, ...]
    aliases: Mapping[str, str]
    sources: Mapping[str, tuple[str, ...]]
    stored_shapes: Mapping[str, tuple[int, ...]]
    convert: Convert = field(repr=False)


@lru_cache(maxsize=16)
def skeleton(folder: Path) -> Skeleton:
    """Build the model that a folder's ``config.json`` describes, on the meta device: no weights, no memory.

    Args:
        folder: Where ``config.json`` lies.

    Returns:
        Its parameters and their names on disk.

    Raises:
        NotFoundError: There is no ``config.json``.
        CorruptFileError: It is none that transformers can build a model from.
        UnsupportedStateError: transformers converts the model's weights by more than moving elements.
    """
    return of_model(meta_model(folder))


def meta_model(folder: Path) -> nn.Module:
    """Build the model of a ``config.json`` without weights; a model's own code is never run.

    Raises:
        NotFoundError: There is no ``config.json``.
        CorruptFileError: It is none that transformers can build a model from.
    """
    import transformers

    if not (folder / "config.json").is_file():
        raise NotFoundError(
            f"the order of a model's parameters follows from its config.json, but {folder} has none; "
            "give --model DIR, or --names FILE with one name a line"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        names = config.architectures or []
        model_class = getattr(transformers, names[0], None) if names else None
        if model_class is None:
            raise ValueError(f"transformers {transformers.__version__} has no architecture {names}")
        with torch.device("meta"):
            model: Any = model_class(config)
            model.tie_weights()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise CorruptFileError(
            f"{folder / 'config.json'} must describe a model of transformers' own, but {str(error)[:200]}; "
            "give --names FILE with one name a line"
        ) from error
    built: nn.Module = model
    return built


def of_model(model: nn.Module) -> Skeleton:
    """Describe a model of transformers.

    Raises:
        UnsupportedStateError: transformers converts its weights by more than moving elements.
    """
    modules = dict(model.named_modules())
    kept: dict[int, str] = {}
    parameters, aliases = [], {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = kept.setdefault(id(parameter), name)
        if first == name:
            parameters.append(Parameter(name, tuple(parameter.shape), types_around(name, modules)))
        else:
            aliases[name] = first
    tensors = {p.name: torch.empty(p.shape, device="meta") for p in parameters}
    convert = _conversion(model)
    whole = convert(tensors)
    return Skeleton(
        tuple(parameters),
        aliases,
        _sources(tensors, whole, convert),
        {name: tuple(tensor.shape) for name, tensor in whole.items()},
        convert,
    )


def types_around(name: str, modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """Return the class names of the modules that a parameter lies in, the root left out."""
    path = name.split(".")[:-1]
    around = [modules[".".join(path[: i + 1])] for i in range(len(path))]
    types = {type(module).__name__ for module in around}
    return frozenset(types | ({"torch.LayerNorm"} if any(isinstance(m, nn.LayerNorm) for m in around) else set()))


def _conversion(model: nn.Module) -> Convert:
    """Return transformers' own way from the names in memory to the names on disk."""
    from transformers import core_model_loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    steps = [
        step
        for step in get_model_conversion_mapping(model, add_legacy=False)
        if not isinstance(step, core_model_loading.PrefixChange)
    ]
    if not steps:
        return dict
    for step in steps:
        for operation in getattr(step, "operations", []):
            if type(operation).__module__ != core_model_loading.__name__:
                raise UnsupportedStateError(
                    f"the weights of {type(model).__name__} are converted by {type(operation).__name__} when saved, "
                    "which does more than move elements and so does not hold for a Fisher; estimate one from data"
                )
    target: Any = model
    target._weight_conversions = steps

    def convert(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        converted: Mapping[str, Tensor] = core_model_loading.revert_weight_conversion(model, dict(tensors))
        return converted

    return convert


def _sources(
    tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor], convert: Convert
) -> dict[str, tuple[str, ...]]:
    """Find by trial which parameters each stored tensor needs: most are made of one alone."""
    if convert is dict:
        return {name: (name,) for name in tensors}
    sources: dict[str, tuple[str, ...]] = {}
    joint = []
    for name, tensor in tensors.items():
        try:
            alone = convert({name: tensor})
        except (KeyError, ValueError, RuntimeError, IndexError, TypeError):
            alone = {}
        if alone and all(out in whole and part.shape == whole[out].shape for out, part in alone.items()):
            sources.update(dict.fromkeys(alone, (name,)))
        else:
            joint.append(name)
    sources.update({name: tuple(joint) for name in whole if name not in sources})
    return sources
