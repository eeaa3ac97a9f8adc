"""Sides of a model's matrices, and their names on disk."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.fisher.config import FactorsInfo, FisherConfig
from squisher_mergekit.fisher.factors.sides import attach, check_settings, names_on_disk, sides_in_memory
from squisher_mergekit.fisher.mapping import Fisher


def test_embeddings_have_no_side_and_conv1d_is_turned():
    """`rows` are outputs: the second axis of a Conv1D."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=6, n_head=2, n_layer=1, n_inner=11, vocab_size=17, n_positions=8))
    sides = sides_in_memory(model, "rows")
    assert sides["transformer.h.0.attn.c_attn.weight"] == ("columns",)
    assert not any("wte" in name or "wpe" in name for name in sides)
    assert set(sides_in_memory(model, "kron").values()) == {("rows", "columns")}


def test_factors_of_matrices_that_the_fisher_lacks_are_left_out():
    """Only the names of the Fisher get factors."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    fisher = Fisher({"1.weight": torch.ones(2, 5)}, FisherConfig(estimator="empirical", statistic="mean"))
    assert names_on_disk(model, fisher) == {"1.weight": "1.weight"}
    moments = {"rows": {"0.weight": torch.ones(1, 5, 5), "1.weight": torch.ones(1, 2, 2)}, "columns": {}}
    found = attach(model, fisher, moments, FactorsInfo(source="recorded", statistic="ema"))
    assert found.factors.names == ["1.weight"]


@pytest.mark.parametrize(("factors", "block"), [("row", 1), ("kron", 0), ("rows", True), ("rows", "8")])
def test_other_settings_are_refused(factors, block):
    """The message has the setting."""
    with pytest.raises(ConfigError, match="factors"):
        check_settings(factors, block)
