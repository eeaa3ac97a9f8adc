"""Parameters of a model in training: wrappers taken off, names in memory and on disk."""

import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.errors import NamingError
from squisher_mergekit.models.adapters import disk_names
from squisher_mergekit.models.checkpoint_names import of_model
from squisher_mergekit.models.names import CheckpointNames, ParameterInfo

DDP = "module."
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_WRAPPED = re.compile(rf"(?<![^.])(?:{'|'.join(map(re.escape, WRAPPERS))})")  # whole parts of a name alone


def unwrapped(name: str) -> str:
    """Strip the prefixes of DDP, torch.compile, FSDP and activation checkpointing from a name.

    Example:
        >>> unwrapped("module._orig_mod.encoder._checkpoint_wrapped_module.weight")
        'encoder.weight'
    """
    name = _WRAPPED.sub("", name)
    while name.startswith(DDP):
        name = name.removeprefix(DDP)
    return name


# The attribute in which transformers records how a model was loaded, and so how it is saved.
_CONVERSIONS = "_weight_conversions"


@dataclass(frozen=True)
class ParameterNames:
    """Names of a live model's parameters.

    Attributes:
        names: Id of a parameter -> name in memory, without wrappers.
        checkpoint_names: Names on disk and the conversion to them; None where the names in memory are those on disk.
        adapter: Name in memory -> name on disk for a LoRA adapter; None for a full model.
    """

    names: Mapping[int, str]
    checkpoint_names: CheckpointNames | None = None
    adapter: Mapping[str, str] | None = None

    @property
    def basename(self) -> str:
        """Basename of the weight files."""
        return "model" if self.adapter is None else "adapter_model"


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of DDP, DataParallel, FSDP1 and torch.compile.

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
    """Return True if FSDP1 has flattened and sharded the parameters."""
    return any(_is_fsdp1(module) for module in model.modules())


def uses_deepspeed(model: nn.Module, optimizer: Any) -> bool:
    """Return True if DeepSpeed owns the optimizer's state."""
    return any("deepspeed" in type(one).__module__ for one in (model, optimizer))


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by name in memory: without wrappers, tied ones under their first name.

    Example:
        >>> list(parameters_of(nn.DataParallel(nn.Linear(2, 3))))
        ['weight', 'bias']
    """
    return {memory_name(name): parameter for name, parameter in unwrap_model(model).named_parameters()}


def memory_names(model: nn.Module) -> dict[int, str]:
    """Return id of a parameter -> name in memory, see :func:`parameters_of`."""
    return {id(parameter): name for name, parameter in parameters_of(model).items()}


def describe(model: nn.Module, stored: Collection[str] = ()) -> ParameterNames:
    """Return the names of a model's parameters in memory and on disk.

    Args:
        model: A model of transformers or peft, or any other; wrapped or not, on any device.
        stored: Names of the tensors in the model's weights on disk; empty if there are none.

    Raises:
        NamingError: transformers cannot build the model from its config, and its modules are wrapped one by one.
        UnsupportedStateError: transformers converts the model's weights by more than moving elements.
    """
    inner = unwrap_model(model)
    names = memory_names(model)
    if _is_a("peft", "PeftModel", inner):
        state = {memory_name(name): tensor for name, tensor in (*inner.named_parameters(), *inner.named_buffers())}
        return ParameterNames(names, adapter=disk_names(inner, state))
    flat = uses_fsdp1(model)
    if not _is_a("transformers", "PreTrainedModel", inner):
        return ParameterNames(names, None if flat else _of_state_dict(inner))
    wrapped = flat or any(name != memory_name(name) for name, _ in inner.named_parameters())
    return ParameterNames(names, _of_transformers(rebuilt(inner) if wrapped else inner, inner, stored))


def _is_fsdp1(module: nn.Module) -> bool:
    return _is_a("torch.distributed.fsdp", "FullyShardedDataParallel", module)


def _is_a(package: str, name: str, thing: object) -> bool:
    """Return ``isinstance`` for a class in a package, without importing the package."""
    module = sys.modules.get(package)
    return module is not None and isinstance(thing, getattr(module, name))


def memory_name(name: str) -> str:
    """Return a name in an unwrapped model without the wrappers of its inner modules.

    Example:
        >>> memory_name("module.0._orig_mod.weight")
        'module.0.weight'
    """
    # The outermost wrapper is off, so a leading "module." is the model's own.
    return unwrapped(f".{name}")[1:]


def _of_state_dict(model: nn.Module) -> CheckpointNames:
    """Return the names of a model that is saved by its state_dict."""
    shared: dict[int, list[str]] = {}
    parameters = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(memory_name(name))
        parameters[id(parameter)] = parameter
    firsts = {names[0]: tuple(parameters[key].shape) for key, names in shared.items()}
    return CheckpointNames(
        tuple(ParameterInfo(name, shape) for name, shape in firsts.items()),
        {name: names[0] for names in shared.values() for name in names},
        {name: (name,) for name in firsts},
        firsts,
        {name: names[0] for names in shared.values() for name in names[1:]},
        dict,
    )


def _of_transformers(bare: nn.Module, model: nn.Module, stored: Collection[str]) -> CheckpointNames:
    """Return the names of a model that is saved by save_pretrained; ``bare`` is the model without inner wrappers."""
    with _untouched(bare):
        names = of_model(bare, stored or _names_when_saved(bare, model))

    def convert(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with _untouched(bare):
            return names.convert(tensors)

    return replace(names, convert=convert)


def _names_when_saved(bare: nn.Module, model: nn.Module) -> Collection[str]:
    """Return the names under which a model loaded from files is saved; empty for a new model."""
    from transformers import core_model_loading

    if _CONVERSIONS not in vars(model):
        return ()
    empty = {name: torch.empty(p.shape, device="meta") for name, p in bare.named_parameters()}
    return set(core_model_loading.revert_weight_conversion(model, empty))


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Restore a live model's recorded conversions at the end of a ``with`` block."""
    missing = object()
    before = vars(model).get(_CONVERSIONS, missing)
    try:
        yield
    finally:
        if before is missing:
            vars(model).pop(_CONVERSIONS, None)
        else:
            vars(model)[_CONVERSIONS] = before


def rebuilt(model: nn.Module) -> nn.Module:
    """Build a model of transformers once more, on the meta device and without wrappers around its modules.

    Raises:
        NamingError: The model's class cannot be built from its config.
    """
    try:
        with torch.device("meta"):
            again: nn.Module = type(model)(model.config)
    except Exception as error:  # a user's constructor can fail in any way
        raise NamingError(
            f"{type(model).__name__} must be one that can be built from its config, as its modules are wrapped, but "
            f"{error!s:.100}; take squisher extract on the checkpoint"
        ) from error
    return again
