"""Layouts of matrices: tokens as rows, and the order of the axes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from squisher_mergekit.models.input_axes import axes_in_memory, axes_on_disk
from squisher_mergekit.models.parameters import parameters_of
from squisher_mergekit.models.roles import role_by_name, roles_of, roles_on_disk
from squisher_mergekit.models.weights import Weights


@dataclass(frozen=True)
class MatrixLayout:
    """Layout of one matrix.

    Attributes:
        embedding: True if each row is a token's or a position's.
        transposed: True for a matrix ``[in, out]``, as GPT-2's Conv1D keeps it.
    """

    embedding: bool = False
    transposed: bool = False


def layouts_on_disk(weights: Weights) -> dict[str, MatrixLayout]:
    """Return the layout of each matrix in a folder, by name on disk."""
    shapes = {name: info.shape for name, info in weights.infos.items() if len(info.shape) == 2}
    roles, axes = roles_on_disk(weights), axes_on_disk(weights, shapes)
    return {name: MatrixLayout(roles.get(name) == "embedding", axes[name] == 0) for name in shapes}


def layouts_in_memory(model: nn.Module) -> dict[str, MatrixLayout]:
    """Return the layout of each matrix among a model's parameters, by name in memory.

    Args:
        model: The model, unwrapped.

    Example:
        >>> layouts_in_memory(nn.Linear(2, 3))
        {'weight': MatrixLayout(embedding=False, transposed=False)}
    """
    shapes = {name: tuple(p.shape) for name, p in parameters_of(model).items() if p.ndim == 2}
    roles, axes = roles_of(model), axes_in_memory(model, shapes)
    return {name: MatrixLayout(roles.get(name) == "embedding", axes[name] == 0) for name in shapes}


def layout_by_name(name: str, ndim: int) -> MatrixLayout:
    """Return the layout that a name suggests, where there is no model; matrices count as [out, in].

    Example:
        >>> layout_by_name("model.embed_tokens.weight", 2)
        MatrixLayout(embedding=True, transposed=False)
    """
    return MatrixLayout(embedding=role_by_name(name, ndim) == "embedding")
