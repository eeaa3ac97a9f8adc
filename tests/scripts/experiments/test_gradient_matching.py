"""Experiment on gradient matching: merges of models with a few weights, and notes on its numbers."""

import pytest
import torch

from scripts.experiments import gradient_matching as ubgm

NAMES = ("base", "products", "yelp")
TEXTS = {"base": 960, "products": 640, "yelp": 320}


@pytest.fixture
def models():
    """Return a base and two models of 2 x 3 weights, with Fishers of both kinds."""
    found = object.__new__(ubgm.Models)
    generator = torch.Generator().manual_seed(3)
    found._weights = {name: {"w": torch.randn(2, 3, generator=generator)} for name in NAMES}
    found._fishers = {
        kind: {name: {"w": torch.rand(2, 3, generator=generator)} for name in NAMES} for kind in ("squisher", "fisher")
    }
    found._texts = TEXTS
    return found


def _doubles(models, kind):
    weights = {name: tensors["w"].double() for name, tensors in models._weights.items()}
    fishers = {name: TEXTS[name] * tensors["w"].double() for name, tensors in models._fishers[kind].items()}
    return weights, fishers


@pytest.mark.parametrize("kind", ["squisher", "fisher"])
def test_gradient_matching_takes_alpha_the_prior_and_the_texts(models, kind):
    """alpha, the prior and the number of texts enter the term of every domain.

    The sum has the base once, and its mean scales the prior.
    """
    alpha, prior = 0.75, 0.1
    theta, fisher = _doubles(models, kind)
    total = fisher["base"] + alpha * (fisher["products"] + fisher["yelp"])
    d = prior * total.mean()
    steps = sum((fisher["base"] + d + fisher[name]) * (theta[name] - theta["base"]) for name in NAMES[1:])
    expected = theta["base"] + alpha * steps / (total + d)
    merged = models.merged(f"ubgm-{kind}", (alpha, prior))["w"].double()
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["squisher", "fisher"])
def test_fisher_merging_leaves_the_base_out(models, kind):
    """Fisher merging is Equation 13 over the domains, weighted by their texts, without the base."""
    theta, fisher = _doubles(models, kind)
    total = fisher["products"] + fisher["yelp"]
    expected = (fisher["products"] * theta["products"] + fisher["yelp"] * theta["yelp"]) / total
    merged = models.merged(f"squisher-{kind}", (1.0, 0.0))["w"].double()
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


def test_the_rows_without_a_fisher(models):
    """The rows are the base, the mean of the domains, and alpha times the sum of their differences to the base."""
    theta, _ = _doubles(models, "fisher")
    assert torch.equal(models.merged("base", (1.0, 0.0))["w"].double(), theta["base"])
    linear = models.merged("linear", (1.0, 0.0))["w"].double()
    torch.testing.assert_close(linear, (theta["products"] + theta["yelp"]) / 2, rtol=1e-5, atol=1e-6)
    arithmetic = models.merged("task_arithmetic", (0.5, 0.0))["w"].double()
    expected = theta["base"] + 0.5 * (theta["products"] + theta["yelp"] - 2 * theta["base"])
    torch.testing.assert_close(arithmetic, expected, rtol=1e-5, atol=1e-6)


def _report(ubgm_squisher):
    """Return a report of two seeds, where products counts twice in the mean weighted by size."""

    def result(seed):
        test = {row: {"products": 80.0 + seed, "yelp": 74.0} for row in ubgm.ROWS}
        test["ubgm-squisher"] = {"products": ubgm_squisher, "yelp": ubgm_squisher}
        chosen = {row: {"alpha": 0.5, "prior": 0.1 * seed} for row in ("ubgm-fisher", "ubgm-squisher")}
        chosen["task_arithmetic"] = {"alpha": 0.25, "prior": 0.0}
        return {"test": test, "chosen": chosen, "texts": {"products": 400, "yelp": 200}}

    return {"cells": [{"settings": {"seed": seed}, "result": result(seed)} for seed in range(2)]}


def test_the_table_agrees_with_the_cells():
    """The table has both means, computed by hand, and the choices."""
    (table,) = ubgm.tables(_report(79.0))
    rows = dict(table.rows)
    assert rows["plain average (`linear`)"] == ["77.2 ± 0.4", "78.3 ± 0.5", "80.5 ± 0.7", "74.0 ± 0.0"]
    assert rows["`ubgm_squisher` with Squishers"] == ["79.0 ± 0.0", "79.0 ± 0.0", "79.0 ± 0.0", "79.0 ± 0.0"]
    assert "`ubgm_squisher` with Squishers +1.8 ± 0.4 (above 0 in 2 of 2 seeds)" in table.notes[0]
    assert "`ubgm_squisher` with Squishers 0.5/0, 0.5/0.1" in table.notes[0]
    assert "`task_arithmetic` 0.25/0, 0.25/0" in table.notes[0]
    assert "2 of 6 are at an end of the grid: alpha 0.25 or 1, prior 1" in table.notes[0]
    assert "an alpha of 1/2." in table.notes[1]


def test_a_missing_order_has_a_note():
    """A note names the kinds of Fisher that are not above the average on every seed. An equal row counts."""
    assert "on every seed with the Fisher." in ubgm.tables(_report(79.0))[0].notes[2]
    assert "on every seed with the Fisher and the Squisher." in ubgm.tables(_report(77.2))[0].notes[2]


def test_the_picture_is_a_small_png():
    """The picture is one small PNG for the README."""
    pytest.importorskip("matplotlib")
    (name, data), *rest = ubgm.pictures(_report(79.0)).items()
    assert (name, rest) == ("gradient_matching.png", [])
    assert data.startswith(b"\x89PNG")
    assert len(data) < 120_000
