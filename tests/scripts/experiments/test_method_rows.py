"""Merge methods of ``merge_methods``: their settings, and the search among them."""

import pytest
import torch
from mergekit.merge_methods import registry

from scripts.experiments import method_rows, structure_merges
from scripts.experiments.method_rows import BUDGET, MERGEKIT, ROWS, Method
from scripts.experiments.runner import TIMINGS
from tests.scripts.experiments.structure_models import few_models

OURS = {"squisher", "ubgm_squisher"}


def test_every_method_of_mergekit_that_merges_six_models_is_there():
    """A registered method is in the table, or its contract allows fewer models."""
    for method in registry.registered_methods():
        contract = method.spec.contract
        most = [most for most in (contract.max_inputs, contract.max_non_base) if most is not None]
        applies = not most or min(most) >= 6
        assert (method.spec.name in ROWS) == applies or method.spec.name in OURS, method.spec.name


@pytest.mark.parametrize("count", [2, 6])
def test_no_method_has_more_settings_than_the_budget(count):
    """Settings are different ones, and each row of the table has a method."""
    table = method_rows.methods(count, 0)
    assert set(ROWS) == {"single", *table}
    for name, method in table.items():
        texts = [structure_merges.shown(one) for one in method.settings]
        assert len(texts) == len(set(texts)) <= BUDGET, name


@pytest.mark.parametrize(("row", "power"), [("ota", 0.5), ("change", 1.0)])
def test_the_options_of_squisher_are_the_masked_merge(row, power):
    """OTA-merge by the options of this package is its transcription."""
    models = few_models(4, out=16, width=12)
    found = method_rows.methods(4, 0)[row].make(models, density=0.2)
    wanted = structure_merges.masked(models, 0.2, power)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_draws_depend_on_the_seed_alone():
    """A method that draws entries repeats for a seed, differs for another, and leaves torch's generator as it was."""
    models = few_models(3, out=16, width=12)
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    for name in ("dare_ties", "della"):
        first, again, other = (
            method_rows.methods(3, seed)[name].make(models, density=0.5)["x.encoder.a"] for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_method_merges():
    """The first and the last setting of each method give finite weights; no two methods are alike."""
    models = few_models(3, out=24, width=20)
    table = method_rows.methods(3, 0, widest=24)
    found = {}
    for name, method in table.items():
        for setting in (method.settings[-1], method.settings[0]):
            options = {key: value for key, value in setting.items() if key != "lambda"}
            found[name] = method.make(models, **options)["x.encoder.a"]
            assert torch.isfinite(found[name]).all(), name
    # Where every step is larger than epsilon, RAM is the average, as task arithmetic with weight 1/M is.
    different = [name for name in found if name not in ("task_arithmetic", "ram", "ramplus_tl")]
    for place, name in enumerate(different):
        assert all(not torch.equal(found[name], found[other]) for other in different[:place]), name


def _scored(values, seen):
    def score(weights, part):
        seen.append(part)
        return {"a": values[round(float(weights["w"]), 3)] if weights else 90.0}

    return structure_merges.Models({"w": torch.tensor(0.0)}, {"a": {}}, {"a": {}}, score)


def test_the_first_of_the_best_settings_is_chosen_and_test_texts_are_read_once():
    """Settings that differ in lambda share a merge; only the chosen one is scored on test texts."""
    seen, made = [], []

    def make(models, step):
        made.append(step)
        return {"w": torch.tensor(float(step))}

    settings = method_rows.grid(step=(1, 2), **{"lambda": (1.0, 0.5)})
    values = {1.0: 60.0, 0.5: 70.0, 2.0: 70.0}
    result = method_rows.compared(_scored(values, seen), {"x": Method(make, settings, MERGEKIT)})
    assert made == [1, 2]
    assert seen == ["test", *["validation"] * 4, "test"]
    assert result["chosen"] == {"x": {"step": 1, "lambda": 0.5}}
    assert result["validation"] == {"x": 70.0}
    assert list(result["searched"]["x"].values()) == [60.0, 70.0, 70.0, 60.0]
    assert set(result[TIMINGS]["merge"]) == {"x"}
