"""A model in training: what is wrapped around it, and what its parameters are called on disk."""

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.errors import NamingError
from squisher_mergekit.models.adapters import disk_names
from squisher_mergekit.models.checkpoint_names import CheckpointNames, Parameter, of_model

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def unwrapped(name: str) -> str:
    """Strip what DDP, torch.compile, FSDP and activation checkpointing put into a name.

    Example:
        >>> unwrapped("module._orig_mod.encoder._checkpoint_wrapped_module.weight")
        'encoder.weight'
    """
    for wrapper in _WRAPPERS[1:]:
        name = name.replace(wrapper, "")
    while name.startswith(_WRAPPERS[0]):
        name = name.removeprefix(_WRAPPERS[0])
    return name


_CONVERSIONS = "_weight_conversions"  # where transformers notes how a model was loaded, and so how it is saved


@dataclass(frozen=True)
class Described:
    """What is known of a model's parameters.

    ``names``: id of a parameter -> its name in memory, wrappers left out. ``checkpoint_names``: the way from these to
    disk; None where they are those already. ``adapter``: of a LoRA, name in memory -> name on disk.
    """

    names: Mapping[int, str]
    checkpoint_names: CheckpointNames | None = None
    adapter: Mapping[str, str] | None = None

    @property
    def basename(self) -> str:
        """How the files of the weights begin."""
        return "model" if self.adapter is None else "adapter_model"


def unwrap_model(model: nn.Module) -> nn.Module:
    """Take off what DDP, DataParallel, FSDP1 and torch.compile put around a model.

    Example:
        >>> inner = nn.Linear(2, 3)
        >>> unwrap_model(nn.DataParallel(torch.compile(inner, backend="eager"))) is inner
        True
    """
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(compiled, nn.Module):
            model = compiled
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or _is_fsdp1(model):
            inner: Any = model.module
            model = inner
        else:
            return model


def uses_fsdp1(model: nn.Module) -> bool:
    """Return whether FSDP1 holds the parameters, flattened and cut up."""
    return any(_is_fsdp1(module) for module in model.modules())


def uses_deepspeed(model: nn.Module, optimizer: Any) -> bool:
    """Return whether DeepSpeed holds the optimizer's state."""
    return any("deepspeed" in type(one).__module__ for one in (model, optimizer))


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by their names in memory, the first of a tied one's, wrappers left out.

    Example:
        >>> list(parameters_of(nn.DataParallel(nn.Linear(2, 3))))
        ['weight', 'bias']
    """
    return {_clean(name): parameter for name, parameter in unwrap_model(model).named_parameters()}


def memory_names(model: nn.Module) -> dict[int, str]:
    """Return id of a parameter -> its name in memory, see :func:`parameters_of`."""
    return {id(parameter): name for name, parameter in parameters_of(model).items()}


def describe(model: nn.Module, stored: Collection[str] = ()) -> Described:
    """Find the names of a model's parameters in memory, and how they are saved.

    Args:
        model: A model of transformers or peft, or any other; wrapped or not, on any device.
        stored: The names in the weights beside, if there are weights.

    Returns:
        Names and their way to disk.

    Raises:
        NamingError: transformers cannot build the model from its config, and its modules are wrapped one by one.
        UnsupportedStateError: transformers converts the model's weights by more than moving elements.
    """
    inner = unwrap_model(model)
    names = memory_names(model)
    if _is_a("peft", "PeftModel", inner):
        state = {_clean(name): tensor for name, tensor in (*inner.named_parameters(), *inner.named_buffers())}
        return Described(names, adapter=disk_names(inner, state))
    flat = uses_fsdp1(model)
    if not _is_a("transformers", "PreTrainedModel", inner):
        return Described(names, None if flat else _plain(inner))
    wrapped = flat or any(name != _clean(name) for name, _ in inner.named_parameters())
    return Described(names, _of_transformers(_rebuilt(inner) if wrapped else inner, inner, stored))


def _is_fsdp1(module: nn.Module) -> bool:
    return _is_a("torch.distributed.fsdp", "FullyShardedDataParallel", module)


def _is_a(package: str, name: str, thing: object) -> bool:
    """Return whether a thing is of a class, without importing what it is not made of."""
    module = sys.modules.get(package)
    return module is not None and isinstance(thing, getattr(module, name))


def _clean(name: str) -> str:
    # The outermost wrapper is off: what is called "module." now is the model's own.
    return unwrapped(f".{name}")[1:]


def _plain(model: nn.Module) -> CheckpointNames:
    """Describe a model that is saved by its state_dict."""
    same: dict[int, list[str]] = {}
    parameters = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same.setdefault(id(parameter), []).append(_clean(name))
        parameters[id(parameter)] = parameter
    firsts = {names[0]: tuple(parameters[key].shape) for key, names in same.items()}
    return CheckpointNames(
        tuple(Parameter(name, shape) for name, shape in firsts.items()),
        {name: names[0] for names in same.values() for name in names},
        {name: (name,) for name in firsts},
        firsts,
        {name: names[0] for names in same.values() for name in names[1:]},
        dict,
    )


def _of_transformers(described: nn.Module, model: nn.Module, stored: Collection[str]) -> CheckpointNames:
    """Describe a model as save_pretrained saves it; ``described`` is ``model``, or the same without wrappers."""
    with _untouched(described):
        bones = of_model(described, stored or _names_when_saved(described, model))

    def convert(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with _untouched(described):
            return bones.convert(tensors)

    return replace(bones, convert=convert)


def _names_when_saved(described: nn.Module, model: nn.Module) -> Collection[str]:
    """Return the names that a model which was loaded from files is saved under; empty for a new one."""
    from transformers import core_model_loading

    if _CONVERSIONS not in vars(model):
        return ()
    empty = {name: torch.empty(p.shape, device="meta") for name, p in described.named_parameters()}
    return set(core_model_loading.revert_weight_conversion(model, empty))


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Leave to a live model the conversions that it will be saved by."""
    missing = object()
    before = vars(model).get(_CONVERSIONS, missing)
    try:
        yield
    finally:
        if before is missing:
            vars(model).pop(_CONVERSIONS, None)
        else:
            vars(model)[_CONVERSIONS] = before


def _rebuilt(model: nn.Module) -> nn.Module:
    """Build a model of transformers once more, without weights and without what is wrapped around its modules.

    Raises:
        NamingError: Its class cannot be built from its config.
    """
    try:
        with torch.device("meta"):
            rebuilt: nn.Module = type(model)(model.config)
    except Exception as error:  # a constructor of the user's can fail in any way
        raise NamingError(
            f"{type(model).__name__} must be one that can be built from its config, as its modules are wrapped, but "
            f"{error!s:.100}; take squisher extract on the checkpoint"
        ) from error
    return rebuilt
