"""Parameters of a model and their names, in memory and on disk."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Shape = tuple[int, ...]
Convert = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
NAMES_CURE = "--names FILE with one name a line, line i for the optimizer's parameter i"


@dataclass(frozen=True)
class ParameterInfo:
    """Parameter of a model, without its values.

    Attributes:
        name: Name in memory.
        shape: Shape of the tensor.
        types: Class names of the modules around the parameter, without the root, and of their base classes.
        trainable: False for a parameter that the constructor freezes; ``from_pretrained`` may make it trainable.
    """

    name: str
    shape: Shape
    types: frozenset[str] = frozenset()
    trainable: bool = True

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class CheckpointNames:
    """Names of a model's parameters in memory and on disk, and the conversion between them.

    Attributes:
        parameters: The parameters in the model's order; tied ones once, under their first name.
        first: Name in memory -> first name of the same (perhaps tied) parameter.
        sources: Name on disk -> names in memory of the parameters that ``convert`` makes the tensor of.
        shapes: Name on disk -> shape.
        aliases: Other name on disk of a tied tensor -> name that is saved.
        convert: Function from tensors by name in memory to tensors by name on disk.
    """

    parameters: tuple[ParameterInfo, ...]
    first: Mapping[str, str]
    sources: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    convert: Convert = field(repr=False)
