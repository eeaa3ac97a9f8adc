"""Factors over the rows or the columns of matrices, in blocks: pure functions of their tensors.

A factor over the rows of a matrix G is a moment of ``G G^T``; one over the columns is a moment of ``G^T G``. Rows are
those of the tensor as it is stored (axis 0), whatever the layout of the layer. Only blocks of b consecutive rows on the
diagonal are kept: ``NAME.rows`` and ``NAME.columns`` have the shape ``[blocks, b, b]``. The last block is padded with
zeros where b does not divide the number of rows. A matrix with fewer rows than b has one block of its own size.

The low-rank form keeps the largest eigenvectors V of each block, scaled by the roots of their eigenvalues less the
level, and the mean of the other eigenvalues as the level:

    F = V V^T + level I

in ``NAME.rows.vectors``, ``[blocks, b, rank]``, and ``NAME.rows.level``, ``[blocks]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from squisher_mergekit.errors import ValuesError

RANK = 32  # eigenvectors of a block in the low-rank form
# Largest difference between a factor and its transpose, relative to its largest entry: sums in another order differ.
_ASYMMETRY = {torch.bfloat16: 2.0**-6}
CURE = "write the factors again"


def block_shape(size: int, block: int) -> tuple[int, int, int]:
    """Return the shape of the factor over ``size`` rows in blocks of ``block``.

    Example:
        >>> block_shape(300, 128), block_shape(7, 128)
        ((3, 128, 128), (1, 7, 7))
    """
    width = max(min(block, size), 1)
    return (-(-size // width), width, width)


def second_moments(matrix: Tensor, block: int) -> Tensor:
    """Return the diagonal blocks of ``G G^T``.

    Args:
        matrix: G, ``[rows, columns]``.
        block: Number of rows of a block.

    Returns:
        Blocks ``[blocks, b, b]``, the last one padded with zeros.

    Example:
        >>> second_moments(torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]]), 2)
        tensor([[[5., 3.],
                 [3., 9.]],
        <BLANKLINE>
                [[1., 0.],
                 [0., 0.]]])
    """
    blocks, width, _ = block_shape(len(matrix), block)
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, blocks * width - len(matrix)))
    parts = padded.reshape(blocks, width, matrix.shape[1])
    moments: Tensor = parts @ parts.mT
    return moments


def diagonal_blocks(matrix: Tensor, block: int) -> Tensor:
    """Return the diagonal blocks of a square matrix, the last one padded with zeros.

    Example:
        >>> diagonal_blocks(torch.arange(9.0).reshape(3, 3), 2)[1]
        tensor([[8., 0.],
                [0., 0.]])
    """
    blocks, width, _ = block_shape(len(matrix), block)
    room = blocks * width - len(matrix)
    padded = torch.nn.functional.pad(matrix, (0, room, 0, room))
    return padded.reshape(blocks, width, blocks, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def can_divide(found: Sequence[int], size: int, block: int) -> bool:
    """Return True if blocks of ``block`` rows can be cut out of a factor without entries that it lacks.

    Args:
        found: Shape of the factor.
        size: Number of rows.
        block: Number of rows of the wanted blocks.

    Example:
        >>> can_divide((3, 128, 128), 300, 64), can_divide((3, 128, 128), 300, 256)
        (True, False)
    """
    return found[0] <= 1 or found[1] % min(block, size) == 0


def divided(factor: Tensor, size: int, block: int) -> Tensor:
    """Return smaller diagonal blocks of a factor, as a matrix ``[size, b]``: row -> its row in its block.

    Args:
        factor: Blocks ``[blocks, width, width]``.
        size: Number of rows.
        block: Number of rows of the wanted blocks; :func:`can_divide` is True.

    Example:
        >>> divided(torch.arange(9.0).reshape(1, 3, 3), 3, 2)
        tensor([[0., 1.],
                [3., 4.],
                [8., 0.]])
    """
    block = max(min(block, size), 1)
    room = -factor.shape[1] % block
    if room:
        factor = torch.nn.functional.pad(factor, (0, room, 0, room))
    blocks, width, _ = factor.shape
    parts = factor.reshape(blocks, width // block, block, width // block, block).diagonal(dim1=1, dim2=3)
    return parts.permute(0, 3, 1, 2).reshape(-1, block)[:size]


def low_rank(factor: Tensor, size: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """Return the low-rank form of a factor: vectors ``[blocks, b, rank]`` and levels ``[blocks]``.

    Args:
        factor: Blocks ``[blocks, b, b]``, symmetric and without negative eigenvalues.
        size: Number of rows; rows beyond it are padding.
        rank: Number of eigenvectors.

    Example:
        >>> low_rank(torch.diag(torch.tensor([9.0, 1.0, 1.0]))[None], 3, rank=1)[1]
        tensor([1.])
    """
    blocks, width, _ = factor.shape
    rank = min(rank, width)
    eigenvalues, basis = torch.linalg.eigh((factor + factor.mT).to(torch.float64) / 2)
    eigenvalues = eigenvalues.clamp_min(0)
    rows = _rows_of_blocks(blocks, width, size, factor.device)
    level = eigenvalues[:, : width - rank].sum(-1) / (rows - rank).clamp_min(1)
    level = torch.minimum(level, eigenvalues[:, -rank])
    vectors = basis[:, :, -rank:] * (eigenvalues[:, None, -rank:] - level[:, None, None]).clamp_min(0).sqrt()
    return vectors.flip(-1).to(torch.float32), level.to(torch.float32)


def from_low_rank(vectors: Tensor, level: Tensor, size: int) -> Tensor:
    """Return the factor of a low-rank form in float32; rows of padding are 0."""
    wide = vectors.to(torch.float32)
    factor: Tensor = wide @ wide.mT
    blocks, width, _ = factor.shape
    real = torch.arange(width, device=factor.device) < _rows_of_blocks(blocks, width, size, factor.device)[:, None]
    factor.diagonal(dim1=-2, dim2=-1).add_(level.to(torch.float32)[:, None] * real)
    return factor


def _rows_of_blocks(blocks: int, width: int, size: int, device: torch.device) -> Tensor:
    """Return the number of rows in each block that are no padding."""
    return (size - width * torch.arange(blocks, device=device)).clamp(0, width)


def error_of(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Return the squared Frobenius norms of a difference and of the wanted factor."""
    wide = wanted.to(torch.float64)
    return float((found.to(torch.float64) - wide).square().sum()), float(wide.square().sum())


def check_factor(factor: Tensor, name: str, location: str) -> None:
    """Refuse a factor that is not finite, not symmetric, or has negative entries on its diagonal.

    Raises:
        ValuesError: The factor is none.
    """
    if not factor.numel():
        return
    found = None
    largest = float(factor.abs().max())
    if not math.isfinite(largest):
        found = f"{int((~torch.isfinite(factor)).sum())} entries that are NaN or infinite"
    elif float(factor.diagonal(dim1=-2, dim2=-1).min()) < 0:
        found = f"{int((factor.diagonal(dim1=-2, dim2=-1) < 0).sum())} negative entries on the diagonal"
    else:
        off = float((factor.to(torch.float32) - factor.mT.to(torch.float32)).abs().max())
        if off > _ASYMMETRY.get(factor.dtype, 1e-3) * largest:
            found = f"an entry that differs by {off:.3g} from that across the diagonal"
    if found is not None:
        raise ValuesError(
            f"a factor must be finite and symmetric, with no negative entry on its diagonal; {name} in {location} has "
            f"{found}; {CURE}"
        )
