"""Masks of the largest entries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squisher_mergekit.tensors import topk

VALUES = st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 0.5, 1.0, 1.0000001, 3.0, 1e30, float("inf")])


def _first_largest(tensors, keep):
    """Return the mask of a full sort, the largest first, ties in their order; the slow reference."""
    entries = [(-abs(value), number, place) for number, t in enumerate(tensors) for place, value in enumerate(t)]
    chosen = {(number, place) for _, number, place in sorted(entries)[:keep]}
    return [[(number, place) in chosen for place in range(len(t))] for number, t in enumerate(tensors)]


@given(tensors=st.lists(st.lists(VALUES, min_size=1, max_size=7), min_size=1, max_size=4), data=st.data())
def test_a_cut_keeps_exactly_the_largest(tensors, data):
    """A cut keeps exactly the largest entries for any ties, zeros of either sign and extremes of float32."""
    parts = [torch.tensor(values, dtype=torch.float32) for values in tensors]
    keep = data.draw(st.integers(0, sum(map(len, tensors))))
    found = topk.cut(lambda: map(topk.keys, parts), keep)
    taken = [found.take(topk.keys(part)).tolist() for part in parts]
    assert taken == _first_largest([part.tolist() for part in parts], keep)


def test_a_cut_is_exact_over_blocks(monkeypatch):
    """Tensors longer than a block, whose keys share their upper bits, are cut at the exact entry."""
    monkeypatch.setattr(topk, "_BLOCK", 13)
    generator = torch.Generator().manual_seed(0)
    parts = [1 + torch.rand(101, generator=generator) * 1e-4, torch.rand(37, 3, generator=generator)]
    threshold = torch.cat([part.reshape(-1) for part in parts]).sort(descending=True).values[77]
    found = topk.cut(lambda: map(topk.keys, parts), 77)
    for part in parts:
        assert torch.equal(found.take(topk.keys(part)), part > threshold)


def test_kept_entries_come_before_infinity():
    """``KEPT`` is above the key of any number."""
    ranked = topk.keys(torch.tensor([float("inf"), 1.0, 2.0]))
    ranked[1] = topk.KEPT
    assert topk.cut(lambda: [ranked], 1).take(ranked).tolist() == [False, True, False]


def test_a_count_above_the_size_is_refused():
    """A count above the number of entries raises an error."""
    with pytest.raises(ValueError, match="4 entries are to be kept of 3"):
        topk.largest(torch.ones(3), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_largest_of_one_tensor(dtype):
    """The mask of the largest entries is exact for any shape and dtype."""
    values = torch.rand(7, 5, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    for keep in (0, 1, 52, 105):
        kept = topk.largest(values, keep)
        assert kept.shape == values.shape
        assert int(kept.sum()) == keep
        if 0 < keep < 105:
            assert values[kept].min() >= values[~kept].max()


def test_largest_over_blocks_keeps_the_first_among_equals(monkeypatch):
    """A tensor longer than a block has the mask of the whole, also with ties in several blocks."""
    monkeypatch.setattr(topk, "_BLOCK", 13)
    values = torch.randint(0, 4, (7, 11), generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    for keep in (0, 1, 29, 50, 77):
        (expected,) = _first_largest([values.flatten().tolist()], keep)
        assert topk.largest(values, keep).flatten().tolist() == expected


@given(seed=st.integers(0, 99), pattern=st.sampled_from([(2, 4), (1, 3), (3, 5)]), axis=st.sampled_from([0, 1, 2]))
def test_each_group_keeps_its_largest(seed, pattern, axis):
    """Each group of m along the axis keeps its largest, as sorted by hand; ties go to the first."""
    n, m = pattern
    shape = [3, 2, 7]
    shape[axis] = 2 * m
    keys = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(seed))
    found = topk.pattern_mask(keys, n, m, axis)
    rows, kept = keys.movedim(axis, -1).reshape(-1, m), found.movedim(axis, -1).reshape(-1, m)
    for row, mask in zip(rows.tolist(), kept.tolist(), strict=True):
        best = sorted(range(m), key=lambda place: (-row[place], place))[:n]
        assert [place for place in range(m) if mask[place]] == sorted(best)


def test_a_cut_counts_on_the_host_inside_another_default(device):
    """The histogram is in host memory, wherever the keys are and new tensors go."""
    values = torch.rand(101, generator=torch.Generator().manual_seed(3))
    with torch.device("meta"):
        found = topk.cut(lambda: [topk.keys(values.to(device))], 17)
    assert int(found.take(topk.keys(values)).sum()) == 17


def test_a_transposed_tensor_is_cut_in_the_order_of_its_entries():
    """Keys with other strides give the mask of a contiguous copy, ties included."""
    values = torch.tensor([[2.0, 1.0, 2.0], [1.0, 1.0, 3.0]]).T
    assert not values.is_contiguous()
    found = topk.cut(lambda: [topk.keys(values)], 5)
    assert found.take(topk.keys(values)).tolist() == [[True, True], [True, False], [True, True]]
