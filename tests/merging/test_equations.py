"""Equations against float64, and their properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squisher_mergekit.merging.equations import _anchor, squisher, ubgm_squisher, weighted_mean
from tests.merging.reference import assert_within, draw_fisher, largest, squisher_reference, ubgm_reference

SHAPE = (7, 13)
WEIGHTS = (1.0, 0.3, 2.0, 0.7, 1.3)


def _models(count: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    thetas = [torch.randn(*SHAPE, generator=generator).to(dtype) for _ in range(count)]
    return thetas, [draw_fisher(SHAPE, generator) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_squisher_is_eq_13(count: int, seed: int) -> None:
    """Fisher merging agrees with float64 for any number of models and F from 1e-38 to 1e+30."""
    thetas, fishers = _models(count, seed)
    result = squisher(thetas, fishers, WEIGHTS[:count], [1.0] * count).values
    assert_within(result, squisher_reference(thetas, fishers, WEIGHTS[:count]), largest(thetas))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("prior", [0.0, 1e-3, 1.0])
def test_ubgm_is_its_formula(count: int, prior: float) -> None:
    """Gradient matching agrees with float64, with and without a prior."""
    (base, *thetas), (base_fisher, *fishers) = _models(count + 1, seed=count)
    known = base_fisher.double() + sum(w * f.double() for w, f in zip(WEIGHTS, fishers, strict=False))
    d = prior * known.mean()
    weights = WEIGHTS[:count]
    result = ubgm_squisher(base, base_fisher, thetas, fishers, weights, [1.0] * count, prior=d).values
    size = base.double().abs() + sum(w * (t.double() - base).abs() for w, t in zip(weights, thetas, strict=True))
    assert_within(result, ubgm_reference(base, base_fisher, thetas, fishers, weights, prior), size)


def _normal_models(count: int, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[tuple[float, float]]]:
    """Return models of which one has information in every entry, so no division is needed first; others have zeros."""
    thetas, fishers = _models(count, seed)
    generator = torch.Generator().manual_seed(seed)
    fishers = [fisher.clamp_max(1e9) for fisher in fishers]
    fishers[seed % count] = 10 ** (torch.rand(*SHAPE, generator=generator) * 30 - 25)
    return thetas, fishers, [(float(fisher.min()), float(fisher.max())) for fisher in fishers]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [1.0, 1e-3, 1e-20, 1e20])
def test_known_extremes_do_not_change_the_result(count: int, seed: int, rate: float) -> None:
    """Both methods agree with float64 for any factors if known extremes allow the shorter computation."""
    thetas, fishers, extremes = _normal_models(count, seed)
    weights, scales = WEIGHTS[:count], [rate, *[1.0] * (count - 1)]
    scaled = [fisher.double() * scale for fisher, scale in zip(fishers, scales, strict=True)]
    merged = squisher(thetas, fishers, weights, scales, extremes)
    assert_within(merged.values, squisher_reference(thetas, scaled, weights), largest(thetas))
    assert float(sum(merged.shares)) == pytest.approx(thetas[0].numel(), rel=1e-6)
    slow = squisher(thetas, fishers, weights, scales)
    torch.testing.assert_close(torch.stack(merged.shares), torch.stack(slow.shares), rtol=1e-5, atol=1e-4)
    base, base_fisher = -thetas[0], fishers[0].flip(0)
    known = [*extremes, extremes[0]]
    for prior in (0.0, 0.1):
        d = prior * (base_fisher.double() + sum(w * f for w, f in zip(weights, scaled, strict=True))).mean()
        result = ubgm_squisher(base, base_fisher, thetas, fishers, weights, scales, 1.0, d, known).values
        size = base.double().abs() + sum(w * (t.double() - base).abs() for w, t in zip(weights, thetas, strict=True))
        assert_within(result, ubgm_reference(base, base_fisher, thetas, scaled, weights, prior), size)


def test_the_shorter_computation_runs_only_if_it_is_safe() -> None:
    """One model with information everywhere allows the shorter computation.

    Zeros, tiny products and overflow do not.
    """
    assert _anchor([(0.0, 1.0, 1.0), (1e-9, 1.0, 0.5)]) == 1
    assert _anchor([(0.0, 1.0, 1.0), (0.0, 1.0, 1.0)]) is None
    assert _anchor([(1e-20, 1.0, 1e-15)]) is None
    assert _anchor([(1.0, 1e31, 1.0)]) is None
    assert _anchor([(1.0, 1e29, 1e9)]) is None


@given(factor=st.floats(1e-6, 1e6), seed=st.integers(0, 10**6))
@settings(max_examples=40)
def test_a_common_factor_changes_nothing(factor: float, seed: int) -> None:
    """A common factor of all Fishers cancels in both methods."""
    thetas, fishers = _models(3, seed)
    weights, ones = WEIGHTS[:3], [1.0] * 3
    assert torch.equal(
        squisher(thetas, fishers, weights, ones).values, squisher(thetas, fishers, weights, [factor] * 3).values
    )
    plain = ubgm_squisher(thetas[0], fishers[0], thetas[1:], fishers[1:], weights[1:], ones[1:]).values
    scaled = ubgm_squisher(thetas[0], fishers[0], thetas[1:], fishers[1:], weights[1:], [factor] * 2, factor).values
    torch.testing.assert_close(plain, scaled, rtol=1e-6, atol=1e-7)


@given(order=st.permutations(range(4)), seed=st.integers(0, 10**6))
@settings(max_examples=40)
def test_the_order_of_models_does_not_matter(order: list[int], seed: int) -> None:
    """Permuting the models changes the merge by rounding only."""
    thetas, fishers = _models(4, seed)
    result = squisher(thetas, fishers, WEIGHTS[:4], [1.0] * 4).values
    permuted = squisher(
        [thetas[i] for i in order], [fishers[i] for i in order], [WEIGHTS[i] for i in order], [1.0] * 4
    ).values
    torch.testing.assert_close(result, permuted, rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 10**6), weights=st.lists(st.floats(0.0, 3.0), min_size=3, max_size=3))
@settings(max_examples=60)
def test_between_smallest_and_largest_input(seed: int, weights: list[float]) -> None:
    """Every entry of a Fisher merge is between the smallest and the largest input."""
    if not any(weight > 0 for weight in weights):
        weights = [1.0, *weights[1:]]
    thetas, fishers, extremes = _normal_models(3, seed)
    for known in (None, extremes):
        result = squisher(thetas, fishers, weights, [1.0, 0.1, 7.0], known).values
        stacked = torch.stack(thetas)
        assert bool((result >= stacked.amin(0)).all())
        assert bool((result <= stacked.amax(0)).all())


def test_equal_fishers_give_the_weighted_mean() -> None:
    """Fisher merging with one Fisher for all models is the weighted mean."""
    thetas, (fisher, *_) = _models(3, seed=2)
    result = squisher(thetas, [fisher] * 3, WEIGHTS[:3], [1.0] * 3).values
    torch.testing.assert_close(result, weighted_mean(thetas, WEIGHTS[:3]), rtol=1e-6, atol=1e-6)


def test_a_model_of_weight_zero_does_not_enter() -> None:
    """A model of weight 0 changes nothing, even with a Fisher of 1e60 times the others'."""
    thetas, fishers = _models(3, seed=3)
    fishers[0] = torch.full(SHAPE, 1e30)
    with_it = squisher(thetas, fishers, [0.0, 1.0, 1.0], [1.0] * 3)
    without = squisher(thetas[1:], fishers[1:], [1.0, 1.0], [1.0] * 2)
    torch.testing.assert_close(with_it.values, without.values, rtol=0, atol=0)
    assert float(with_it.shares[0]) == 0.0


def _task_vectors(seed: int) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    (base, *thetas), (_, *fishers) = _models(4, seed)
    return base.double(), [theta.double() for theta in thetas], [fisher.double() for fisher in fishers]


def test_ubgm_identity_equal_fishers() -> None:
    """Gradient matching with F_0 = F_t = F is the base plus 2 / (M + 1) times the sum of the task vectors."""
    base, thetas, _ = _task_vectors(5)
    fisher = torch.rand(SHAPE, dtype=torch.float64) + 0.1
    result = ubgm_squisher(base, fisher, thetas, [fisher] * 3, [1.0] * 3, [1.0] * 3).values
    torch.testing.assert_close(result, base + 2 / 4 * sum(theta - base for theta in thetas), rtol=1e-12, atol=1e-12)


def test_ubgm_identity_vanishing_task_fishers() -> None:
    """Gradient matching goes to task arithmetic with factor 1 as F_t goes to 0 relative to F_0."""
    base, thetas, _ = _task_vectors(6)
    one = torch.ones(SHAPE, dtype=torch.float64)
    result = ubgm_squisher(base, one, thetas, [1e-14 * one] * 3, [1.0] * 3, [1.0] * 3).values
    torch.testing.assert_close(result, base + sum(theta - base for theta in thetas), rtol=1e-12, atol=1e-12)


def test_ubgm_identity_without_base_fisher() -> None:
    """Gradient matching with F_0 = 0 and no prior is the base plus the Fisher average of the task vectors."""
    base, thetas, fishers = _task_vectors(7)
    result = ubgm_squisher(base, None, thetas, fishers, WEIGHTS[:3], [1.0] * 3).values
    average = squisher_reference([theta - base for theta in thetas], fishers, WEIGHTS[:3])
    known = sum(fishers) > 0
    torch.testing.assert_close(result[known], (base + average)[known], rtol=1e-12, atol=1e-12)
    assert torch.equal(result[~known], base[~known])


def test_shares_and_fallback_are_counted() -> None:
    """The shares add up to the number of entries, and entries without information are counted."""
    thetas, fishers = _models(3, seed=8)
    for fisher in fishers:
        fisher[0] = 0
    merged = squisher(thetas, fishers, WEIGHTS[:3], [1.0] * 3)
    assert int(merged.fell_back) == int((sum(f.double() for f in fishers) == 0).sum()) >= SHAPE[1]
    assert float(sum(merged.shares)) == pytest.approx(thetas[0].numel(), rel=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 0.3), (2.0, 0.0)])
def test_the_weighted_mean_keeps_infinite_entries_that_all_share(weights: tuple[float, float]) -> None:
    """The buffer of a mask, 0 and -inf, is its own mean, with and without a base, and for a model of weight 0."""
    mask = torch.full((7, 7), -torch.inf).triu(1)
    for base in (None, mask):
        assert torch.equal(weighted_mean([mask, mask.clone()], weights, base), mask)
