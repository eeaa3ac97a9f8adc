"""Slices of parameters in flat buffers."""

from pathlib import Path

import pytest
import torch

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.optimizers.checkpoints.flat_buffers import check_lengths, cut, verify_masters
from squisher_mergekit.tensors.lazy import Slices


@pytest.mark.parametrize("start", range(12))
def test_a_cut_over_several_buffers_is_that_of_their_concatenation(start):
    """The joined slices equal the concatenated buffer for every start and length."""
    buffers = [torch.arange(5.0), torch.empty(0), torch.arange(5.0, 6.0), torch.arange(6.0, 12.0)]
    whole = torch.cat(buffers)
    for length in range(1, 13 - start):
        slices = [flat[begin : begin + size] for flat, begin, size in cut(buffers, start, length)]
        assert torch.equal(torch.cat(slices), whole[start : start + length])
    with pytest.raises(ValueError, match="1 entries before"):
        list(cut(buffers, start, 13 - start))


def test_buffers_of_several_types_or_shapes_are_refused():
    """Tensors of several types or shapes are refused, because they have no flat concatenation."""
    for other in (torch.zeros(2, 2), torch.zeros(4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="flat buffers"):
            list(cut([torch.zeros(3), other], 0, 5))


@pytest.mark.parametrize("place", [0, 1, 63, 236, 299, 300, 363, 436, 499])
def test_the_verification_compares_the_ends_of_every_slice(place):
    """A shift by one entry is found anywhere. A single wrong entry is found within 64 entries of the end of a slice."""
    weight = torch.randn(500)
    buffers = [weight[:300].clone(), torch.cat([weight[300:], torch.zeros(7)])]
    master = Slices(tuple(cut(buffers, 0, 500)), torch.Size([20, 25]))
    assert verify_masters({"w": master}, {"w": weight.reshape(20, 25)}, Path("step")) == 1
    other = weight.clone()
    other[place] += 1
    with pytest.raises(MismatchError, match="w is not its weights"):
        verify_masters({"w": master}, {"w": other.reshape(20, 25)}, Path("step"))
    shifted = Slices(tuple(cut(buffers, 1, 500)), torch.Size([20, 25]))
    with pytest.raises(MismatchError, match="w is not its weights"):
        verify_masters({"w": shifted}, {"w": weight.reshape(20, 25)}, Path("step"))


def test_lengths_may_differ_by_padding_alone():
    """The last buffer may be longer than its weights by padding.

    Other buffers must have the length of their weights.
    """
    weights = [torch.zeros(4), torch.zeros(3), torch.zeros(0)]
    check_lengths(weights, [{"v": torch.zeros(4), "step": 3}, {"v": torch.zeros(4)}, {"v": torch.zeros(4)}])
    for lengths in ((3, 4, 4), (5, 4, 4), (4, 2, 4)):
        with pytest.raises(ValueError, match="length of v"):
            check_lengths(weights, [{"v": torch.zeros(n)} for n in lengths])


def test_complex_buffers_are_refused():
    """A complex buffer is no buffer of squares, and is refused without a warning of torch."""
    with pytest.raises(ValueError, match="one real type"):
        list(cut([torch.zeros(5, dtype=torch.complex64)], 1, 2))
    master = Slices(((torch.zeros(6, dtype=torch.complex128), 0, 6),), torch.Size([2, 3]))
    with pytest.raises(MismatchError, match="w is not its weights"):
        verify_masters({"w": master}, {"w": torch.zeros(2, 3)}, Path("step"))
