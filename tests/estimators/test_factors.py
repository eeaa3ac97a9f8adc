"""Estimated factors: equal to loops over examples, in memory and by the command, through a resume."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from squisher_mergekit import estimate_fisher, load_fisher
from squisher_mergekit.cli.main import main
from squisher_mergekit.errors import ConfigError
from squisher_mergekit.estimators.accumulator import FisherAccumulator
from tests.small_models import word_tokenizer


def _llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=12, intermediate_size=22, num_hidden_layers=2, num_attention_heads=2, vocab_size=31,
        max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _gpt2():
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(n_embd=10, n_head=2, n_layer=1, n_inner=13, vocab_size=29, n_positions=12))


def _batches(seed=3):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 29, (3, 7), generator=generator) for _ in range(2)]
    return [{"input_ids": each, "labels": each.clone()} for each in ids]


def _gradients(model, batches, by_example):
    """Return name -> gradients of the summed loss, of each example or batch, by a loop."""
    model.eval()
    found = {}
    for batch in batches:
        rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)] if by_example else [batch]
        for row in rows:
            model.zero_grad()
            logits, labels = model(input_ids=row["input_ids"]).logits[:, :-1], row["labels"][:, 1:]
            nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
            for name, parameter in model.named_parameters():
                found.setdefault(name, []).append(parameter.grad.double().clone())
    model.zero_grad()
    return found


def _wanted(gradients, block):
    whole = sum(g @ g.T for g in gradients)
    width = min(block, len(whole))
    blocks = torch.zeros(-(-len(whole) // width), width, width, dtype=torch.float64)
    for i in range(len(blocks)):
        part = whole[i * width : (i + 1) * width, i * width : (i + 1) * width]
        blocks[i, : len(part), : len(part)] = part
    return blocks


@pytest.mark.parametrize("make", [_llama, _gpt2])
@pytest.mark.parametrize("grouping", ["example", "batch"])
def test_factors_equal_a_loop_over_examples(make, grouping):
    """Both sides are the means of `G G^T` and `G^T G` over the examples, of the tensor as stored."""
    model, batches = make(), _batches()
    fisher = estimate_fisher(model, batches, grouping=grouping, factors="kron", block=6)
    slow = _gradients(model, batches, grouping == "example")
    assert "lm_head.weight" in fisher.factors.rows or make is _gpt2
    assert fisher.factors.names
    for name in fisher.factors.names:
        for side, turned in (("rows", False), ("columns", True)):
            gradients = [g.T if turned else g for g in slow[name]]
            torch.testing.assert_close(
                fisher.factors.side(side)[name].double(), _wanted(gradients, 6) / 6, rtol=1e-4, atol=1e-7
            )
    assert fisher.config.factors.source == "estimated"
    assert fisher.config.factors.num_examples == 6


def test_the_diagonal_of_a_factor_is_the_row_sum_of_the_fisher():
    """Factor and diagonal are of the same gradients."""
    fisher = estimate_fisher(_llama(), _batches(), labels="sampled", num_samples=3, factors="rows", block=5)
    for name in fisher.factors.rows:
        diagonal = fisher.factors.rows[name].diagonal(dim1=-2, dim2=-1).flatten()[: len(fisher[name])]
        torch.testing.assert_close(diagonal, fisher[name].sum(1), rtol=1e-4, atol=1e-9)


def test_rows_of_a_conv1d_are_its_outputs():
    """`rows` of a matrix kept as [in, out] is the factor over its second axis."""
    fisher = estimate_fisher(_gpt2(), _batches(), factors="rows")
    assert not len(fisher.factors.rows)
    assert "transformer.h.0.mlp.c_fc.weight" in fisher.factors.columns


def test_the_command_writes_factors(tmp_path):
    """`squisher estimate --factors` writes them and prints a line about them."""
    model = _llama()
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("the cat", "a dog ran"))
    )
    arguments = ["estimate", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"), "--task", "causal-lm"]
    arguments += ["--factors", "columns", "--block", "7", "-o", str(tmp_path / "out"), "--quiet"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "in blocks of 7" in done.output
    fisher = load_fisher(tmp_path / "out")
    name = "model.layers.0.mlp.down_proj.weight"
    diagonal = fisher.factors.columns[name].diagonal(dim1=-2, dim2=-1).flatten()[:22]
    torch.testing.assert_close(diagonal, fisher[name].sum(0), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("factors", "block"), [("kronecker", 8), ("rows", 0)])
def test_wrong_arguments_are_refused(factors, block):
    """The message names the argument."""
    with pytest.raises(ConfigError, match="factors"):
        FisherAccumulator(nn.Linear(3, 2), task="regression", factors=factors, block=block)
