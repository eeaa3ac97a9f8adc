"""Equations of the coupled merges."""

import torch

from squisher_mergekit.merging.coupling.equations import (
    Side,
    column_factor,
    couple_rows,
    couple_tiles,
    row_factor,
    shares_by_trace,
)
from tests.merging.coupling.reference import factor


def _blocks(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_factor_equals_the_slow_reference():
    """Correlations of d sqrt(v), with the sums of v on the diagonal, and mean eigenvalue 1."""
    step, fisher = _blocks(3, 5, 7), _blocks(3, 5, 7, seed=1).square() * 1e-12
    fisher[1, 2] = 0
    for i in range(3):
        torch.testing.assert_close(row_factor(step, fisher)[i], factor(step[i], fisher[i], 5))
        torch.testing.assert_close(column_factor(step, fisher)[i], factor(step[i].T, fisher[i].T, 7))
        torch.testing.assert_close(row_factor(step, None)[i], step[i] @ step[i].T * 5 / step[i].square().sum())


def test_a_factor_of_tiny_values_is_finite_in_float32():
    """Second moments near the smallest float keep their form."""
    step, fisher = _blocks(1, 5, 7), _blocks(1, 5, 7, seed=1).square()
    plain = row_factor(step.float(), fisher.float())
    torch.testing.assert_close(
        row_factor((step * 1e-20).float(), (fisher * 1e-36).float()), plain, rtol=1e-3, atol=1e-4
    )


def test_a_block_without_a_signal_has_no_factor():
    """All is 0, not NaN."""
    assert not row_factor(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)).any()
    assert not row_factor(torch.zeros(2, 3, 5), None).any()


def test_shares_are_products_of_weight_and_trace():
    """Traces of any size, and a block without a signal."""
    traces = torch.tensor([[1e-300, 2.0, 0.0], [3e-300, 6.0, 0.0]], dtype=torch.float64)
    shares = shares_by_trace(traces, torch.tensor([1.0, 2.0], dtype=torch.float64))
    wanted = torch.tensor([[1 / 7, 1 / 7, 0.0], [6 / 7, 6 / 7, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(shares, wanted)


def test_singular_rows_take_the_solution_of_least_norm():
    """Without damping, directions that no model knows keep the mean."""
    theta = torch.eye(2, dtype=torch.float64)[None]
    known = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    half = torch.full((2, 1), 0.5, dtype=torch.float64)
    merged, _ = couple_rows([theta, 3 * theta], [known, 3 * known], half, 0.0)
    torch.testing.assert_close(merged[0], torch.diag(torch.tensor([2.5, 2.0], dtype=torch.float64)))


def test_more_steps_come_closer():
    """Conjugate gradients reduce the distance to the minimum."""
    thetas = [_blocks(1, 1, 5, 7, seed=i) for i in range(3)]
    shares = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    left = Side.of(torch.stack([row_factor(theta[0], None) for theta in thetas]), shares)
    right = Side.of(torch.stack([column_factor(theta[0], None) for theta in thetas]), shares)
    found = [couple_tiles(thetas[0], thetas, left, right, shares, 0.03, steps) for steps in (1, 4, 16, 64)]
    distances = [float((each - found[-1]).norm()) for each in found[:-1]]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3 * distances[0]
