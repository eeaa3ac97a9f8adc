"""Comparison of two Fishers, against slow float64 references."""

import math

import pytest
import torch

from squisher_mergekit.errors import ConfigError, MismatchError, ValuesError
from squisher_mergekit.fisher.compare import (
    BINS_PER_DECADE,
    average_ranks,
    common,
    common_scaling,
    compare,
    pearson,
    spearman,
)
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.summary import FIRST_DECADE
from squisher_mergekit.fisher.values import Moments
from squisher_mergekit.tensors.safetensors import MemoryStore

SHAPES = {"a.weight": (13, 11), "b.weight": (7, 3, 5), "c.bias": (17,)}
EMA = {"estimator": "squisher", "statistic": "ema", "steps": 3, "optimizer": {"beta2": 0.9}}


def _slow_ranks(values):
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


def _slow_pearson(x, y):
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    over = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    under = math.fsum((a - mean_x) ** 2 for a in x) * math.fsum((b - mean_y) ** 2 for b in y)
    return over / math.sqrt(under)


def _tensors(seed, ties=False):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in SHAPES.items():
        tensor = 10 ** (torch.randn(shape, generator=generator) * 2 - 8)
        tensor[torch.rand(shape, generator=generator) < 0.2] = 0
        tensors[name] = (tensor * 1e9).round() if ties else tensor
    return tensors


def _fisher(tensors, aliases=None, **config):
    return Fisher(MemoryStore(tensors), FisherConfig.model_validate(config), aliases)


def _check(agreement, a, b, factor=1.0):
    """Compare an agreement with float64 loops over flat tensors A and B; ``factor`` is the scale of A."""
    a, b = [value * factor for value in a.double().tolist()], b.double().tolist()
    both = [(x, y) for x, y in zip(a, b, strict=True) if x > 0 and y > 0]
    logs = [[math.log10(pair[i]) for pair in both] for i in (0, 1)]
    apart = sorted(abs(x - y) for x, y in zip(*logs, strict=True))
    assert agreement.entries == len(a)
    assert agreement.spearman == pytest.approx(_slow_pearson(_slow_ranks(a), _slow_ranks(b)), abs=1e-12)
    assert agreement.log_correlation == pytest.approx(_slow_pearson(*logs), abs=1e-6)
    assert agreement.ratio == pytest.approx(math.fsum(a) / math.fsum(b), rel=1e-6)
    assert agreement.factor == pytest.approx(10 ** apart[(len(apart) - 1) // 2], rel=1e-5)
    assert (agreement.zeros_a, agreement.zeros_b) == (a.count(0) / len(a), b.count(0) / len(b))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
def test_ranks_are_those_of_counting(seed, levels):
    """The rank of an entry is one plus the number of smaller entries. Ties share their mean rank."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(levels, (7, 13), generator=generator).float()
    assert average_ranks(values).tolist() == _slow_ranks(values.flatten().tolist())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_spearman_equals_the_slow_one(seed, levels):
    """The rank correlation with and without ties equals that of float64 loops, and is symmetric."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(levels, (101,), generator=generator).float() for _ in range(2))
    slow = _slow_pearson(_slow_ranks(a.tolist()), _slow_ranks(b.tolist()))
    assert spearman(a, b) == pytest.approx(slow, abs=1e-13)
    assert spearman(a, b) == spearman(b, a)


def test_spearman_sees_order_alone():
    """The rank correlation is 1 under an increasing map, -1 under a decreasing one, and invariant to a permutation."""
    generator = torch.Generator().manual_seed(0)
    values, others = torch.rand(2, 997, generator=generator).double()
    for rising in (values.exp(), values**9, values * 1e-30, values.log()):
        assert spearman(values, rising) == 1
    assert spearman(values, 1 / values) == -1
    order = torch.randperm(997, generator=generator)
    assert spearman(values[order], others[order]) == pytest.approx(spearman(values, others), abs=1e-13)


def test_a_constant_tensor_has_no_correlation():
    """A constant tensor, or one with fewer than two entries, has no correlation."""
    varied = torch.arange(1009.0)
    for constant in (torch.zeros(1009), torch.full((1009,), 0.1), torch.full((1009,), 1e30)):
        assert spearman(constant, varied) is spearman(varied, constant) is None
        assert pearson(constant, varied) is None
    assert spearman(torch.ones(1), torch.ones(1)) is spearman(torch.ones(0), torch.ones(0)) is None


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("block", [7, 1 << 22])
def test_every_number_equals_its_reference(ties, block, monkeypatch):
    """The numbers of each tensor and the overall ones equal those of float64 loops, for any block size."""
    monkeypatch.setattr(Moments, "BLOCK", block)
    a, b = _tensors(0, ties), _tensors(1, ties)
    result = compare(_fisher(a), _fisher(b))
    assert [row.name for row in result.rows] == list(SHAPES)
    assert [row.shape for row in result.rows] == list(SHAPES.values())
    for row in result.rows:
        _check(row, a[row.name].flatten(), b[row.name].flatten())
    flat_a, flat_b = (torch.cat([tensor.flatten() for tensor in each.values()]) for each in (a, b))
    _check(result.over_all, flat_a, flat_b)
    assert result.sample == result.over_all.entries == flat_a.numel()
    alone_a, alone_b = ((flat_a == 0) & (flat_b > 0)).sum(), ((flat_b == 0) & (flat_a > 0)).sum()
    assert result.zeros == (alone_a, alone_b, ((flat_a == 0) & (flat_b == 0)).sum())


def test_histogram_counts_entries_that_are_positive_in_both():
    """The histogram has each entry in the cell of its two logarithms."""
    a, b = _tensors(0), _tensors(1)
    expected = torch.zeros_like(compare(_fisher(a), _fisher(b)).histogram)
    for name in SHAPES:
        for x, y in zip(a[name].flatten().double().tolist(), b[name].flatten().double().tolist(), strict=True):
            if x > 0 and y > 0:
                row, column = (int((math.log10(value) - FIRST_DECADE) * BINS_PER_DECADE) for value in (x, y))
                expected[row, column] += 1
    assert torch.equal(compare(_fisher(a), _fisher(b)).histogram, expected)


def test_scaling_moves_the_ratio_and_not_the_order():
    """Each side has its own factor at the debiased scale, and ranks stay the same."""
    a, b = _tensors(0), _tensors(1)
    debiased = compare(_fisher(a, **EMA), _fisher(b, statistic="mean"), scaling="debiased")
    for row in debiased.rows:
        _check(row, a[row.name].flatten(), b[row.name].flatten(), factor=1 / (1 - 0.9**3))
    raw = compare(_fisher(a, **EMA), _fisher(b, statistic="mean"))
    assert raw.scaling == "raw"
    assert debiased.rows[0].spearman == raw.rows[0].spearman
    with pytest.raises(ConfigError, match="steps"):
        compare(_fisher(a, statistic="ema"), _fisher(b), scaling="debiased")


def test_common_scaling_is_debiased_if_both_have_steps():
    """Both sides are raw if one side lacks its steps."""
    a = _tensors(0)
    assert common_scaling(_fisher(a, **EMA), _fisher(a, statistic="mean")) == "debiased"
    assert common_scaling(_fisher(a, **EMA), _fisher(a, statistic="ema")) == "raw"


def test_a_sample_is_stated_repeatable_and_near():
    """Rank correlation and factor use a fixed sample of large Fishers. All other numbers stay exact."""
    generator = torch.Generator().manual_seed(0)
    noise, a = torch.rand(2, 211, 199, generator=generator)
    one, other = _fisher({"w": a, "v": a[:3] ** 2}), _fisher({"w": a + noise / 2, "v": noise[:3]})
    whole = compare(one, other)
    some = compare(one, other, sample=20_000)
    assert abs(some.sample - 20_000) <= 1
    assert some.over_all.entries == whole.over_all.entries == 214 * 199
    assert some.over_all.spearman == pytest.approx(whole.over_all.spearman, abs=0.01)
    assert some.over_all.spearman != whole.over_all.spearman
    assert some.over_all.factor == pytest.approx(whole.over_all.factor, rel=0.02)
    assert some.over_all == compare(one, other, sample=20_000).over_all
    assert some.over_all.log_correlation == whole.over_all.log_correlation
    assert some.rows == whole.rows
    parts = compare(one, other, sample=20_000, whole=False)
    assert parts.over_all == some.over_all
    assert parts.rows[0].spearman == pytest.approx(whole.rows[0].spearman, abs=0.02)


def test_tensors_of_one_side_are_listed_and_left_out():
    """Tensors of only one Fisher are named and do not enter the numbers."""
    a, b = _tensors(0), _tensors(1)
    result = compare(_fisher(a | {"x": torch.ones(3)}), _fisher({"y": torch.ones(3)} | b))
    assert (result.only_a, result.only_b) == (("x",), ("y",))
    assert result.over_all == compare(_fisher(a), _fisher(b)).over_all


def test_tied_names_are_one_tensor():
    """A tensor is compared with its counterpart under a tied name."""
    a = _fisher({"head": torch.arange(5.0)})
    b = _fisher({"embed": torch.arange(5.0)}, {"head": "embed"})
    result = compare(a, b)
    assert [row.name for row in result.rows] == ["head"]
    assert result.over_all.spearman == 1


def test_shapes_and_names_must_fit():
    """Another shape, or no common name, is refused by name before anything is read."""
    with pytest.raises(MismatchError, match=r"w is \[3, 5\] in memory and \[5, 3\]"):
        common(_fisher({"w": torch.ones(3, 5)}), _fisher({"w": torch.ones(5, 3)}))
    with pytest.raises(MismatchError, match="share none"):
        compare(_fisher({"w": torch.ones(3)}), _fisher({"v": torch.ones(3)}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_bad_entries_are_refused(bad):
    """NaN, infinite and negative entries are refused on either side."""
    good, poor = _fisher({"w": torch.ones(3)}), _fisher({"w": torch.tensor([1.0, bad, 2.0])})
    for pair in ((good, poor), (poor, good)):
        with pytest.raises(ValuesError):
            compare(*pair)


def test_scalars_and_empty_tensors_pass():
    """Scalars and empty tensors have no correlation and raise no error."""
    tensors = {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 3), "w": torch.arange(3.0)}
    result = compare(_fisher(tensors), _fisher(tensors))
    assert [row.spearman for row in result.rows] == [None, None, 1.0]
    assert result.over_all.entries == 4


@pytest.mark.parametrize("sample", [10**6, 101])
def test_another_default_device_changes_no_comparison(sample):
    """A program may have called ``torch.set_default_device``."""
    generator = torch.Generator().manual_seed(0)
    a, b = (
        Fisher({name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}, FisherConfig())
        for _ in range(2)
    )
    wanted = compare(a, b, sample=sample, whole=False)
    with torch.device("meta"):
        found = compare(a, b, sample=sample, whole=False)
    assert (found.rows, found.over_all) == (wanted.rows, wanted.over_all)
    assert torch.equal(found.histogram, wanted.histogram)
