"""Inert stand-ins for the classes of other libraries in pickles, and the globals that are refused.

Nothing in a pickle is ever run: every class or function that it names is replaced by a class that keeps the saved data
and does nothing. Names of Python's own modules that can start programs or open files are refused all the same, as no
training state needs them.
"""

import re
import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class StandIn:
    """Inert replacement for a class of a library that is not needed: it keeps the saved data, and does nothing.

    Attributes:
        given: Constructor arguments of the object.
        state: Saved state of the object, where it is no mapping of attributes.
    """

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and state[0] is None:  # attributes in slots
            state = state[1]
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class ReplacedObject(StandIn):
    """Inert replacement for an object that no reader needs, such as a script's settings or a random state."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given)
        self.__dict__.update(settings)

    def __new__(cls, *_: Any, **__: Any) -> "ReplacedObject":
        """Accept any arguments of a constructor."""
        return super().__new__(cls)


class _ReplacedMapping:
    """Inert replacement for a mapping of another class: an ordered dict with its entries."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Return an empty mapping, whatever the arguments of the constructor are."""
        return OrderedDict()


class _ReplacedSequence:
    """Inert replacement for a sequence of another class: a list with its entries."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Return an empty list, whatever the arguments of the constructor are."""
        return []


class QuantizedStandIn(Tensor):
    """Inert replacement for torchao's quantized tensors, with their parts as attributes.

    Attributes:
        codes: The codes.
        scale: The scales of the blocks.
        qmap: The levels; missing where the codes are float8.
        _shape: Shape of the tensor, where two codes are packed into a byte.
    """

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        """Refuse to compute: the entries are in the parts."""
        return NotImplemented


class ShardedStandIn(QuantizedStandIn):
    """Inert replacement for FSDP1's sharded tensor.

    Attributes:
        state: The shards of this rank, and the metadata of all shards.
    """

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ProcessGroupState(StandIn):
    pass


def _state_of_processes(*_: Any) -> type[StandIn]:
    """Replace ``getattr``, which FSDP1's pickles use to name one class and nothing else."""
    return _ProcessGroupState


_QUANTIZED = ("subclass_8bit.OptimState8bit", "subclass_4bit.OptimState4bit", "subclass_fp8.OptimStateFp8")
# Objects in the states of ScalableShampoo, in older and newer versions of pytorch_optimizer.
_OF_SCALABLE_SHAMPOO = {
    "shampoo_utils": ("PreConditioner", "BlockPartitioner", "PreConditionerType", "Graft", "SGDGraft", "SQRTNGraft",
                      "AdaGradGraft", "RMSPropGraft"),
    "utils.preconditioner": ("PreConditioner",),
    "utils.partition": ("BlockPartitioner", "PreConditionerType"),
    "utils.graft": ("Graft", "SGDGraft", "SQRTNGraft", "AdaGradGraft", "RMSPropGraft"),
}  # fmt: skip
STAND_INS: list[Any] = (
    [
        (type(name.rpartition(".")[2], (StandIn,), {}), name)
        for name in (
            "deepspeed.runtime.fp16.loss_scaler.LossScaler",
            "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
            "deepspeed.runtime.zero.config.ZeroStageEnum",
            "deepspeed.utils.tensor_fragment.fragment_address",
            "torch.distributed._shard.metadata.ShardMetadata",
            "torch.distributed.remote_device._remote_device",
            "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
            "torch.distributed._shard.sharding_spec.chunk_sharding_spec.ChunkShardingSpec",
            "torch.distributed._shard.sharded_tensor.metadata.ShardedTensorMetadata",
            "torch.distributed._shard.sharded_tensor.shard.Shard",
            "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
        )
    ]
    + [
        (ShardedStandIn, "torch.distributed._shard.sharded_tensor.api.ShardedTensor"),
        (_state_of_processes, "builtins.getattr"),
        (_ProcessGroupState, "torch.distributed._shard.sharded_tensor.api.ShardedTensor.ProcessGroupState"),
    ]
    + [
        (type(name, (StandIn,), {}), f"pytorch_optimizer.optimizer.{module}.{name}")
        for module, names in _OF_SCALABLE_SHAMPOO.items()
        for name in names
    ]
    + [
        (QuantizedStandIn, f"{home}.{name}")
        for name in _QUANTIZED
        for home in ("torchao.optim", "torchao.prototype.low_bit_optim")
    ]
)


# Modules of Python whose classes hold data alone. All other modules of Python are refused.
_DATA_MODULES = frozenset(
    {
        "argparse", "array", "collections", "copyreg", "datetime", "decimal", "enum", "fractions", "numbers",
        "pathlib", "re", "types", "typing", "uuid", "zoneinfo", "_codecs",
    }
)  # fmt: skip
# Data of ``builtins``; everything else there, such as ``eval`` and ``open``, is refused.
_DATA_BUILTINS = frozenset(
    {
        "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
        "slice", "str", "tuple", "NoneType", "Ellipsis", "NotImplemented",
    }
)  # fmt: skip
_PYTHON_2 = {"__builtin__", "commands", "copy_reg", "urllib2", "cPickle", "exceptions"}
_SYSTEM = frozenset(sys.stdlib_module_names | _PYTHON_2 | {"nt", "posix", "_io"})


def is_data(name: str) -> bool:
    """Return True for a global that an inert stand-in may replace; False for a callable of Python's own modules.

    Args:
        name: Module and name, with dots.

    Example:
        >>> is_data("argparse.Namespace"), is_data("omegaconf.dictconfig.DictConfig"), is_data("os.system")
        (True, True, False)
    """
    module, _, rest = name.partition(".")
    if module in ("builtins", "__builtin__"):
        return rest in _DATA_BUILTINS
    if module == "types":
        return rest == "SimpleNamespace"
    return module in _DATA_MODULES or module not in _SYSTEM


def inert(name: str, kind: type = ReplacedObject) -> tuple[type, str]:
    """Return a new stand-in for a global, with its name, as ``torch.serialization.safe_globals`` takes it."""
    return type(name, (kind,), {"__module__": _REPLACED}), name


_REPLACED = "replaced"
_CONTAINER = re.compile(rf"Can only (SETITEM|append|extend).* but got <class '{_REPLACED}\.([\w.]+)'>")


def container(error: str) -> tuple[str, tuple[type, str]] | None:
    """Return name and stand-in of a container, from torch's error about entries of an object; None for other errors.

    A pickle tells that an object is a container only by the entries that follow it.
    """
    found = _CONTAINER.search(error)
    if found is None:
        return None
    return found[2], inert(found[2], _ReplacedMapping if found[1] == "SETITEM" else _ReplacedSequence)


def replaced_in(value: Any) -> str | None:
    """Return the class of an object that was replaced, in nested containers and stand-ins; None if there is none.

    Example:
        >>> replaced_in({"step": 3, "projector": [inert("library.Projector")[0]()]})
        'library.Projector'
    """
    todo, seen = [value], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, ReplacedObject):
            return type(item).__name__
        if isinstance(item, Mapping):
            todo += item.values()
        elif isinstance(item, list | tuple | set):
            todo += item
        elif isinstance(item, StandIn):
            todo += [vars(item)]
    return None
