"""Parameters of a Hugging Face model, in their order, with their names in memory and on disk; no weights needed."""

import copy
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.errors import CorruptFileError, NamingError, UnsupportedStateError
from squisher_mergekit.models.diffusers_names import diffusers_names, is_diffusers
from squisher_mergekit.models.names import NAMES_CURE, CheckpointNames, Convert, ParameterInfo
from squisher_mergekit.tensors.input_files import read_mapping

LOG = logging.getLogger("squisher_mergekit")
LAYER_NORM = "torch.nn.LayerNorm"
# Limits of a config, above all published models.
_COUNT = re.compile(r"(?:^|_)(?:layers?|depths?|blocks|experts)$")
MOST_LAYERS, _MOST_LABELS, _MOST_MODULES = 10_000, 1_000_000, 100_000


def checkpoint_names(folder: Path, stored: Collection[str] = ()) -> CheckpointNames:
    """Return the names of the model that a ``config.json`` describes, built on the meta device without memory.

    Args:
        folder: Folder of ``config.json``.
        stored: Names of the tensors in the model's weights; empty if there are no weights.

    Raises:
        NamingError: The folder has no ``config.json``.
        CorruptFileError: transformers cannot build a model from the ``config.json``.
        UnsupportedStateError: transformers converts the model's weights by more than moving elements.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise NamingError(
            f"the order of a model's parameters follows from its config.json, but {folder} has none; "
            f"give --model DIR, or {NAMES_CURE}"
        )
    if is_diffusers(read_mapping(file)):
        return diffusers_names(folder)
    return _cached(file.absolute(), file.stat().st_mtime_ns, frozenset(stored))


@lru_cache(maxsize=16)
def _cached(file: Path, _changed_at: int, stored: frozenset[str]) -> CheckpointNames:
    return of_model(meta_model(file.parent), stored)


def meta_model(folder: Path) -> nn.Module:
    """Build the model of a ``config.json`` on the meta device; code from the folder is never run.

    Raises:
        CorruptFileError: transformers cannot build a model from the ``config.json``.
    """
    import transformers

    check_config(folder)
    try:
        model = model_of_config(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # a config can make a model's constructor raise nearly anything
        raise CorruptFileError(
            f"{folder / 'config.json'} must describe a model of transformers' own, but {str(error)[:200]}; "
            f"give {NAMES_CURE}"
        ) from error
    return model


def model_of_config(config: Any) -> nn.Module:
    """Build the model of a config on the meta device, from the classes of transformers alone.

    Args:
        config: A ``PretrainedConfig``.

    Raises:
        ValueError: transformers has no class of that name; the class can raise anything else.
    """
    import transformers

    names = config.architectures or _only_architecture(config.model_type)
    if not names:
        raise ValueError(
            f"it names no architectures, and {config.model_type} has more than one kind of model; add "
            '"architectures": ["CLASS"] to it, with the class that was trained'
        )
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        raise ValueError(f"transformers {transformers.__version__} has no architecture {names[0]}")
    config = copy.deepcopy(config)
    if isinstance(config.dtype, str):  # mergekit sets a name, which constructors of layers do not take
        config.dtype = getattr(torch, config.dtype, None)
    with torch.device("meta"), _bounded_modules():
        model: nn.Module = model_class(config)
    return model


def _only_architecture(kind: str) -> list[str]:
    """Return the class of a decoder's language model; empty where ``model_type`` is not that of a decoder of text."""
    from transformers.models.auto import modeling_auto as auto

    other = (
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    )
    name = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if not isinstance(name, str) or any(kind in mapping for mapping in other):
        return []
    LOG.warning("the config of a %s names no architectures; it is taken to be that of a %s", kind, name)
    return [name]


def check_config(folder: Path) -> None:
    """Refuse a ``config.json`` that is no mapping, or of a model that would take hours to build.

    Raises:
        CorruptFileError: The file is damaged, or a count in it is negative or too large.
    """
    _check_counts(read_mapping(folder / "config.json"), folder / "config.json")


def _check_counts(config: Mapping[str, Any], file: Path) -> None:
    """Refuse a config with more layers or experts than any model has, which would take hours to build.

    Raises:
        CorruptFileError: A count, here or in a nested config, is too large.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, file)
        most = _MOST_LABELS if key == "num_labels" else MOST_LAYERS if _COUNT.search(key) else None
        numbers = value if isinstance(value, list) else [value]
        # Other keys have negative numbers, such as vision_feature_layer: -2.
        least = 0 if key == "num_hidden_layers" else -float("inf")
        if most and any(isinstance(number, int | float) and not least <= number <= most for number in numbers):
            bound = f"from 0 to {most}" if least == 0 else f"of at most {most}"
            raise CorruptFileError(
                f"{file} must describe a model that can be built, with {key} {bound}, found {value!r:.50}; "
                "correct it, or copy the config.json of the model again"
            )


@contextmanager
def _bounded_modules() -> Iterator[None]:
    """Raise inside the ``with`` block once a model has more modules than any model of transformers."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1
        if count > _MOST_MODULES:
            raise ValueError(f"it has more than {_MOST_MODULES} modules")

    handle = nn.modules.module.register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def of_model(model: nn.Module, stored: Collection[str] = ()) -> CheckpointNames:
    """Return the names of a model of transformers.

    A model is saved under the names that it was loaded from: BERT's LayerNorm.gamma, an older prefix, packed experts.
    The stored names therefore decide which conversions are in use; without stored names the usual ones are.

    Args:
        model: The model, on any device.
        stored: Names of the tensors in the model's weights; empty if there are no weights.

    Raises:
        UnsupportedStateError: transformers converts the model's weights by more than moving elements.
    """
    if stored:
        found = _names_by_steps(model, _steps_in_use(model, stored))
        if found.sources.keys() <= set(stored):
            return found
    return _names_by_steps(model, _usual_steps(model))


def _names_by_steps(model: nn.Module, steps: Sequence[Any]) -> CheckpointNames:
    modules = dict(model.named_modules())
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parameters = tuple(
        ParameterInfo(name, tuple(p.shape), types_around(name, modules), p.requires_grad)
        for name, p in model.named_parameters()
    )
    # Of tied parameters, save_pretrained keeps the one whose name is not among the tied keys.
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    saved_as = {shared[0]: next((name for name in shared if name not in tied), shared[0]) for shared in names.values()}
    reverse = _reverse_conversion(model, steps)

    def convert(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return reverse({saved_as[name]: tensor for name, tensor in tensors.items()})

    tensors = {p.name: torch.empty(p.shape, device="meta") for p in parameters}
    on_disk = convert(tensors)
    aliases: dict[str, str] = {}
    for shared in names.values():
        stored = [(name, tuple(reverse({name: tensors[shared[0]]}))) for name in shared] if len(shared) > 1 else []
        main = dict(stored).get(saved_as[shared[0]], ())
        for name, others in stored:
            if name != saved_as[shared[0]] and len(others) == len(main):
                aliases.update(zip(others, main, strict=True))
    return CheckpointNames(
        parameters,
        {name: shared[0] for shared in names.values() for name in shared},
        _sources(tensors, on_disk, convert),
        {name: tuple(tensor.shape) for name, tensor in on_disk.items()},
        aliases,
        convert,
    )


def types_around(name: str, modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """Return the class names of the modules around a parameter, without the root, and of their base classes."""
    path = name.split(".")[:-1]
    around = [modules[".".join(path[: i + 1])] for i in range(len(path))]
    types = {base.__name__ for module in around for base in type(module).__mro__}
    return frozenset(types | ({LAYER_NORM} if any(isinstance(m, nn.LayerNorm) for m in around) else set()))


def _usual_steps(model: nn.Module) -> list[Any]:
    """Return the conversions that save_pretrained reverts for a model that was not loaded from files."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    steps = get_model_conversion_mapping(model, add_legacy=False)
    return [step for step in steps if not isinstance(step, PrefixChange)]


def _steps_in_use(model: nn.Module, stored: Collection[str]) -> list[Any]:
    """Return the conversions that loading weights with these names uses, and that saving reverts."""
    from transformers import core_model_loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    steps: list[Any] = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, core_model_loading.WeightRenaming)]
    converters = [step for step in steps if isinstance(step, core_model_loading.WeightConverter)]
    for name in sorted(stored, key=core_model_loading.dot_natural_key):  # the order of loading; some depend on it
        core_model_loading.rename_source_key(name, renamings, converters)
    return [step for step in steps if step.was_used()]


def _reverse_conversion(model: nn.Module, steps: Sequence[Any]) -> Convert:
    """Return transformers' own conversion from the names in memory to the names on disk.

    Raises:
        UnsupportedStateError: The conversion does more than move elements, and is wrong for squared gradients.
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
        target._weight_conversions = list(steps)  # the attribute that save_pretrained reads
        converted: Mapping[str, Tensor] = core_model_loading.revert_weight_conversion(target, dict(tensors))
        return converted

    return reverse


def _sources(
    tensors: Mapping[str, Tensor], on_disk: Mapping[str, Tensor], convert: Convert
) -> dict[str, tuple[str, ...]]:
    """Find by trial which parameters each tensor on disk is made of.

    A tensor is made of one parameter if converting that parameter alone gives the same tensor, with no entry lost and
    none claimed by two parameters. The other tensors are taken to need all remaining parameters; if that does not give
    all tensors on disk, each is taken to need all parameters.
    """
    sources: dict[str, tuple[str, ...]] = {}
    rest = []
    for name, tensor in tensors.items():
        try:
            alone = convert({name: tensor})
        except Exception:  # an operation that needs further tensors can fail in any way
            alone = {}
        equal = all(out in on_disk and part.shape == on_disk[out].shape for out, part in alone.items())
        if equal and not sources.keys() & alone.keys() and sum(p.numel() for p in alone.values()) == tensor.numel():
            sources.update(dict.fromkeys(alone, (name,)))
        else:
            rest.append(name)
    if not rest and sources.keys() == on_disk.keys():
        return sources
    try:
        joint = convert({name: tensors[name] for name in rest})
    except Exception:
        joint = {}
    if not sources.keys() & joint.keys() and sources.keys() | joint.keys() == on_disk.keys():
        return sources | dict.fromkeys(joint, tuple(rest))
    return dict.fromkeys(on_disk, tuple(tensors))
