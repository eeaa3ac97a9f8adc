"""Rank correlation of lifted and recorded Fishers: the truth of the hooks, a cell and its lines, on tiny models."""

import math

import torch
from torch import nn

from scripts.experiments import lora_rank, structure_adapters
from tests.scripts.experiments import tiny_encoder

SETTINGS = {
    **lora_rank.EXPERIMENT.quick[0],
    "steps": 3,
    "adapter": {"r": 2, "lora_alpha": 4, "lr": 1e-2, "head_lr": 1e-3},
}


def test_the_truth_is_the_squared_gradient_of_the_weights(monkeypatch, tmp_path):
    """The hooks form the gradient that autograd gives a weight which requires one."""
    tiny_encoder.install(monkeypatch)
    adapted = structure_adapters.with_adapter(lora_rank.encoder.load(tmp_path), 2, 4).train()
    truth = lora_rank.SquaredGradients(adapted)
    weights = {
        f"{name.removeprefix(lora_rank.BASE)}.weight": module.base_layer.weight.requires_grad_(True)
        for name, module in adapted.named_modules()
        if isinstance(getattr(module, "base_layer", None), nn.Linear)
    }
    adapted(input_ids=torch.arange(10).view(2, 5), labels=torch.tensor([0, 2])).loss.backward()
    truth.add(0.5)
    averages = truth.averages()
    assert set(averages) == set(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(averages[name], (weight.grad / 2).square(), rtol=1e-3, atol=1e-12)


def test_a_cell_compares_three_fishers(monkeypatch, tmp_path):
    """Each weight has a correlation and a scale of each Fisher; the means of the truth have its scale."""
    tiny_encoder.install(monkeypatch)
    result = lora_rank.cell(SETTINGS, tmp_path)
    assert len(result["weights"]) == 6
    for weight in result["weights"].values():
        assert set(weight) == set(lora_rank.KINDS)
        assert all(-1 <= found["spearman"] <= 1 and math.isfinite(found["log_scale"]) for found in weight.values())
        assert abs(weight["rows x columns"]["log_scale"]) < 1e-5
    (table,) = lora_rank.tables({"cells": [{"result": result}] * 3})
    assert [row for row, _ in table.rows] == list(lora_rank.KINDS)
