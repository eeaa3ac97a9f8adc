"""Monitor of a penalty that diverges."""

import logging

import pytest
import torch
from torch import nn

from squisher_mergekit.applications.ewc.penalty import EWCPenalty, identity


def test_the_ratio_is_that_of_squared_norms(caplog):
    """The ratio is (p_1^2 + p_2^2) / (t_1^2 + t_2^2), summed over two steps and the penalised parameters."""
    model, penalty = nn.Linear(2, 1), EWCPenalty(1.0)
    nn.init.zeros_(model.weight)
    penalty.add(model, {"weight": torch.tensor([[1.0, 2.0]])})
    assert penalty.ratio() is None
    nn.init.ones_(model.weight)
    for task in ([[3.0, 4.0]], [[0.0, 1.0]]):
        model.weight.grad, model.bias.grad = torch.tensor(task), torch.tensor([100.0])
        penalty.add_gradient(model)
    assert penalty.ratio() == pytest.approx((5 + 5) / (25 + 1))
    model.weight.grad = torch.tensor([[float("inf"), 0.0]])  # an overflowed step
    penalty.add_gradient(model)
    assert penalty.ratio() == pytest.approx(10 / 26)
    assert "runs away" not in caplog.text


def test_a_penalty_that_runs_away_is_warned_of_once_a_task(caplog):
    """A ratio of 1e8 over 100 steps gives one warning per task. A ratio of 5e5 gives none."""
    model = nn.Linear(1, 1, bias=False)

    def steps(penalty, count):
        for _ in range(count):
            model.weight.grad = torch.tensor([[1e-4]])
            penalty.add_gradient(model)

    def said():
        return sum("runs away" in record.getMessage() for record in caplog.records)

    for lam, expected in ((1.0, [0, 1, 1, 2]), (0.007, [0, 0, 0, 0])):
        caplog.clear()
        penalty = EWCPenalty(lam)
        nn.init.zeros_(model.weight)
        penalty.add(model, identity(model))
        nn.init.ones_(model.weight)
        found = []
        for count in (99, 1, 150):
            steps(penalty, count)
            found.append(said())
        penalty.add(model, identity(model))
        nn.init.zeros_(model.weight)
        steps(penalty, 30)
        penalty.add(model, identity(model))
        assert [*found, said()] == expected
    assert caplog.records == [] or all(record.levelno == logging.WARNING for record in caplog.records)
