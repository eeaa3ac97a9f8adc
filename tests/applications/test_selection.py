"""Which weights of a model are kept."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squisher_mergekit.applications.selection import check_share, choose
from squisher_mergekit.errors import ConfigError
from squisher_mergekit.tensors.topk import keys


def _chosen(scores, keep, scope, least=0.0):
    sizes = {name: tensor.numel() for name, tensor in scores.items()}
    return dict(choose(sizes, lambda name: keys(scores[name]).clone(), keep, scope=scope, least=least))


def _scores(seed, shapes=((7, 3), (5,), (2, 2, 3))):
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers, so that many are equal.
    return {f"t{i}": torch.randint(0, 5, shape, generator=generator).float() for i, shape in enumerate(shapes)}


@given(seed=st.integers(0, 99), keep=st.integers(0, 38))
def test_over_all_tensors_the_largest_are_kept(seed, keep):
    """As many as asked for, none smaller than one that is dropped, ties by their place."""
    scores = _scores(seed)
    flat = torch.cat([tensor.flatten() for tensor in scores.values()])
    wanted = torch.zeros(38, dtype=torch.bool)
    wanted[flat.argsort(descending=True, stable=True)[:keep]] = True
    found = _chosen(scores, keep, "global")
    assert torch.equal(torch.cat([found[name].flatten() for name in scores]), wanted)


@given(seed=st.integers(0, 99), keep=st.integers(0, 38))
def test_within_each_tensor_the_same_share_is_kept(seed, keep):
    """To the entry, and in all as many as asked for."""
    scores = _scores(seed)
    found = _chosen(scores, keep, "layer")
    assert sum(int(mask.sum()) for mask in found.values()) == keep
    for name, tensor in scores.items():
        count = int(found[name].sum())
        assert abs(count - tensor.numel() * keep / 38) < 1
        if 0 < count < tensor.numel():
            assert tensor[found[name]].min() >= tensor[~found[name]].max()


@given(seed=st.integers(0, 99), least=st.sampled_from([0.1, 0.3]), more=st.integers(0, 20))
def test_of_each_tensor_at_least_a_share_is_kept(seed, least, more):
    """Its own largest; what is left to keep are the largest of all others."""
    scores = _scores(seed) | {"tiny": torch.full((11,), 1e-9)}
    floors = {name: math.ceil(tensor.numel() * least) for name, tensor in scores.items()}
    keep = sum(floors.values()) + min(more, 49 - sum(floors.values()))
    found = _chosen(scores, keep, "global", least)
    assert sum(int(mask.sum()) for mask in found.values()) == keep
    assert int(found["tiny"].sum()) >= floors["tiny"]
    dropped = max(tensor[~found[name]].max().item() for name, tensor in scores.items() if not found[name].all())
    beyond = [tensor[found[name]].sort(descending=True).values[floors[name] :] for name, tensor in scores.items()]
    assert torch.cat(beyond).numel() == keep - sum(floors.values())
    assert all(value >= dropped for value in torch.cat(beyond).tolist())


def test_a_least_share_that_asks_for_too_much_is_refused():
    """The message says how many it takes and how many there may be."""
    with pytest.raises(ConfigError, match="takes 20 entries, but 5 of 38 are to be kept"):
        _chosen(_scores(0), 5, "global", 0.5)


@pytest.mark.parametrize("value", [-0.1, 1.0, 75, float("nan"), float("inf")])
def test_what_is_no_share_is_refused(value):
    """Negative, all, in per cent, no number."""
    with pytest.raises(ConfigError, match=r"sparsity must be in \[0, 1\), found"):
        check_share("sparsity", value)
