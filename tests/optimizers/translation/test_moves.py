"""Moves of rows: views where a range of rows is kept, and one read of a source in pieces for all its parts."""

import weakref
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch

from squisher_mergekit.optimizers.translation.moves import (
    Dimensions,
    Moved,
    Part,
    RowRange,
    halves_of_pairs,
    moved,
)
from squisher_mergekit.optimizers.translation.schemes import rows_of_heads
from squisher_mergekit.tensors.lazy import Slices, in_memory, read


@dataclass(frozen=True)
class Pieces:
    """Lazy tensor that counts how often it is read."""

    value: torch.Tensor = field(compare=False)
    name: str
    count: list[int] = field(compare=False)

    @property
    def shape(self):
        """Shape of the tensor."""
        return self.value.shape

    @property
    def dtype(self):
        """Dtype of the tensor."""
        return self.value.dtype

    @property
    def parts(self):
        """Empty: the tensor is not mapped."""
        return ()

    def read(self):
        """Return the tensor."""
        self.count.append(1)
        return self.value


def test_rows_of_a_mapped_tensor_are_a_view():
    """No entry is copied before the tensor is asked for."""
    tensor = torch.arange(24.0).reshape(6, 4)
    view = moved(tensor, [RowRange(2, 5)], [])
    assert isinstance(view, torch.Tensor)
    assert view.data_ptr() == tensor[2].data_ptr()


@pytest.mark.parametrize("cuts", [(0, 3, 7, 24), (0, 1, 2, 3, 13, 24), (0, 24)])
@pytest.mark.parametrize("rows", [(0, 6), (1, 3), (5, 6)])
def test_rows_of_slices_take_the_slices_that_hold_them(cuts, rows):
    """A tensor cut from the buffers of several ranks is narrowed without joining it."""
    flat = torch.arange(24.0)
    slices = tuple((flat[a:b], 0, b - a) for a, b in pairwise(cuts))
    narrowed = moved(Slices(slices, torch.Size([6, 4])), [RowRange(*rows)], [])
    assert isinstance(narrowed, Slices)
    assert torch.equal(narrowed.read(), flat.reshape(6, 4)[rows[0] : rows[1]])


@pytest.mark.parametrize("copied", [lambda tensor: tensor, torch.clone])
def test_a_source_in_pieces_is_read_once_for_all_its_parts(copied):
    """All layers of a stacked tensor, and all parts of a fused one, come from one read."""
    last, count = [], []
    stacked = Pieces(torch.rand(3, 8, 4), "a", count)
    parts = [moved(stacked, [Part(k), RowRange(*rows)], last) for k in range(3) for rows in ((0, 5), (5, 8))]
    for k, part in enumerate(parts):
        got = read(in_memory(part, copied))
        assert torch.equal(got, stacked.value[k // 2, 0:5] if k % 2 == 0 else stacked.value[k // 2, 5:8])
    assert sum(count) == 1
    other = moved(Pieces(torch.rand(2, 2), "b", count), [Part(0)], last)
    read(other)
    assert len(last) == 1  # one source at a time stays in memory


def test_the_last_source_is_freed_before_the_next_is_read():
    """Stacked layers are the largest tensors of a state: two of them never are in memory at once.

    Whoever still holds the last layer, as a writer does, holds that layer alone.
    """
    alive = []

    @dataclass(frozen=True)
    class _Watched(Pieces):
        def read(self):
            assert not any(reference() is not None for reference in alive)
            content = self.value.clone()
            alive.append(weakref.ref(content))
            return content

    last, count = [], []
    for name in ("a", "b"):
        stacked = _Watched(torch.rand(3, 2), name, count)
        for layer in range(3):
            held = moved(stacked, [Part(layer)], last).read()
            assert torch.equal(held, stacked.value[layer])
    assert len(alive) == 2


def test_rows_that_a_tensor_lacks_are_refused():
    """A range behind the last row is an error, not a shorter tensor."""
    with pytest.raises(ValueError, match="at least 7 rows"):
        moved(torch.ones(6, 2), [RowRange(4, 7)], [])


@pytest.mark.parametrize(("heads", "width", "rest"), [(3, 4, (5,)), (1, 6, ()), (2, 2, (3,))])
def test_pairs_become_halves(heads, width, rest):
    """Row 2 i of a head goes to row i, row 2 i + 1 to row width / 2 + i."""
    tensor = torch.rand(heads * width, *rest)
    result = halves_of_pairs(heads, width)(tensor)
    for head in range(heads):
        for i in range(width // 2):
            assert torch.equal(result[head * width + i], tensor[head * width + 2 * i])
            assert torch.equal(result[head * width + width // 2 + i], tensor[head * width + 2 * i + 1])


def test_a_moved_tensor_has_the_shape_that_it_is_read_with():
    """The header is right before anything is read."""
    lazy = moved(Pieces(torch.rand(4, 6, 2), "c", []), [Part(1), halves_of_pairs(1, 6)], [])
    assert isinstance(lazy, Moved)
    assert lazy.shape == lazy.read().shape == (6, 2)


@pytest.mark.parametrize(("heads", "groups", "width"), [(3, 3, 5), (6, 2, 3), (4, 1, 4)])
def test_rows_fused_by_query_head_are_those_of_the_parts(heads, groups, width):
    """Each query head holds its own rows, then a share of the rows of keys and of values in their order."""
    sizes = Dimensions(heads, groups, width, 9)
    parts = [torch.randn(count * width, 7) for count in (heads, groups, groups)]
    fused = [piece for head in range(heads) for part in parts for piece in [part.chunk(heads)[head]]]
    for number, part in enumerate("qkv"):
        assert torch.equal(rows_of_heads(part)(sizes, 0)(torch.cat(fused)), parts[number])
