"""Equations of the lifted Fisher: a slow reference, gradients that factor, dead ranks, frozen factors."""

import itertools

import pytest
import torch

from squisher_mergekit.optimizers.lifting.equations import lifted_means
from tests.optimizers.lifting.reference import reference

SHAPES = {"wide": (2, 7, 3), "tall": (5, 4, 11), "rank one": (1, 6, 6), "rank above both axes": (9, 4, 5)}


def _draw(rank, inputs, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    moments = normal(rank, inputs).square() * 1e-9, normal(outputs, rank).square() * 1e-7
    return normal(rank, inputs), normal(outputs, rank), *moments


def _fisher(row, col):
    return torch.outer(row, col) / row.mean() if row.any() else torch.zeros(len(row), len(col), dtype=torch.float64)


@pytest.mark.parametrize("scale", [2.0, 16 / 3**0.5, -0.25])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_means_equal_a_slow_reference(shape, scale):
    """F equals the sums of the formula, whatever the rank, the shape and the scale."""
    given = _draw(*shape)
    assert torch.allclose(_fisher(*lifted_means(*given, scale)), reference(*given, scale), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_both_means_have_one_level(shape):
    """The mean of the row means is that of the column means, as in the form rank1."""
    row, col = lifted_means(*_draw(*shape), 2.0)
    assert torch.allclose(row.mean(), col.mean(), rtol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_gradients_that_factor_give_their_rows_and_columns(rank, scale):
    """Where E[G G] factors, the lift reproduces the exact Fisher up to one factor."""
    a, b, _, _ = (tensor.double() for tensor in _draw(rank, 4, 3, seed=rank))
    inputs, errors = torch.tensor([1.0, 0.2, 3.0, 0.7]).double(), torch.tensor([0.1, 2.0, 0.6]).double()
    a.requires_grad_()
    b.requires_grad_()
    origin = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    squares = [torch.zeros_like(tensor) for tensor in (a, b, origin)]
    # All signs of inputs and errors: uncorrelated, and independent of each other.
    for signs in itertools.product((-1.0, 1.0), repeat=7):
        x, error = torch.tensor(signs[:4]).double() * inputs, torch.tensor(signs[4:]).double() * errors
        loss = error @ ((origin + scale * b @ a) @ x)
        for square, gradient in zip(squares, torch.autograd.grad(loss, (a, b, origin)), strict=True):
            square += gradient.square() / 2**7
    row, col = lifted_means(a.detach(), b.detach(), squares[0], squares[1], scale)
    exact = squares[2]
    assert torch.allclose(row / row.mean(), exact.mean(1) / exact.mean(), rtol=1e-10)
    assert torch.allclose(col / col.mean(), exact.mean(0) / exact.mean(), rtol=1e-10)


@pytest.mark.parametrize("dead", ["a", "b", "both", "every a"])
def test_a_dead_rank_is_left_out(dead):
    """A rank of zeros changes no mean, and gives no NaN."""
    a, b, v_a, v_b = _draw(3, 5, 4)
    if dead in ("a", "both"):
        a[1], v_b[:, 1] = 0, 0
    if dead in ("b", "both"):
        b[:, 2], v_a[2] = 0, 0
    if dead == "every a":
        a[:], v_b[:] = 0, 0
    fisher = _fisher(*lifted_means(a, b, v_a, v_b, 1.5))
    assert torch.allclose(fisher, reference(a, b, v_a, v_b, 1.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("frozen", ["a", "b", "v_a all 0", "v_b all 0"])
def test_a_factor_without_a_signal_leaves_its_side_flat(frozen):
    """One side alone is lifted, at the scale of its own."""
    a, b, v_a, v_b = _draw(3, 5, 4)
    v_a = None if frozen == "a" else torch.zeros_like(v_a) if frozen == "v_a all 0" else v_a
    v_b = None if frozen == "b" else torch.zeros_like(v_b) if frozen == "v_b all 0" else v_b
    row, col = lifted_means(a, b, v_a, v_b, 2.0)
    assert torch.allclose(_fisher(row, col), reference(a, b, v_a, v_b, 2.0), rtol=1e-12, atol=0)
    flat = col if frozen in ("a", "v_a all 0") else row
    assert (flat == flat[0]).all()


def test_no_signal_gives_zeros():
    """Without any gradient F is 0, and no NaN."""
    a, b, v_a, v_b = _draw(2, 3, 4)
    row, col = lifted_means(a, b, v_a * 0, v_b * 0, 1.0)
    assert (row.tolist(), col.tolist()) == ([0.0] * 4, [0.0] * 3)


@pytest.mark.parametrize("size", [1e-38, 1e30])
def test_the_range_of_float32_is_kept(size):
    """Neither underflow nor overflow: the scale of the moments passes through."""
    a, b, v_a, v_b = _draw(3, 5, 4)
    small, given = (v_a * 1e9, v_b * 1e9), (v_a.double() * 1e9 * size, v_b.double() * 1e9 * size)
    expected = [side * size for side in lifted_means(a, b, *small, 1.0)]
    for found, wanted in zip(lifted_means(a, b, *given, 1.0), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-6, atol=0)
