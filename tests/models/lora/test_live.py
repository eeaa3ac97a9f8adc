"""LoRA in training: names of its weights on disk, with and without files of the base."""

import peft
import pytest
import torch
from torch import nn

from squisher_mergekit.models.lora.live import live_lora
from tests.small_models import MODELS

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call


def _adapted(model, **lora):
    return peft.get_peft_model(model, peft.LoraConfig(**({"r": 2} | lora)))


def test_a_base_in_memory_alone_has_the_names_of_its_class():
    """Without files, names follow from the config; tied weights are aliases."""
    lora = live_lora(_adapted(MODELS["qwen2"](), target_modules=["o_proj"]))
    assert set(lora.layers) == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(2)}
    assert lora.base is None
    assert "model.embed_tokens.weight" in lora.names
    assert lora.aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_base_on_disk_is_found_by_the_config_of_the_adapter(tmp_path):
    """Names are those in the files, and weights that are held whole have theirs."""
    MODELS["bert"]().save_pretrained(tmp_path)
    base = type(MODELS["bert"]()).from_pretrained(tmp_path)
    lora = live_lora(_adapted(base, target_modules=["value"], modules_to_save=["classifier"]))
    assert lora.base is not None
    assert set(lora.names) == set(lora.base.infos)
    assert {*lora.layers, *lora.whole} <= set(lora.names)
    assert set(lora.whole) == {"classifier.weight", "classifier.bias"}


def test_a_base_that_is_none_of_transformers_has_its_own_names():
    """The names are those of its state dict; biases that are trained count as held whole."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    lora = live_lora(_adapted(model, target_modules=["1"], bias="lora_only"))
    assert (set(lora.layers), set(lora.whole)) == ({"1.weight"}, {"1.bias"})


def test_frozen_factors_leave_the_other_as_the_reference():
    """A layer with a frozen B has A as its reference; a layer with both frozen is left out."""
    model = _adapted(MODELS["llama"](), target_modules=["q_proj"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.requires_grad_(False)
            torch.nn.init.normal_(parameter)
        if "layers.1" in name:
            parameter.requires_grad_(False)
    layers = live_lora(model).layers
    assert set(layers) == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 2)}
    assert all(layer.reference is layer.a for layer in layers.values())
