"""Blocks of factors against dense matrices, in sizes that do not divide."""

import pytest
import torch

from squisher_mergekit.errors import ValuesError
from squisher_mergekit.fisher.factors.blocks import (
    can_divide,
    check_factor,
    diagonal_blocks,
    divided,
    from_low_rank,
    low_rank,
    second_moments,
)


def _gram(size, rank, seed=0):
    gradient = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed))
    return gradient, gradient @ gradient.T


@pytest.mark.parametrize(("size", "block"), [(13, 4), (7, 7), (29, 100), (1, 3), (12, 6)])
def test_second_moments_are_the_diagonal_blocks_of_the_gram_matrix(size, block):
    """Rows beyond the last are zeros."""
    gradient, gram = _gram(size, 5)
    torch.testing.assert_close(second_moments(gradient, block), diagonal_blocks(gram, block))


@pytest.mark.parametrize(("size", "stored", "block"), [(23, 8, 4), (23, 8, 8), (23, 23, 5), (23, 100, 23), (6, 3, 1)])
def test_smaller_blocks_are_cut_out_of_larger_ones(size, stored, block):
    """The parts are those of blocks that were computed in the smaller size."""
    gradient, gram = _gram(size, 4)
    factor = second_moments(gradient, stored)
    assert can_divide(factor.shape, size, block)
    width = min(block, size)
    torch.testing.assert_close(divided(factor, size, block), diagonal_blocks(gram, block).reshape(-1, width)[:size])


@pytest.mark.parametrize(("size", "stored", "block"), [(23, 8, 3), (23, 4, 8), (23, 11, 23)])
def test_other_blocks_cannot_be_cut(size, stored, block):
    """A block that is no part of a stored one lacks entries."""
    assert not can_divide((-(-size // stored), stored, stored), size, block)


@pytest.mark.parametrize(("size", "block", "rank"), [(50, 20, 3), (37, 37, 8), (9, 4, 2)])
def test_low_rank_is_exact_for_few_directions_and_a_level(size, block, rank):
    """A factor of the rank of the form comes back, and padding stays 0."""
    factor = second_moments(_gram(size, rank)[0], block)
    for blocks, row in zip(factor, range(0, size, block), strict=True):
        real = min(size - row, block)
        blocks[:real, :real] += 0.5 * torch.eye(real)
    found = from_low_rank(*low_rank(factor, size, rank), size)
    torch.testing.assert_close(found, factor, rtol=1e-4, atol=1e-4)


def test_low_rank_keeps_the_trace():
    """The level is the mean of the eigenvalues that have no vector."""
    factor = second_moments(_gram(60, 60)[0], 40)
    found = from_low_rank(*low_rank(factor, 60, 7), 60)
    for wanted, got in zip(factor, found, strict=True):
        torch.testing.assert_close(got.trace(), wanted.trace())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f[0, 2].fill_(float("nan")), "NaN or infinite"),
        (lambda f: f[1, 0, 0].fill_(float("inf")), "NaN or infinite"),
        (lambda f: f[1, 2, 2].fill_(-1.0), "1 negative entries on the diagonal"),
        (lambda f: f[0, 0, 1].add_(3.0), "differs by 3"),
    ],
)
def test_impossible_factors_are_refused(change, words):
    """The message names the fault."""
    factor = second_moments(_gram(6, 3)[0], 3)
    check_factor(factor, "w.rows", "memory")
    change(factor)
    with pytest.raises(ValuesError, match=words):
        check_factor(factor, "w.rows", "memory")
