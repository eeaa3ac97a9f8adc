"""Layouts of matrices on disk."""

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import GPT2Config, GPT2LMHeadModel

from squisher_mergekit.models.layouts import MatrixLayout, layout_by_name, layouts_in_memory, layouts_on_disk
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


def test_wrapped_inner_modules_keep_their_layout():
    """A block that was compiled or checkpointed by itself has the layouts of the plain one."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=6, n_head=2, n_layer=2, vocab_size=7, n_positions=5))
    plain = layouts_in_memory(model)
    model.transformer.h[0] = torch.compile(model.transformer.h[0], backend="eager")
    model.transformer.h[1].mlp = checkpoint_wrapper(model.transformer.h[1].mlp)
    assert layouts_in_memory(model) == plain
    assert plain["transformer.h.0.attn.c_attn.weight"] == MatrixLayout(transposed=True)
