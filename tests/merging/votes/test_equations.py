"""Equations of the vote against slow float64 references."""

import math

import pytest
import torch
from torch import Tensor

from squisher_mergekit.merging.votes.equations import powered_mean, voted_mean, voted_step
from tests.merging.reference import WEIGHTS, assert_within, draw_fisher, largest, ubgm_reference
from tests.merging.votes.reference import drawn, voted_reference

COUNTS = (1, 2, 3, 5)
# Sums of these are exact, so that a tie of signs is one in any precision.
EXACT = (1.0, 0.25, 2.0, 0.75, 1.25)


def _masks(count: int, shape: tuple[int, ...], seed: int) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(*shape, generator=generator) < 0.4 for _ in range(count)]
    return [*masks[:-1], None] if count == 3 else list(masks)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("elected", [False, True])
@pytest.mark.parametrize("abstaining", [False, True])
def test_ties_and_zeros(count: int, power: float, elected: bool, abstaining: bool) -> None:
    """Exact ties of the election, zero steps, zero Fishers and abstentions give the reference."""
    given = drawn(count, (17, 23), count)
    weights = list(EXACT[:count])
    masks = _masks(count, (17, 23), count) if abstaining else [None] * count
    merged = voted_mean(
        given["thetas"], given["fishers"], weights, [1.0] * count, given["base"],
        kept=masks if abstaining else None, power=power, elected=elected,
    )  # fmt: skip
    reference = voted_reference(
        given["thetas"], given["fishers"], weights, given["base"], masks=masks, power=power, elected=elected
    )
    assert_within(merged.values, reference, largest([given["base"], *given["thetas"]]))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_whole_range_of_fishers(count: int, dtype: torch.dtype) -> None:
    """F from 1e-38 to 1e+30 neither overflows nor vanishes in an election."""
    generator = torch.Generator().manual_seed(7 * count)
    base = torch.randn(2003, generator=generator).to(dtype)
    thetas = [base + torch.randn(2003, generator=generator).to(dtype) for _ in range(count)]
    fishers = [draw_fisher((2003,), generator).to(dtype) for _ in range(count)]
    weights = list(WEIGHTS[:count])
    merged = voted_mean(thetas, fishers, weights, [1.0] * count, base, elected=True)
    reference = voted_reference(thetas, fishers, weights, base, elected=True)
    assert_within(merged.values, reference, largest([base, *thetas]))


@pytest.mark.parametrize("power", [0.0, 0.1, 0.5, 3.0])
def test_powers_without_a_base(power: float) -> None:
    """A power of the ratio keeps entries that are far apart, and 0 gives the weighted mean."""
    generator = torch.Generator().manual_seed(3)
    thetas = [torch.randn(1501, generator=generator) for _ in range(3)]
    fishers = [draw_fisher((1501,), generator) for _ in range(3)]
    merged = powered_mean(thetas, fishers, [1.0, 0.5, 2.0], [1.0, 4.0, 0.25], power)
    scaled = [fisher.double() * scale for fisher, scale in zip(fishers, (1.0, 4.0, 0.25), strict=True)]
    assert_within(merged.values, voted_reference(thetas, scaled, [1.0, 0.5, 2.0], power=power), largest(thetas))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", [1e-34, 1e-24, 1.0, 1e29])
def test_known_extremes_change_nothing(count: int, size: float) -> None:
    """The short cut for Fishers without zeros elects the same signs, also in ties, and leaves its inputs alone."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randint(-8, 9, (999,), generator=generator) / 4
    thetas = [base + torch.randint(-2, 3, (999,), generator=generator) / 4 for _ in range(count)]
    fishers = [torch.randint(1, 4, (999,), generator=generator) * 2.0 ** round(math.log2(size)) for _ in range(count)]
    extremes = [(float(fisher.min()), float(fisher.max())) for fisher in fishers]
    weights, before = list(EXACT[:count]), [tensor.clone() for tensor in (base, *thetas, *fishers)]
    merged = voted_mean(thetas, fishers, weights, [1.0] * count, base, elected=True, extremes=extremes)
    slow = voted_mean(thetas, fishers, weights, [1.0] * count, base, elected=True)
    reference = voted_reference(thetas, fishers, weights, base, elected=True)
    assert_within(merged.values, reference, largest([base, *thetas]))
    assert torch.equal(merged.values, slow.values)
    assert [float(share) for share in merged.shares] == pytest.approx([float(share) for share in slow.shares])
    assert (merged.sign_conflicts, int(merged.silent)) == (slow.sign_conflicts, int(slow.silent))
    assert all(map(torch.equal, (base, *thetas, *fishers), before))


def test_the_counts_of_votes() -> None:
    """Abstentions, silent entries and entries without information are counted apart."""
    base, one, zero = torch.zeros(4), torch.ones(4), torch.zeros(4)
    kept = [torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])]
    fishers = [torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])]
    merged = voted_mean([one, 2 * one], fishers, [1.0, 1.0], [1.0, 1.0], base, kept=kept)
    assert merged.values.tolist() == [1.5, 1.0, 2.0, 0.0]
    assert [int(count) for count in merged.abstained] == [2, 2]
    assert (int(merged.silent), int(merged.fell_back)) == (1, 1)
    assert [float(share) for share in merged.shares] == [1.5, 1.5]
    opposed = voted_mean([one, -one], [one, one], [1.0, 1.0], [1.0, 1.0], zero, elected=True)
    assert (int(opposed.silent), opposed.values.tolist()) == (4, [0.0] * 4)


def test_sign_conflicts_are_no_abstentions() -> None:
    """A kept entry against the elected sign is a conflict; a step of 0, a tie and a masked entry are none."""
    base, one = torch.zeros(5), torch.ones(5)
    thetas = [torch.tensor([1.0, -1.0, 1.0, 0.0, -1.0]), 2 * one, torch.tensor([-1.0, 1.0, -3.0, 1.0, -4.0])]
    kept = [None, torch.tensor([True, True, True, True, False]), torch.tensor([True, False, True, True, True])]
    merged = voted_mean(thetas, [one] * 3, [1.0] * 3, [1.0] * 3, base, kept=kept, elected=True)
    # Sums of the steps: 2, 1, 0 (a tie), 3, -5.
    assert merged.values.tolist() == [1.5, 2.0, 0.0, 1.5, -2.5]
    assert [int(count) for count in merged.sign_conflicts] == [1, 0, 1]
    assert [int(count) for count in merged.abstained] == [0, 1, 1]
    plain = voted_mean(thetas, [one] * 3, [1.0] * 3, [1.0] * 3, base, kept=kept)
    assert list(plain.sign_conflicts) == []


def test_tokens_that_the_base_lacks_have_no_sign_conflict() -> None:
    """Models of weight 0 and entries outside of ``based`` are not counted."""
    base, one = torch.zeros(3), torch.ones(3)
    based = torch.tensor([True, False, True])
    merged = voted_mean([3 * one, one, -one], [one] * 3, [1.0, 0.0, 1.0], [1.0] * 3, base, elected=True, based=based)
    assert [int(count) for count in merged.sign_conflicts] == [0, 0, 2]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_gradient_matching(count: int, power: float) -> None:
    """A model that abstains leaves both sums of gradient matching, and powers act on every Fisher."""
    given = drawn(count, (13, 11), 40 + count)
    base, own = given["base"], given["fishers"][0].flip(0)
    masks, weights = _masks(count, (13, 11), count), list(WEIGHTS[:count])
    merged = voted_step(
        base, own, given["thetas"], given["fishers"], weights, [1.0] * count, kept=masks, power=power, prior=0.25
    )
    for place in range(0, base.numel(), 7):
        flat = [theta.flatten()[place : place + 1] for theta in given["thetas"]]
        fishers = [fisher.flatten()[place : place + 1].double() for fisher in given["fishers"]]
        f0 = own.flatten()[place : place + 1].double()
        votes = [w * (1.0 if m is None else float(m.flatten()[place])) for w, m in zip(weights, masks, strict=True)]
        if f0 == 0 and not any(v and float(f) for v, f in zip(votes, fishers, strict=True)):
            assert merged.values.flatten()[place] == base.flatten()[place]
            continue
        raised = [fisher**power for fisher in fishers]
        known = f0**power + sum(v * f for v, f in zip(votes, raised, strict=True))
        start = base.flatten()[place : place + 1].double()
        step = sum(
            v * (f0**power + 0.25 + f) * (t.double() - start) for v, f, t in zip(votes, raised, flat, strict=True)
        )
        assert_within(merged.values.flatten()[place : place + 1], start + step / (known + 0.25), start.abs() + 9)


def test_gradient_matching_without_options_is_the_plain_one() -> None:
    """With power 1 and no abstention the vote is gradient matching."""
    given = drawn(3, (19,), 2)
    merged = voted_step(given["base"], None, given["thetas"], given["fishers"], [1.0, 0.5, 2.0], [1.0] * 3)
    blank = torch.zeros_like(given["base"])
    reference = ubgm_reference(given["base"], blank, given["thetas"], given["fishers"], [1.0, 0.5, 2.0])
    assert_within(merged.values, reference, largest([given["base"], *given["thetas"]]) * 4)
