"""How a second moment is kept: as a tensor of the parameter's shape, or in a form to be worked out when it is read."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowsAndColumns:
    """Adafactor's form of a second moment: the outer product of its row means and column means over their mean.

    ``v_ij = rows_i columns_j / mean(rows)``; it is blind to what differs within a row and a column alike.

    ``rows``: shape ``(..., m)``, means of v over its last axis. ``columns``: shape ``(..., n)``, over the last but one.

    Source: Section 3 of Shazeer and Stern, "Adafactor", 2018.

    Example:
        >>> RowsAndColumns(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0, 0.0])).read()
        tensor([[1., 2., 0.],
                [3., 6., 0.]])
    """

    rows: Tensor
    columns: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return torch.Size([*self.rows.shape, self.columns.shape[-1]])

    @property
    def dtype(self) -> torch.dtype:
        """Of the second moment."""
        return self.rows.dtype

    def read(self) -> Tensor:
        """Return the second moment; 0 where all rows are."""
        mean = self.rows.mean(-1, keepdim=True)
        relative = torch.where(mean == 0, 0.0, self.rows / mean)
        return relative[..., :, None] * self.columns[..., None, :]


Stored: TypeAlias = Tensor | RowsAndColumns


def read(stored: Stored) -> Tensor:
    """Return a second moment in the parameter's shape."""
    return stored if isinstance(stored, Tensor) else stored.read()
