"""Pieces of a distributed checkpoint: boxes that meet, leave gaps or fill a grid, and chunks that are stored flat."""

from itertools import product
from pathlib import Path

import pytest
import torch

from squisher_mergekit.errors import CorruptFileError
from squisher_mergekit.optimizers.checkpoints.dcp_pieces import FlatPieces, Piece, Pieces, check_pieces

FILE = Path("x.distcp")


def _pieces(*boxes):
    return [Piece(offsets, sizes, FILE, 0, 4 * torch.Size(sizes).numel()) for offsets, sizes in boxes]


def _check(shape, pieces):
    check_pieces("key", torch.Size(shape), torch.float32, pieces, len(pieces), Path("folder"))


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ((5, 3), [((0, 0), (2, 3)), ((2, 0), (3, 3))]),
        ((5, 3), [((0, 0), (5, 1)), ((0, 1), (2, 2)), ((2, 1), (3, 2))]),  # no grid
        ((3,), [((0,), (3,)), ((3,), (0,))]),
        ((), [((), ())]),
    ],
)
def test_pieces_that_make_up_the_tensor_are_accepted(shape, boxes):
    """With or without a grid, also with empty pieces."""
    _check(shape, _pieces(*boxes))


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (2, 3)), ((1, 0), (3, 3))],  # meet, and leave a gap
        [((0, 0), (5, 1)), ((0, 0), (5, 1)), ((0, 2), (5, 1))],
        [((0, 0), (4, 2)), ((3, 1), (2, 2)), ((4, 0), (1, 1)), ((0, 2), (2, 1))],
        [((0, 0), (2, 3))],
        [((0, 0), (6, 3))],
    ],
)
def test_pieces_that_meet_or_leave_gaps_are_refused(boxes):
    """Also where their entries are as many as those of the tensor."""
    with pytest.raises(CorruptFileError, match="must make up its"):
        _check((5, 3), _pieces(*boxes))


def test_many_pieces_of_a_grid_are_checked_in_a_time_linear_in_their_number():
    """40 000 pieces, as of 32 layers on 1 250 ranks: pair by pair it would take minutes."""
    boxes = [((a, b, 7 * c), (1, 1, 7)) for a, b, c in product(range(40), range(25), range(40))]
    _check((40, 25, 280), _pieces(*boxes))


def test_flat_chunks_are_put_in_their_place(tmp_path):
    """A grid of 3 x 2 chunks, each in ranges of its entries, against the tensor itself."""
    tensor = torch.rand(6, 10)
    pieces = []
    for row, column in product(range(3), range(2)):
        chunk = tensor[row * 2 : row * 2 + 2, column * 5 : column * 5 + 5].reshape(-1)
        for start, stop in ((0, 3), (3, 10)):
            file = tmp_path / f"{row}{column}{start}.distcp"
            torch.save(chunk[start:stop].reshape(1, 1, -1).clone(), file)
            pieces.append(Piece((row, column, start), (1, 1, stop - start), file, 0, file.stat().st_size))
    stored = Pieces("key", torch.Size([3, 2, 10]), torch.float32, tuple(pieces), True)
    assert torch.equal(FlatPieces(stored, tensor.shape).read(), tensor)
