"""Pieces of the tensors in a distributed checkpoint: read piece by piece, and checked to make up their tensor."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError
from squisher_mergekit.optimizers.checkpoints import safe_pickle


@dataclass(frozen=True)
class Piece:
    """Piece of a tensor.

    Attributes:
        offsets: Position of the piece in the tensor.
        sizes: Shape of the piece.
        file: File that holds the piece.
        start: Offset in the file, in bytes.
        length: Length in the file, in bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class Pieces:
    """Lazy tensor stored in pieces; reading it takes the memory of the tensor alone.

    Attributes:
        name: Key in the checkpoint.
        shape: Shape of the tensor.
        dtype: Dtype of the tensor.
        pieces: The pieces that make up the tensor.
        verify: True if checksums are verified.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    verify: bool

    @property
    def parts(self) -> Sequence[Tensor]:
        """Empty: the pieces are not mapped, but read and verified one by one."""
        return ()

    def read(self) -> Tensor:
        """Return the tensor."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        for piece in self.pieces:
            region = tuple(slice(begin, begin + size) for begin, size in zip(piece.offsets, piece.sizes, strict=True))
            safe_pickle.read_part(piece.file, piece.start, piece.length, tensor[region], self.verify)
        return tensor


@dataclass(frozen=True)
class FlatPieces:
    """Lazy tensor that is cut into a grid of chunks, each of which is stored flat, in ranges of its entries.

    Reading it takes the memory of the tensor and of one chunk.

    Attributes:
        stored: The pieces; the last axis is that of the entries of a chunk, the others are those of the grid.
        shape: Shape of the tensor.
    """

    stored: Pieces
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""
        return self.stored.dtype

    @property
    def parts(self) -> Sequence[Tensor]:
        """Empty: the pieces are not mapped, but read and verified one by one."""
        return ()

    def read(self) -> Tensor:
        """Return the tensor."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        sizes = [size // count for size, count in zip(self.shape, self.stored.shape, strict=False)]
        chunks: dict[tuple[int, ...], list[Piece]] = defaultdict(list)
        for piece in self.stored.pieces:
            chunks[piece.offsets[:-1]].append(piece)
        for position, pieces in chunks.items():
            region = tensor[tuple(slice(n * size, (n + 1) * size) for n, size in zip(position, sizes, strict=True))]
            flat = region.view(-1) if region.is_contiguous() else torch.empty(region.numel(), dtype=self.dtype)
            for piece in pieces:
                into = flat[piece.offsets[-1] : piece.offsets[-1] + piece.sizes[-1]].view(piece.sizes)
                safe_pickle.read_part(piece.file, piece.start, piece.length, into, self.stored.verify)
            if not region.is_contiguous():
                region.copy_(flat.view(region.shape))
        return tensor


def check_pieces(
    key: str, shape: torch.Size, dtype: torch.dtype, pieces: Sequence[Piece], count: int, folder: Path
) -> None:
    """Refuse pieces that do not make up the tensor exactly, or that have fewer bytes than entries.

    Args:
        key: Key of the tensor.
        shape: Shape of the tensor.
        dtype: Dtype of the tensor.
        pieces: The pieces.
        count: Number of pieces by the index.
        folder: The checkpoint, for messages.

    Raises:
        CorruptFileError: The pieces overlap, leave gaps, or are too short.
    """
    total = 0
    for piece in pieces:
        axes = zip(piece.offsets, piece.sizes, shape, strict=True)
        inside = all(begin >= 0 and size >= 0 and begin + size <= length for begin, size, length in axes)
        entries = torch.Size(piece.sizes).numel()
        total += entries if inside and entries * dtype.itemsize <= piece.length else shape.numel() + 1
    boxes = [
        tuple((begin, begin + size) for begin, size in zip(piece.offsets, piece.sizes, strict=True))
        for piece in pieces
        if all(piece.sizes)
    ]
    if len(pieces) != count or total != shape.numel() or not _are_apart(boxes):
        raise CorruptFileError(
            f"the pieces of {key} in {folder} must make up its {list(shape)} entries, but do not; copy the checkpoint "
            "again"
        )


_Box = tuple[tuple[int, int], ...]  # first position, and position after the last, along each axis


def _are_apart(boxes: Sequence[_Box]) -> bool:
    """Return True if no two boxes meet; boxes of a grid take a time that is linear in their number."""
    if not boxes or not boxes[0]:
        return True
    rows: dict[_Box, list[tuple[int, int]]] = defaultdict(list)
    for box in boxes:
        rows[box[:-1]].append(box[-1])
    if any(a[1] > b[0] for row in rows.values() for a, b in pairwise(sorted(row))):
        return False
    if len(rows) == 1 or (boxes[0][:-1] and _are_apart(list(rows))):
        return True
    return not any(_meet(a, b) for number, a in enumerate(boxes) for b in boxes[:number])


def _meet(a: _Box, b: _Box) -> bool:
    return all(max(one[0], other[0]) < min(one[1], other[1]) for one, other in zip(a, b, strict=True))
