"""Fisher with the names in memory."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, MixtralConfig, MixtralForCausalLM

from squisher_mergekit import estimate_fisher
from squisher_mergekit.errors import MismatchError
from squisher_mergekit.fisher.by_parameter import by_parameter
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import write_fisher
from squisher_mergekit.tensors.safetensors import MemoryStore

MIXTRAL = MixtralConfig(
    vocab_size=37, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, head_dim=6,
)  # fmt: skip
BERT = BertConfig(
    vocab_size=37, hidden_size=14, intermediate_size=11, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=17,
)  # fmt: skip


def _squisher(tensors, **config):
    given = {"estimator": "squisher", "statistic": "ema", "steps": 1, "optimizer": {"beta2": 0.75}} | config
    return Fisher(MemoryStore(tensors), FisherConfig(**given))


def test_packed_experts_come_back_to_their_places(tmp_path):
    """A Fisher saved with the names of single experts becomes that of the packed parameter, to the bit."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MIXTRAL)
    ids = torch.randint(0, 37, (3, 5))
    fisher = estimate_fisher(model, [{"input_ids": ids, "labels": ids}])
    write_fisher(fisher, tmp_path / "fisher")
    live = {name: p.grad for name, p in model.named_parameters()}
    assert all(gradient is None for gradient in live.values())
    found = by_parameter(model, read_fisher(tmp_path / "fisher"), "raw")
    again = by_parameter(model, fisher, "raw")
    assert found.keys() == live.keys()
    assert any(name.endswith("experts.gate_up_proj") for name in found)
    for name, tensor in found.items():
        assert torch.equal(tensor, again[name])
        assert tensor.shape == dict(model.named_parameters())[name].shape


def test_packed_experts_of_a_fisher_on_another_device_stay_there():
    """The Fisher of a model on a GPU is in its memory."""
    model = MixtralForCausalLM(MIXTRAL)
    ids = torch.randint(0, 37, (3, 5))
    fisher = estimate_fisher(model, [{"input_ids": ids, "labels": ids}])
    there = Fisher(MemoryStore({name: fisher[name].to("meta") for name in fisher}), fisher.config, fisher.aliases)
    found = by_parameter(model, there, "raw")
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(tensor.is_meta for tensor in found.values())


def test_tensors_come_at_the_scale_asked_for():
    """The ``debiased`` scale undoes the start at 0 of a moving average; ``raw`` does not."""
    model = nn.Linear(3, 1)
    fisher = _squisher({"weight": torch.tensor([[1.0, 2.0, 4.0]])})
    assert by_parameter(model, fisher)["weight"].tolist() == [[4.0, 8.0, 16.0]]
    assert by_parameter(model, fisher, "raw")["weight"].tolist() == [[1.0, 2.0, 4.0]]


@pytest.mark.parametrize("model", [nn.Linear(3, 1), BertForSequenceClassification(BERT)])
@pytest.mark.parametrize("kind", [dict, _squisher])
def test_an_unknown_name_is_refused(model, kind):
    """An unknown name in a mapping or in a Fisher is refused, also among known names."""
    name, parameter = list(model.named_parameters())[-1]
    fisher = kind({name: torch.ones_like(parameter.data), "strange.weight": torch.ones(2)})
    with pytest.raises(MismatchError, match=r"but strange.weight in memory is none of"):
        by_parameter(model, fisher)


@pytest.mark.parametrize("kind", [dict, _squisher])
def test_another_shape_is_refused(kind):
    """The error names both shapes."""
    with pytest.raises(MismatchError, match=r"shape \[1, 3\], but memory has \[3, 1\]"):
        by_parameter(nn.Linear(3, 1), kind({"weight": torch.ones(3, 1)}))


def test_a_shape_is_refused_where_names_are_converted():
    """Another shape is refused for a model of transformers as well."""
    model = MixtralForCausalLM(MIXTRAL)
    fisher = _squisher({"lm_head.weight": torch.ones(36, 16)})
    with pytest.raises(MismatchError, match=r"shape \[37, 16\]"):
        by_parameter(model, fisher)
