"""State of a parameter in Shampoo or SOAP, and its diagonal from the sums of squares per row and per column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError
from squisher_mergekit.optimizers.encodings import RowsAndColumns
from squisher_mergekit.optimizers.second_moments import Moment
from squisher_mergekit.tensors.lazy import MaybeLazy, parts, read


@dataclass(frozen=True)
class Sums:
    """Sums of a squared gradient for each row or each column of a matrix.

    Attributes:
        stored: A factor, ``[n, n]`` or in blocks, or a matrix of squares in a basis that keeps the sums.
        axis: 0 for a sum per row, 1 for a sum per column.
        is_factor: True for a factor, whose diagonal has the sums.
        initial: Multiple of the identity in the factor that belongs to no gradient.
        size: Number of sums; None for all. Factors in blocks can be padded.
    """

    stored: MaybeLazy
    axis: int
    is_factor: bool = True
    initial: float = 0.0
    size: int | None = None

    def read(self) -> Tensor:
        """Return the sums, float32."""
        wide = read(self.stored).to(torch.float32)
        if not self.is_factor:
            return wide.sum(1 - self.axis)
        diagonal = wide.diagonal(dim1=-2, dim2=-1).reshape(-1)[: self.size]
        return (diagonal - self.initial).clamp_min(0)


@dataclass(frozen=True)
class FromSums:
    """Second moment of a matrix from its sums, ``v_ij = rows_i columns_j / sum(rows)``; of a vector, its rows.

    Attributes:
        rows: Sum per row.
        columns: Sum per column; None for a vector.
        shape: Shape of the parameter.

    Example:
        >>> rows, columns = Sums(torch.diag(torch.tensor([1.0, 3.0])), 0), Sums(torch.diag(torch.tensor([2.0, 2.0])), 1)
        >>> FromSums(rows, columns, torch.Size([2, 2])).read()
        tensor([[0.5000, 0.5000],
                [1.5000, 1.5000]])
    """

    rows: Sums
    columns: Sums | None
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the entries."""
        return torch.float32

    @property
    def parts(self) -> Sequence[Tensor]:
        """The stored tensors."""
        stored = (self.rows.stored,) if self.columns is None else (self.rows.stored, self.columns.stored)
        return [part for each in stored for part in parts(each)]

    def read(self) -> Tensor:
        """Return the second moment."""
        if self.columns is None:
            return self.rows.read()
        height, width = self.shape
        return RowsAndColumns(self.rows.read() / width, self.columns.read() / height).read()


@dataclass(frozen=True)
class Preconditioned:
    """State of one parameter in Shampoo or SOAP.

    Attributes:
        moment: Kind of the second moment.
        tensor: The second moment; None if the state has none in the basis of the weights.
        factors: Factors over the rows and over the columns, ``[n, n]`` or in blocks; None for an axis without one.
        shape: Shape of the parameter.
        steps_before: Number of gradients behind the second moment, less the recorded number of steps.
        initial: Multiple of the identity that the factors began with.
        of_factors: Kind of the factors; None if it is that of the second moment.
        lacking: Reason for a missing second moment.
    """

    moment: Moment
    tensor: MaybeLazy | None
    factors: tuple[MaybeLazy | None, MaybeLazy | None]
    shape: tuple[int, ...]
    steps_before: int = 0
    initial: float = 0.0
    of_factors: Moment | None = None
    lacking: str = "Shampoo and SOAP keep that of merged axes, or of a tensor that is no matrix, in another basis"


def square_matrix(value: Any, location: str) -> Tensor:
    """Return a factor.

    Raises:
        CorruptFileError: The value is no square matrix of floats with bytes of its own.
    """
    square = type(value) is Tensor and value.is_floating_point() and value.ndim == 2 and len(value) == value.shape[1]
    if not square or value.numel() * value.itemsize > value.untyped_storage().nbytes():
        found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise CorruptFileError(
            f"a factor of {location} must be a square matrix of floats, found {found}; save it again"
        )
    matrix: Tensor = value
    return matrix
