"""Modules that FSDP1 wraps: the root with everything outside of the layers, then each layer."""

import pytest
import torch
import transformers

from squisher_mergekit.optimizers.translation.flat_units import units_of


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 5}),
        ("gpt2", {"n_embd": 8, "n_head": 2, "n_positions": 4, "vocab_size": 5}),
    ],
)
def test_every_parameter_is_in_one_unit(kind, sizes):
    """Positions count through the model's order, and a layer's parameters are in no other unit."""
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(kind, num_hidden_layers=3, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config)
    units = units_of(model)
    order = [name for name, _ in model.named_parameters()]
    assert len(units) == 4
    assert sorted(number for unit in units for number, _ in unit) == list(range(len(order)))
    assert all(order[number] == info.name for unit in units for number, info in unit)
    for k, unit in enumerate(units):
        assert all(
            (f".{k - 1}." in info.name) if k else all(f".{n}." not in info.name for n in range(3)) for _, info in unit
        )
