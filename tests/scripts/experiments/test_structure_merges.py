"""Merges and searches of the experiments on structures, on tensors of a few entries."""

import pytest
import torch

from scripts.experiments import structure_merges as merges
from scripts.experiments.runner import TIMINGS
from tests.scripts.experiments.structure_models import few_models


def _reference(models, share, power):
    """Return the masked merge entry by entry, over all tensors as one vector."""
    keys = list(models.base)

    def flat(tensors):
        return torch.cat([tensors[key].reshape(-1) for key in keys]).double()

    base, total, votes = flat(models.base), 0, 0
    for name, weights in models.weights.items():
        step, v = flat(weights) - base, flat(models.fishers[name])
        order = (v * step**2).argsort(descending=True)[: round(share * len(base))]
        vote = torch.zeros_like(base)
        vote[order] = v[order] ** power
        total, votes = total + vote * step, votes + vote
    return keys, base + torch.where(votes > 0, total / votes.clamp_min(1e-300), 0)


@pytest.mark.parametrize(("share", "power"), [(0.25, 0.5), (0.25, 1.0), (0.7, 0.5)])
def test_a_mask_is_over_the_whole_model_and_abstains(share, power):
    """Each model keeps its share over all tensors; entries that no model keeps are the base's."""
    models = few_models(3)
    keys, wanted = _reference(models, share, power)
    found = merges.masked(models, share, power)
    flat = torch.cat([found[key].reshape(-1) for key in keys]).double()
    torch.testing.assert_close(flat, wanted, rtol=1e-5, atol=1e-6)
    if share < 0.5:
        assert (flat == torch.cat([models.base[key].reshape(-1) for key in keys]).double()).any()


def test_a_structure_takes_the_base_and_is_another_merge():
    """A structure changes matrices and leaves vectors to the diagonal; without v it is another merge again."""
    models = few_models(3)
    diagonal = merges.diagonal(models)
    for kind in merges.STRUCTURES:
        found = merges.structured(models, kind)
        assert torch.equal(found["x.norm"], diagonal["x.norm"])
        assert not torch.allclose(found["x.encoder.a"], diagonal["x.encoder.a"])
        assert not torch.allclose(merges.structured(models, kind, use_v=False)["x.encoder.a"], found["x.encoder.a"])


def test_lambda_scales_the_step_from_the_base():
    """A lambda of 1 gives the merge and one of 2 twice its step; TIES with lambda is mergekit's own."""
    models = few_models(2)
    row = merges.rows(2)["ties"]
    found = row.make(models, **{"density": 0.2, "lambda": 1.5})
    wanted = merges.over_base(models, "ties", weight=1.0, density=0.2, **{"lambda": 1.5})
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor)


def _scored(values, seen):
    """Return models whose validation accuracy is a function of the merge's only number."""

    def score(weights, part):
        seen.append(part)
        return {"a": values[float(weights["w"])] if weights else 90.0}

    return merges.Models({"w": torch.tensor(0.0)}, {"a": {}}, {"a": {}}, score)


def _number(models, one, two):
    return {"w": torch.tensor(float(10 * one + two))}


def test_a_search_takes_one_option_at_a_time_and_the_first_of_equals():
    """The second option is tried at the best value of the first; a value as good as an earlier one is not taken."""
    seen = []
    values = {11.0: 50.0, 21.0: 60.0, 31.0: 60.0, 22.0: 60.0, 23.0: 61.0}
    found = merges.Search(_scored(values, seen), merges.Row(_number, {"one": (1, 2, 3), "two": (1, 2, 3)}))
    assert found.best.options == {"one": 2, "two": 3}
    assert found.first.options == {"one": 1, "two": 1}
    assert list(found.tried.values()) == [50.0, 60.0, 60.0, 60.0, 61.0]
    assert seen == ["validation"] * 5


def test_test_texts_are_read_once_for_each_row():
    """A row has one score on test texts, its best trial's; a row with the defaults has that of the first trial."""
    seen = []
    values = {11.0: 50.0, 21.0: 70.0}
    row = merges.Row(_number, {"one": (1, 2), "two": (1,)}, untuned="plain")
    result = merges.compared(_scored(values, seen), {"tuned": row})
    assert seen == ["test", "validation", "validation", "test", "test"]
    assert result["test"] == {"single": {"a": 90.0}, "plain": {"a": 50.0}, "tuned": {"a": 70.0}}
    assert result["chosen"] == {"tuned": {"one": 2, "two": 1}}
    assert set(result[TIMINGS]["merge"]) == {"plain", "tuned"}


def test_every_row_of_the_tables_has_a_merge():
    """The rows that are merged, with the untuned ones, are those of the tables apart from the single models."""
    made = merges.rows(6)
    keys = {*made, *(row.untuned for row in made.values() if row.untuned), "single"}
    assert keys == set(merges.ROWS)
