"""Arguments, numbers and Fishers that the EWC penalty refuses."""

import copy

import pytest
import torch
from torch import nn

from squisher_mergekit.applications.ewc.penalty import EWCPenalty
from squisher_mergekit.errors import ConfigError, MismatchError, ValuesError
from tests.applications.ewc.tasks import (
    EMA,
    as_fisher,
    gradients_of,
    random_fisher,
    small_model,
)


@pytest.mark.parametrize(("scale", "needed"), [("batch", "examples_per_step"), ("dataset", "num_examples")])
def test_a_number_that_is_not_known_is_asked_for(scale, needed):
    """The error names the unknown number and the way to give it. Nothing is added."""
    model, penalty = small_model(), EWCPenalty(1.0, scale=scale)
    fisher = as_fisher(random_fisher(model, 1), estimator="squisher", **EMA)
    with pytest.raises(ConfigError, match=rf"scale {scale} needs {needed}.*add\(..., {needed}=N\)"):
        penalty.add(model, fisher)
    with pytest.raises(ConfigError, match=f"{needed} must be a positive number, found -1"):
        penalty.add(model, fisher, **{needed: -1})
    assert penalty.tasks == 0


def test_a_parameter_that_is_gone_or_has_grown_is_refused_until_dropped():
    """A missing or larger parameter is refused by name, with the cure.

    After the cure the other parameters are penalised as before.
    """
    model, penalty = small_model(), EWCPenalty(1.0)
    fisher = random_fisher(model, 1)
    penalty.add(model, fisher)
    grown = copy.deepcopy(model)
    grown[2] = nn.Linear(7, 11)
    with pytest.raises(MismatchError, match=r"2.weight in the shape \[5, 7\] .* \[11, 7\].*penalty.drop\('2.weight'\)"):
        penalty.add_gradient(grown)
    assert all(p.grad is None for p in grown.parameters())
    gone = nn.Sequential(model[0])
    with pytest.raises(MismatchError, match=r"has no 2\.weight"):
        penalty(gone)
    penalty.drop("2.weight", "2.bias")
    assert set(gradients_of(grown, penalty)) == {"0.weight", "0.bias"}
    assert penalty(gone).item() == 0.0
    with pytest.raises(MismatchError, match=r"'2\.bias' is not"):
        penalty.drop("2.bias")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lam": -1.0}, "lambda must be finite and not negative, found -1.0"),
        ({"lam": float("nan")}, "found nan"),
        ({"lam": float("inf")}, "found inf"),
        ({"lam": 1.0, "mode": "offline"}, "found 'offline'"),
        ({"lam": 1.0, "gamma": 1.5}, "gamma must be from 0 to 1, found 1.5"),
        ({"lam": 1.0, "gamma": float("nan")}, "found nan"),
        ({"lam": 1.0, "scale": "data"}, "found 'data'"),
        ({"lam": 1.0, "scale": 0.0}, "found 0.0"),
        ({"lam": 1.0, "scale": float("nan")}, "found nan"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    """An argument out of range raises a ValueError with one line."""
    with pytest.raises(ValueError, match=message) as caught:
        EWCPenalty(**arguments)
    assert "\n" not in str(caught.value)


def test_an_overflow_is_refused_and_nothing_changes():
    """A product of 1e30 and 1e9 exceeds float32 and is refused, also with a second task.

    The penalty keeps its value.
    """
    model, penalty = small_model(), EWCPenalty(1e30)
    small, large = ({"0.bias": torch.full((7,), value)} for value in (2e8, 1e9))
    with pytest.raises(ConfigError, match=r"lambda is 1e\+30 and the largest entry of 0.bias 1e\+09; give a smaller"):
        penalty.add(model, large)
    assert (penalty.tasks, penalty(model).item()) == (0, 0.0)
    penalty.add(model, small)
    with pytest.raises(ConfigError, match=r"0.bias 4e\+08"):
        penalty.add(model, small)
    assert penalty.tasks == 1
    with pytest.raises(ConfigError, match="smaller lambda"):
        EWCPenalty(1e35).load_state_dict(penalty.state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-9])
def test_a_bad_fisher_is_refused(value):
    """A Fisher with NaN, infinite or negative entries is refused, and nothing is added."""
    model, penalty = small_model(), EWCPenalty(1.0)
    fisher = random_fisher(model, 1)
    fisher["2.bias"][3] = value
    with pytest.raises(ValuesError, match=r"2\.bias in memory has 1 \w+ of 5 entries"):
        penalty.add(model, fisher)
    assert penalty.tasks == 0


@pytest.mark.parametrize(
    ("fisher", "message"),
    [
        ({}, "at least one parameter"),
        ({"strange": torch.ones(3)}, "strange in memory is none of"),
        ({"0.weight": torch.ones(3, 7)}, r"0.weight must have the weight's shape \[7, 3\]"),
    ],
)
def test_a_fisher_of_another_model_is_refused(fisher, message):
    """A Fisher of another model is refused with the first name or shape that does not fit."""
    with pytest.raises(MismatchError, match=message):
        EWCPenalty(1.0).add(small_model(), fisher)
