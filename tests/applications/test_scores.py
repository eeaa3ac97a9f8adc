"""Scores of weights."""

import pytest
import torch

from squisher_mergekit.applications import scores


def test_scores_of_hand_computed_values():
    """The scores are theta^2 F / 2, (theta - theta_0)^2 F / 2, |theta - theta_0| and |theta|."""
    theta, base, fisher = (torch.tensor(values) for values in ([3.0, -2.0], [1.0, -2.5], [4.0, 0.5]))
    assert scores.saliency(theta, fisher).tolist() == [18.0, 1.0]
    assert scores.reset_loss(theta, base, fisher).tolist() == [8.0, 0.0625]
    assert scores.movement(theta, base).tolist() == [2.0, 0.5]
    assert scores.magnitude(theta).tolist() == [3.0, 2.0]


def test_scores_change_no_input():
    """A score leaves the weights unchanged, because they may be a view of a mapped file."""
    theta, base, fisher = torch.ones(3, dtype=torch.float64), torch.zeros(3), torch.ones(3)
    for score in (scores.saliency(theta, fisher), scores.magnitude(theta), scores.movement(theta, base)):
        assert score.dtype == torch.float64
    scores.reset_loss(theta, base, fisher)
    assert [tensor.tolist() for tensor in (theta, base, fisher)] == [[1.0] * 3, [0.0] * 3, [1.0] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ranks_follow_the_scores_over_blocks(dtype, monkeypatch):
    """Ranks of a tensor of several blocks follow the scores, also where float32 could not hold the score."""
    monkeypatch.setattr(scores, "_BLOCK", 13)
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(7, 11, generator=generator).mul_(1e-4).to(dtype)
    fisher = torch.rand(7, 11, generator=generator).pow_(40).mul_(1e-30)
    exact = theta.double() ** 2 * fisher.double() / 2
    assert (exact.float() == 0).any()
    found = scores.sort_keys(scores.saliency, theta, fisher)
    assert found.dtype == torch.int32
    assert found.shape == theta.shape
    assert torch.equal(found.flatten().argsort(), exact.flatten().argsort())


def test_a_unit_divides(monkeypatch):
    """Two layers of unequal means rank alike after division by their means. A mean of 0 divides nothing."""
    monkeypatch.setattr(scores, "_BLOCK", 2)
    small, large = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([100.0, 200.0, 600.0])
    assert scores.mean(scores.magnitude, small) == 3.0
    assert scores.mean(scores.magnitude, torch.empty(0)) == 0.0
    first, second = (
        scores.sort_keys(scores.magnitude, t, unit=scores.mean(scores.magnitude, t)) for t in (small, large)
    )
    assert torch.equal(first, second)
    assert torch.equal(scores.sort_keys(scores.magnitude, small, unit=0.0), scores.sort_keys(scores.magnitude, small))


def test_random_scores_depend_on_name_and_seed_alone(monkeypatch):
    """Random scores depend on name and seed, not on the block size or the generator of torch."""
    weight = torch.zeros(5, 11)
    first = scores.sort_keys(scores.random_score("w", 3), weight)
    monkeypatch.setattr(scores, "_BLOCK", 16)
    torch.manual_seed(5)
    assert torch.equal(scores.sort_keys(scores.random_score("w", 3), weight), first)
    for name, seed in (("w", 4), ("v", 3)):
        assert not torch.equal(scores.sort_keys(scores.random_score(name, seed), weight), first)
