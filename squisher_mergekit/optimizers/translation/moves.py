"""Moves of a tensor's entries between the layout of a trainer and that of Hugging Face, done when the tensor is read.

A move changes no entry, so it holds for second moments as for weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.tensors.lazy import MaybeLazy, Slices, parts, read

Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model that the moves depend on.

    Attributes:
        heads: Number of attention heads.
        groups: Number of heads of keys and values.
        width: Width of a head.
        vocabulary: Number of rows of the embeddings.
        ranks: Number of ranks of tensor parallelism, each of which fuses its own rows.
    """

    heads: int
    groups: int
    width: int
    vocabulary: int
    ranks: int = 1


@dataclass(frozen=True)
class RowRange:
    """Move that keeps a range of rows.

    Attributes:
        start: First row.
        stop: Row after the last one.
    """

    start: int
    stop: int

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the rows, as a view.

        Raises:
            ValueError: The tensor has fewer rows.
        """
        if not tensor.ndim or self.stop > tensor.shape[0]:
            raise ValueError(f"{list(tensor.shape)} in the place of at least {self.stop} rows")
        return tensor[self.start : self.stop]


@dataclass(frozen=True)
class Part:
    """Move that keeps one of the stacked layers.

    Attributes:
        number: Number of the layer.
    """

    number: int

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the layer, as a view."""
        return tensor[self.number]


def halves_of_pairs(heads: int, width: int) -> Move:
    """Return the move from rotary rows in pairs to rotary rows in halves, head by head.

    Args:
        heads: Number of heads.
        width: Width of a head.

    Example:
        >>> halves_of_pairs(1, 6)(torch.arange(6))
        tensor([0, 2, 4, 1, 3, 5])
    """

    def move(tensor: Tensor) -> Tensor:
        return tensor.reshape(heads, width // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    return move


def of_blocks(blocks: int, counts: Sequence[int], number: int) -> Move:
    """Return the move that takes one of several parts out of rows that are fused block by block.

    Args:
        blocks: Number of blocks: groups of heads, heads, or ranks of tensor parallelism.
        counts: Relative numbers of rows of the parts in a block.
        number: Number of the part.

    Example:
        >>> of_blocks(2, (2, 1), 0)(torch.arange(6)), of_blocks(2, (2, 1), 1)(torch.arange(6))
        (tensor([0, 1, 3, 4]), tensor([2, 5]))
    """

    def move(tensor: Tensor) -> Tensor:
        by_block = tensor.reshape(blocks, sum(counts), -1, *tensor.shape[1:])
        begin = sum(counts[:number])
        return by_block[:, begin : begin + counts[number]].reshape(-1, *tensor.shape[1:])

    return move


def in_groups(dimensions: Dimensions) -> Move:
    """Return the move of rows of all queries, then all keys, then all values, into groups, as GPT-NeoX fuses them.

    Args:
        dimensions: Sizes of the model.

    Example:
        >>> in_groups(Dimensions(heads=2, groups=2, width=1, vocabulary=9))(torch.tensor([10, 11, 20, 21, 30, 31]))
        tensor([10, 20, 30, 11, 21, 31])
    """

    def move(tensor: Tensor) -> Tensor:
        groups, width, rest = dimensions.groups, dimensions.width, tensor.shape[1:]
        counts = [dimensions.heads * width, groups * width, groups * width]
        parts = [part.reshape(groups, -1, width, *rest) for part in torch.split(tensor, counts)]
        return torch.cat(parts, 1).reshape(tensor.shape)

    return move


def transposed(tensor: Tensor) -> Tensor:
    """Return the transpose of a matrix; a vector stays as it is."""
    return tensor.T.contiguous() if tensor.ndim == 2 else tensor


@dataclass(frozen=True)
class Moved:
    """Lazy tensor whose entries are moved when it is read.

    Attributes:
        source: Tensor before the moves.
        moves: The moves, in order.
        shape: Shape of the tensor after the moves.
        last: The source that was read last and its content, shared by all parts of the sources.
    """

    source: MaybeLazy
    moves: tuple[Move, ...]
    shape: torch.Size
    last: list[Any] = field(repr=False, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the entries."""
        return self.source.dtype

    @property
    def parts(self) -> Sequence[Tensor]:
        """Stored tensors of the source."""
        return parts(self.source)

    def read(self) -> Tensor:
        """Return the tensor after the moves."""
        tensor = self._whole()
        for move in self.moves:
            tensor = move(tensor)
        # A view of the last layer would keep all layers in memory while the next ones are read.
        return tensor.clone(memory_format=torch.contiguous_format) if self._is_last_layer() else tensor.contiguous()

    def _is_last_layer(self) -> bool:
        """Return True for a part of the last of the stacked layers, which are read in order."""
        first = self.moves[0]
        return isinstance(first, Part) and first.number == self.source.shape[0] - 1

    def _whole(self) -> Tensor:
        """Return the source; one that is read from pieces of files stays in memory until another is read."""
        if isinstance(self.source, Tensor) or self.parts:
            return read(self.source)
        if self.last and self.last[0][0] == self.source:
            return self.last[0][1]  # type: ignore[no-any-return]
        self.last.clear()  # before the next one takes its memory
        tensor = read(self.source)
        self.last.append((self.source, tensor))
        return tensor


def moved(source: MaybeLazy, moves: Sequence[Move], last: list[Any]) -> MaybeLazy:
    """Return a tensor with moved entries: a view where the moves keep ranges of rows alone, else a lazy tensor.

    Args:
        source: The tensor.
        moves: The moves, in order.
        last: List for the source that was read last, shared by all tensors of a state.

    Raises:
        ValueError: A move does not fit the shape.
        RuntimeError: A move does not fit the shape.

    Example:
        >>> moved(torch.arange(12).reshape(6, 2), [RowRange(1, 3)], [])
        tensor([[2, 3],
                [4, 5]])
    """
    rest = list(moves)
    while rest and isinstance(rest[0], RowRange | Part) and isinstance(source, Tensor):
        source = rest.pop(0)(source)
    while rest and isinstance(rest[0], RowRange) and isinstance(source, Slices):
        source = _narrowed(source, rest.pop(0))  # type: ignore[arg-type]
    if not rest:
        return source
    outline = torch.empty(source.shape, device="meta")
    for move in rest:
        outline = move(outline)
    return Moved(source, tuple(rest), outline.shape, last)


def _narrowed(source: Slices, rows: RowRange) -> Slices:
    """Return a range of rows of a tensor that is made of slices of flat buffers."""
    outline = rows(torch.empty(source.shape, device="meta"))
    width = outline.shape[1:].numel()
    skip, left = rows.start * width, outline.numel()
    slices = []
    for flat, start, length in source.slices:
        taken = min(max(length - skip, 0), left)
        if taken:
            slices.append((flat, start + skip, taken))
        skip, left = max(skip - length, 0), left - taken
    return Slices(tuple(slices), outline.shape)
