"""The kind of layer that a parameter's name tells."""

import pytest

from squisher_mergekit.fisher.summary import kind_of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.mlp.up_proj.weight", "mlp.up_proj"),
        ("model.layers.31.self_attn.q_proj.bias", "self_attn.q_proj"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("transformer.h.0.attn.c_attn.weight", "attn.c_attn"),
        ("model.layers.2.block_sparse_moe.experts.7.w1.weight", "block_sparse_moe.experts.w1"),
        ("bert.embeddings.LayerNorm.bias", "embeddings.LayerNorm"),
        ("0.weight", "0.weight"),
        ("weight", "weight"),
        ("scale", "scale"),
    ],
)
def test_kinds(name, kind):
    """Layer numbers, expert numbers, weight and bias go; what a name has left is its kind, and never nothing."""
    assert kind_of(name) == kind


def test_layers_of_one_kind_share_it():
    """The same place in every layer, and its weight and its bias, is one kind."""
    names = [f"model.layers.{i}.mlp.fc.{part}" for i in range(12) for part in ("weight", "bias")]
    assert {kind_of(name) for name in names} == {"mlp.fc"}
