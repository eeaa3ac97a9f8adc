"""Lazy tensors: slices and shards assembled when they are read."""

import pytest
import torch

from squisher_mergekit.tensors.lazy import Assembled, Joined, Slices, parts, read


def test_slices_and_shards_are_their_concatenation():
    """A tensor joins the slices or shards of a trainer, and its reads are recorded."""
    flats = (torch.arange(7.0), torch.arange(7.0, 20.0))
    form = Slices(((flats[0], 2, 5), (flats[1], 0, 10)), torch.Size([3, 5]))
    assert torch.equal(read(form), torch.arange(2.0, 17.0).reshape(3, 5))
    assert all(part is flat for part, flat in zip(parts(form), flats, strict=True))
    places, values = form.sample(2)
    assert torch.equal(values, read(form).flatten()[places])
    assert places.tolist() == [0, 1, 3, 4, 5, 6, 13, 14]
    shards = (torch.rand(3, 2), torch.rand(3, 5))
    assert torch.equal(read(Joined(shards, 1)), torch.cat(shards, 1))
    assert Joined(shards, 1).shape == (3, 7)


@pytest.mark.parametrize(
    "regions",
    [
        [(((0, 2),), ((0, 2),)), (((0, 2),), ((1, 3),))],  # overlap
        [(((0, 2),), ((0, 2),)), (((0, 1),), ((3, 4),))],  # a gap
        [(((0, 3),), ((0, 3),)), (((0, 1),), ((3, 4),))],  # outside of its piece
        [(((0, 2),), ((0, 1),)), (((0, 2),), ((1, 4),))],  # other sizes
        [(((0, 2),), ((0, 2),)), (((0, 2),), ((7, 9),))],  # outside of the tensor
    ],
)
def test_regions_that_do_not_fill_a_tensor_are_refused(regions):
    """Each entry has to be filled once."""
    with pytest.raises(ValueError, match="region"):
        Assembled.checked((torch.ones(2), torch.zeros(2)), tuple(regions), torch.Size([4]))
