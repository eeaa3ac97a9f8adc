"""Encodings of second moments: factored, 8-bit and 4-bit; lazy tensors that decode when they are read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squisher_mergekit.fisher.compact import outer_of_means

BLOCK = 256
BLOCKS = (BLOCK, 2048)  # entries per block in newer and in older versions of bitsandbytes


@dataclass(frozen=True)
class RowsAndColumns:
    """Adafactor's factored second moment: outer product of row means and column means, over their mean.

    ``v_ij = rows_i columns_j / mean(rows)``, a rank-1 approximation of v.

    Attributes:
        rows: Means of v over its last axis, shape ``(..., m)``.
        columns: Means of v over its last axis but one, shape ``(..., n)``.

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
        """Shape of the parameter."""
        return torch.Size([*self.rows.shape, self.columns.shape[-1]])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the second moment."""
        return self.rows.dtype

    @property
    def parts(self) -> Sequence[Tensor]:
        """Rows and columns."""
        return self.rows, self.columns

    def read(self) -> Tensor:
        """Return the second moment; 0 where all rows are 0."""
        return outer_of_means(self.rows, self.columns).to(self.dtype)


@dataclass(frozen=True)
class Blockwise:
    """Second moment in 8-bit codes, ``v_i = levels[codes_i] scales[i // block]``, as in bitsandbytes and torchao.

    Attributes:
        codes: uint8 codes in the parameter's shape, i counting row by row; or float8 values, without ``levels``.
        levels: 256 numbers in [0, 1]; None for float8.
        scales: Largest v of each block of entries; the last block may be short.
        block: Entries per block.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022.

    Example:
        >>> codes = torch.tensor([[0, 128], [255, 1]], dtype=torch.uint8)
        >>> Blockwise(codes, torch.arange(256) / 255, torch.tensor([5.1])).read()
        tensor([[0.0000, 2.5600],
                [5.1000, 0.0200]])
    """

    codes: Tensor
    levels: Tensor | None
    scales: Tensor
    block: int = BLOCK

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter."""
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the second moment."""
        return self.scales.dtype if self.levels is None else self.levels.dtype

    @property
    def parts(self) -> Sequence[Tensor]:
        """Codes, levels and scales."""
        return tuple(part for part in (self.codes, self.levels, self.scales) if part is not None)

    def fits(self) -> bool:
        """Return True if sizes and dtypes of the tensors agree."""
        if self.scales.dtype != torch.float32 or self.block < 1:
            return False
        if self.levels is None:
            sound = self.codes.is_floating_point() and self.codes.itemsize == 1
        else:
            sound = (
                self.levels.dtype == torch.float32 and self.levels.shape == (256,) and self.codes.dtype == torch.uint8
            )
        return sound and self.scales.shape == (-(-self.codes.numel() // self.block),)

    def read(self) -> Tensor:
        """Return the second moment."""
        codes = self.codes.flatten()
        flat = codes.to(self.scales.dtype) if self.levels is None else self.levels[codes.int()]
        whole = flat.numel() // self.block * self.block
        flat[:whole].view(-1, self.block).mul_(self.scales[: whole // self.block, None])
        flat[whole:].mul_(self.scales[whole // self.block :])
        return flat.reshape(self.shape)


@dataclass(frozen=True)
class Packed:
    """Second moment in 4-bit codes, ``v_i = levels[code_i] scales[i // block]``, as in torchao.

    Attributes:
        codes: Flat uint8 tensor with two codes a byte, the first in the high half.
        levels: 16 numbers.
        scales: Largest v of each block of entries.
        shape: Shape of the parameter.
        block: Entries per block.

    Example:
        >>> codes = torch.tensor([0x1F, 0x20], dtype=torch.uint8)
        >>> Packed(codes, torch.arange(16.0), torch.tensor([2.0, 10.0]), torch.Size([2, 2]), block=2).read()
        tensor([[ 2., 30.],
                [20.,  0.]])
    """

    codes: Tensor
    levels: Tensor
    scales: Tensor
    shape: torch.Size
    block: int

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the second moment."""
        return self.levels.dtype

    @property
    def parts(self) -> Sequence[Tensor]:
        """Codes, levels and scales."""
        return self.codes, self.levels, self.scales

    def fits(self) -> bool:
        """Return True if sizes and dtypes of the tensors agree."""
        floats = self.levels.dtype == self.scales.dtype == torch.float32
        count = 2 * self.codes.numel()
        sound = floats and self.codes.dtype == torch.uint8 and self.codes.ndim == 1 and self.levels.shape == (16,)
        return sound and self.block >= 1 and count == self.shape.numel() == self.block * self.scales.numel()

    def read(self) -> Tensor:
        """Return the second moment."""
        codes = torch.stack([self.codes >> 4, self.codes & 15], -1).flatten()
        flat = self.levels[codes.int()]
        flat.view(-1, self.block).mul_(self.scales[:, None])
        return flat.reshape(self.shape)
