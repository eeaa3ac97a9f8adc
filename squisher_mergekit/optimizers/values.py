"""How a second moment is kept: as a tensor of the parameter's shape, or in a form to be worked out when it is read."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

BLOCK = 256


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


@dataclass(frozen=True)
class Blockwise:
    """A second moment in 8 bits, as bitsandbytes keeps it: ``v_i = levels[codes_i] scales[i // 256]``.

    ``codes``: uint8, of the parameter's shape; i counts its entries row by row. ``levels``: 256 numbers in [0, 1].
    ``scales``: the largest v of each block of 256 entries, of which the last may be short.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022.

    Example:
        >>> codes = torch.tensor([[0, 128], [255, 1]], dtype=torch.uint8)
        >>> Blockwise(codes, torch.arange(256) / 255, torch.tensor([5.1])).read()
        tensor([[0.0000, 2.5600],
                [5.1000, 0.0200]])
    """

    codes: Tensor
    levels: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the second moment."""
        return self.levels.dtype

    def fits(self) -> bool:
        """Return whether the three tensors belong together."""
        blocks = -(-self.codes.numel() // BLOCK)
        floats = self.levels.is_floating_point() and self.scales.is_floating_point()
        return (
            floats
            and self.codes.dtype == torch.uint8
            and self.levels.shape == (256,)
            and self.scales.shape == (blocks,)
        )

    def read(self) -> Tensor:
        """Return the second moment."""
        flat = self.levels[self.codes.flatten().int()]
        return flat.mul_(self.scales.repeat_interleave(BLOCK)[: flat.numel()]).reshape(self.shape)


Stored: TypeAlias = Tensor | RowsAndColumns | Blockwise


def read(stored: Stored) -> Tensor:
    """Return a second moment in the parameter's shape."""
    return stored if isinstance(stored, Tensor) else stored.read()
