"""Choice of the kept weights of a model."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squisher_mergekit.applications.selection import (
    ScoreInputs,
    Selection,
    check_share,
    min_counts,
    plan_selection,
    select_masks,
)
from squisher_mergekit.errors import ConfigError
from squisher_mergekit.tensors.topk import keys, largest_of_many


def _chosen(scores, keep, scope, min_keep=0.0):
    sizes = {name: tensor.numel() for name, tensor in scores.items()}
    counts = min_counts(sizes, keep, scope, min_keep)
    return dict(largest_of_many(sizes, lambda name: keys(scores[name]).clone(), keep, counts))


def _scores(seed, shapes=((7, 3), (5,), (2, 2, 3))):
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers give many ties.
    return {f"t{i}": torch.randint(0, 5, shape, generator=generator).float() for i, shape in enumerate(shapes)}


@given(seed=st.integers(0, 99), keep=st.integers(0, 38))
def test_over_all_tensors_the_largest_are_kept(seed, keep):
    """The largest entries of all tensors are kept in the exact number; ties go to the first position."""
    scores = _scores(seed)
    flat = torch.cat([tensor.flatten() for tensor in scores.values()])
    wanted = torch.zeros(38, dtype=torch.bool)
    wanted[flat.argsort(descending=True, stable=True)[:keep]] = True
    found = _chosen(scores, keep, "global")
    assert torch.equal(torch.cat([found[name].flatten() for name in scores]), wanted)


@given(seed=st.integers(0, 99), keep=st.integers(0, 38))
def test_within_each_tensor_the_same_share_is_kept(seed, keep):
    """The same share of each tensor is kept, to the entry, with the exact total."""
    scores = _scores(seed)
    found = _chosen(scores, keep, "layer")
    assert sum(int(mask.sum()) for mask in found.values()) == keep
    for name, tensor in scores.items():
        count = int(found[name].sum())
        assert abs(count - tensor.numel() * keep / 38) < 1
        if 0 < count < tensor.numel():
            assert tensor[found[name]].min() >= tensor[~found[name]].max()


@given(seed=st.integers(0, 99), min_keep=st.sampled_from([0.1, 0.3]), more=st.integers(0, 20))
def test_each_tensor_keeps_at_least_a_share(seed, min_keep, more):
    """Each tensor keeps its floor of largest entries. The remaining ones are the largest over all tensors."""
    scores = _scores(seed) | {"tiny": torch.full((11,), 1e-9)}
    floors = {name: math.ceil(tensor.numel() * min_keep) for name, tensor in scores.items()}
    keep = sum(floors.values()) + min(more, 49 - sum(floors.values()))
    found = _chosen(scores, keep, "global", min_keep)
    assert sum(int(mask.sum()) for mask in found.values()) == keep
    assert int(found["tiny"].sum()) >= floors["tiny"]
    dropped = max(tensor[~found[name]].max().item() for name, tensor in scores.items() if not found[name].all())
    beyond = [tensor[found[name]].sort(descending=True).values[floors[name] :] for name, tensor in scores.items()]
    assert torch.cat(beyond).numel() == keep - sum(floors.values())
    assert all(value >= dropped for value in torch.cat(beyond).tolist())


def test_a_floor_above_the_total_is_refused():
    """A floor above the total is refused with both counts."""
    with pytest.raises(ConfigError, match="takes 20 entries, but 5 of 38 are to be kept"):
        _chosen(_scores(0), 5, "global", 0.5)


@pytest.mark.parametrize("value", [-0.1, 1.0, 75, float("nan"), float("inf")])
def test_an_invalid_share_is_refused(value):
    """A share that is negative, 1, a percentage or no number is refused."""
    with pytest.raises(ConfigError, match=r"sparsity must be in \[0, 1\), found"):
        check_share("sparsity", value)


SHAPES = {"head": (2, 3), "w": (7, 5), "words": (11, 4), "buffer": (3,)}


@pytest.mark.parametrize("size", [37, 100, 1000, 7919])
def test_rounding_moves_no_count(size):
    """In binary 0.29 * 100 is below 29, and 0.07 * 100 above 7; decimals and quotients have the counts they mean."""
    for count in range(1, size):
        share = float(f"0.{count:03}") if size == 1000 else count / size
        assert Selection(share).count(size) == count
        assert min_counts({"w": size}, size, "global", share) == {"w": count}
    assert Selection(0.29).count(99) == 28
    assert min_counts({"w": 99}, 99, "global", 0.07) == {"w": 7}


def test_a_plan_has_every_count_before_a_weight_is_read():
    """``always`` is counted and kept, ``never`` is not counted, and ``outside`` is not touched.

    The plan has all counts before a weight is read.
    """
    selection = Selection(0.5, "magnitude", always=frozenset({"head"}), never=frozenset({"words"}), min_keep=0.1)
    plan = plan_selection(selection, SHAPES, {"buffer": "a buffer"})
    assert (plan.entries, plan.keep, plan.whole) == (41, 20, 6)
    assert plan.sizes == {"w": 35}
    assert plan.min_counts == {"w": 4}
    assert plan.passes == 3


def test_tensors_that_are_kept_or_dropped_whole_are_not_read():
    """A tensor to choose from is read as often as the plan says. Other tensors are never read."""
    reads = Counter()

    def read(name):
        reads[name] += 1
        return torch.arange(35.0).reshape(7, 5) - 17

    for options in ({}, {"normalize": "layer"}, {"pattern": (2, 5)}):
        selection = Selection(0.5, "magnitude", always=frozenset({"head"}), never=frozenset({"words"}), **options)
        plan = plan_selection(selection, SHAPES, {"buffer": "a buffer"}, {"w": 1})
        reads.clear()
        found = dict(select_masks(plan, ScoreInputs(read)))
        assert reads == {"w": plan.passes}
        assert list(found) == ["head", "w", "words"]
        assert bool(found["head"].all())
        assert not bool(found["words"].any())
        assert int(found["w"].sum()) == 14


def test_scores_by_hand():
    """Each score keeps the two entries that its formula ranks first."""
    theta, base = torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.tensor([4.0, -2.0, 2.5, 0.0])
    fisher, gradient = torch.tensor([1.0, 9.0, 0.1, 4.0]), torch.tensor([5.0, 1.0, 1.0, -9.0])
    inputs = ScoreInputs(*(lambda _, tensor=tensor: tensor for tensor in (theta, fisher, base, gradient)))
    wanted = {
        "fisher": [1, 3],
        "saliency": [1, 0],  # scores 0.5, 18, 0.45, 0.5; the first of equal ones
        "reset": [0, 3],  # scores 4.5, 0, 0.0125, 0.5
        "movement": [0, 2],  # scores 3, 0, 0.5, 0.5
        "magnitude": [2, 1],
        "taylor_squared": [0, 3],  # scores 25, 4, 9, 20.25
    }
    for score, places in wanted.items():
        ((_, mask),) = select_masks(plan_selection(Selection(2, score), {"w": (4,)}), inputs)
        assert mask.nonzero()[:, 0].tolist() == sorted(places), score


def test_zeros_can_rank_below_all_others():
    """With ``drop_zeros``, a weight of 0 is dropped before any other, whatever its Fisher."""
    inputs = ScoreInputs(lambda _: torch.tensor([0.0, 1.0, 1.0]), lambda _: torch.tensor([9.0, 0.0, 1.0]))
    for drop, wanted in ((True, [False, True, True]), (False, [True, False, True])):
        plan = plan_selection(Selection(2, "fisher", drop_zeros=drop), {"w": (3,)})
        assert dict(select_masks(plan, inputs))["w"].tolist() == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep must be in \(0, 1\], found 0.0"),
        ({"keep": -3}, r"keep must be in \(0, 1\], found -3"),
        ({"min_keep": 1.0}, r"min_keep must be in \[0, 1\), found 1.0"),
        ({"score": "fischer"}, "score must be one of fisher, saliency"),
        ({"scope": "tensor"}, "scope must be one of global, layer, found 'tensor'"),
        ({"normalize": "l2"}, "normalize must be one of none, layer"),
        ({"pattern": (4, 4)}, "0 < n < m"),
        ({"always": frozenset("ab"), "never": frozenset("bc")}, "but b is to be both"),
    ],
)
def test_a_selection_refuses_values_out_of_range(options, message):
    """An argument out of range is refused in one line when the selection is made."""
    with pytest.raises(ConfigError, match=message) as error:
        Selection(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"score": "saliency", "drop_zeros": True}, {"score": "random"}])
@pytest.mark.parametrize("kept", [{"keep": 17, "normalize": "layer"}, {"pattern": (1, 7)}])
def test_another_default_device_changes_no_selection(options, kept):
    """A program may have called ``torch.set_default_device``: the scores of weights on the host are on the host."""
    generator = torch.Generator().manual_seed(0)
    theta, fisher = ({"a": torch.randn(3, 7, generator=generator), "b": torch.ones(5, 14)} for _ in range(2))
    selection = Selection(**options, **kept, always=frozenset({"head"}))
    axes = {"a": 1, "b": 1} if "pattern" in kept else None
    plan = plan_selection(selection, {"a": (3, 7), "head": (2,), "b": (5, 14)}, axes=axes)
    inputs = ScoreInputs(theta.get, {name: tensor.abs() for name, tensor in fisher.items()}.get)
    wanted = dict(select_masks(plan, inputs))
    with torch.device("meta"):
        found = dict(select_masks(plan, inputs))
    assert all(torch.equal(found[name], mask) for name, mask in wanted.items())
