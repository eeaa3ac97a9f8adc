"""Roles of weights."""

import pytest
import torch
import transformers
from torch import nn

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.models import roles
from squisher_mergekit.models.weights import open_weights
from tests.estimators.models import make

# Output layers and ordinary matrices of transformers models, by names on disk.
KNOWN = {
    "bert": ({"classifier.weight"}, {"bert.pooler.dense.weight", "bert.encoder.layer.1.attention.self.key.weight"}),
    "distilbert": ({"classifier.weight", "pre_classifier.weight"}, {"distilbert.transformer.layer.0.ffn.lin1.weight"}),
    "llama": ({"lm_head.weight"}, {"model.layers.0.mlp.up_proj.weight"}),
    "llama-tied": (set(), {"model.layers.0.mlp.up_proj.weight"}),
    "gpt2": (set(), {"transformer.h.1.mlp.c_fc.weight"}),
    "mixtral": ({"lm_head.weight"}, {"model.layers.0.block_sparse_moe.experts.2.w1.weight"}),
    "t5": (set(), {"encoder.block.0.layer.0.SelfAttention.q.weight"}),
    "bart": (set(), {"model.decoder.layers.0.fc1.weight"}),
    "vit": ({"classifier.weight"}, {"vit.encoder.layer.0.intermediate.dense.weight"}),
    "roberta": (
        {"classifier.dense.weight", "classifier.out_proj.weight"},
        {"roberta.encoder.layer.0.output.dense.weight"},
    ),
}
EMBEDDINGS = {
    "bert": {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")},
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "llama-tied": {"model.embed_tokens.weight"},
    "t5": {
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    },
}


@pytest.mark.parametrize("name", KNOWN)
def test_roles_of_models_of_transformers(name, tmp_path):
    """Heads are outputs, tables are embeddings, vectors are norms or biases, and other weights have no role."""
    make(name).save_pretrained(tmp_path)
    weights = open_weights(tmp_path)
    found = roles.roles_on_disk(weights)
    outputs, plain = KNOWN[name]
    assert {key for key, role in found.items() if role == "output"} == outputs
    assert plain <= weights.infos.keys() - found.keys()
    for key, info in weights.infos.items():
        if len(info.shape) < 2:
            assert found[key] == ("bias" if key.endswith("bias") else "norm")
    if name in EMBEDDINGS:
        assert {key for key, role in found.items() if role == "embedding"} == EMBEDDINGS[name]


@pytest.mark.parametrize("name", ["bert", "llama", "llama-tied", "mixtral", "vit"])
def test_names_give_the_roles_without_a_config(name, tmp_path):
    """Names alone give the same roles for the usual architectures."""
    make(name).save_pretrained(tmp_path)
    by_config = roles.roles_on_disk(open_weights(tmp_path))
    (tmp_path / "config.json").unlink()
    assert roles.roles_on_disk(open_weights(tmp_path)) == by_config


def test_roles_of_any_other_model():
    """The output is the last module with a matrix, even with a vector after it."""
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(7, 3),
            "conv": nn.Conv2d(3, 5, 3),
            "bn": nn.BatchNorm2d(5),
            "fc": nn.Linear(5, 11),
            "scale": nn.LayerNorm(11),
        }
    )
    assert roles.roles_of(model) == {
        "table.weight": "embedding",
        "conv.bias": "bias",
        "bn.weight": "norm",
        "bn.bias": "bias",
        "fc.weight": "output",
        "fc.bias": "bias",
        "scale.weight": "norm",
        "scale.bias": "bias",
    }


def test_ignored_weights_have_a_reason():
    """A weight is ignored by its role, its name or a pattern. The first reason counts."""
    names = ["a.weight", "a.bias", "b.weight", "head.weight"]
    found = roles.ignored({"a.bias": "bias", "head.weight": "output"}, names, ["b.weight", r"^a\."])
    assert found == {
        "a.bias": "bias",
        "head.weight": "output",
        "b.weight": "matches b.weight",
        "a.weight": r"matches ^a\.",
    }
    assert roles.ignored({"a.bias": "bias"}, names, skip=()) == {}


@pytest.mark.parametrize(("pattern", "message"), [("(", "found '\\('"), ("nothing", "'nothing' matches none")])
def test_an_unused_pattern_is_refused(pattern, message):
    """An invalid pattern, or one without a match, is refused as a likely typing error."""
    with pytest.raises(ConfigError, match=message):
        roles.ignored({}, ["a.weight"], [pattern])


def test_shared_experts_are_no_embeddings():
    """The matrices of the experts that see every token have no role, by config and by name."""
    config = transformers.Qwen2MoeConfig(
        vocab_size=19, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        moe_intermediate_size=5, shared_expert_intermediate_size=7, num_experts=3, intermediate_size=11,
    )  # fmt: skip
    with torch.device("meta"):
        found = roles.roles_of(transformers.Qwen2MoeForCausalLM(config))
    assert {name for name, role in found.items() if role == "embedding"} == {"model.embed_tokens.weight"}
    for name in ("shared_expert.gate_proj", "shared_experts.up_proj", "shared_mlp.input_linear", "shared_expert_gate"):
        assert roles.role_by_name(f"model.layers.0.mlp.{name}.weight", 2) is None


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("embed_out.weight", "output"),
        ("gpt_neox.embed_in.weight", "embedding"),
        ("shared.weight", "embedding"),
        ("model.shared.weight", "embedding"),
        ("decoder.embed_positions.weight", "embedding"),
        ("vit.embeddings.patch_embeddings.projection.weight", "embedding"),
    ],
)
def test_names_tell_embeddings_from_outputs(name, role):
    """GPT-NeoX calls its output layer embed_out; tables are called shared or embed."""
    assert roles.role_by_name(name, 2) == role
