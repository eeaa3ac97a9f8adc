"""Layouts of matrices on disk."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from squisher_mergekit.models.layouts import MatrixLayout, layout_by_name, layouts_on_disk
from squisher_mergekit.models.weights import Weights


def test_layouts_follow_from_the_model(tmp_path):
    """GPT-2's Conv1D is transposed, its tables of tokens and positions are embeddings; vectors have no layout."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=6, n_head=2, n_layer=1, vocab_size=7, n_positions=5)).save_pretrained(tmp_path)
    found = layouts_on_disk(Weights(tmp_path))
    assert found["transformer.wte.weight"] == found["transformer.wpe.weight"] == MatrixLayout(embedding=True)
    assert found["transformer.h.0.attn.c_attn.weight"] == MatrixLayout(transposed=True)
    assert "transformer.ln_f.weight" not in found


def test_a_name_tells_an_embedding():
    """Without a model the name decides, and a matrix counts as [out, in]."""
    assert layout_by_name("bert.embeddings.word_embeddings.weight", 2) == MatrixLayout(embedding=True)
    assert layout_by_name("model.layers.0.mlp.up_proj.weight", 2) == MatrixLayout()
