"""Fishers of every kind and architecture, held against the oracle."""

import pytest
import torch
import transformers as tf
from torch import nn

from squisher_mergekit.estimators.estimate import estimate_fisher
from tests.estimators import oracle

SIZE, LENGTH = 5, 7


def _ids(vocab, seed=0, size=SIZE, length=LENGTH):
    return torch.randint(3, vocab, (size, length), generator=torch.Generator().manual_seed(seed))


def _masked(ids):
    """Pad the ends of some sequences."""
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    mask[3, 2:] = 0
    return mask


SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 29}
LLAMA = SMALL | {"intermediate_size": 19, "num_key_value_heads": 3, "max_position_embeddings": 17}
BERT = SMALL | {"intermediate_size": 19, "max_position_embeddings": 17, "num_labels": 3}

MODELS = {
    "bert": ("classification", lambda: tf.BertForSequenceClassification(tf.BertConfig(**BERT))),
    "roberta": ("classification", lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**BERT, pad_token_id=1))),
    "albert": (
        "classification",
        lambda: tf.AlbertForSequenceClassification(tf.AlbertConfig(**BERT, embedding_size=8)),
    ),
    "distilbert": (
        "classification",
        lambda: tf.DistilBertForSequenceClassification(
            tf.DistilBertConfig(vocab_size=29, dim=12, n_layers=2, n_heads=3, hidden_dim=19, num_labels=3)
        ),
    ),
    "bert-mlm": ("masked-lm", lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT))),
    "gpt2": (
        "causal-lm",
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=29, n_embd=12, n_layer=2, n_head=3, n_positions=17)),
    ),
    "llama": ("causal-lm", lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA))),
    "llama-tied": ("causal-lm", lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, tie_word_embeddings=True))),
    "qwen3": ("causal-lm", lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLAMA, head_dim=4))),
    "gemma": ("causal-lm", lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**LLAMA, head_dim=4))),
    "mistral": ("causal-lm", lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLAMA))),
    "mixtral": (
        "causal-lm",
        lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager")),
    ),
    "phi3": ("causal-lm", lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**LLAMA, pad_token_id=0))),
    "t5": (
        "seq2seq",
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=29, d_model=12, d_kv=4, d_ff=19, num_layers=2, num_heads=3, decoder_start_token_id=0)
        ),
    ),
    "bart": (
        "seq2seq",
        lambda: tf.BartForConditionalGeneration(
            tf.BartConfig(
                vocab_size=29, d_model=12, encoder_layers=1, decoder_layers=1, encoder_attention_heads=3,
                decoder_attention_heads=3, encoder_ffn_dim=19, decoder_ffn_dim=19, max_position_embeddings=17,
            )
        ),
    ),
}  # fmt: skip


def _batch(task, size=SIZE):
    ids = _ids(29, size=size)
    mask = _masked(ids) if size == SIZE else torch.ones_like(ids)
    if task == "classification":
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1, 1, 0])[:size]}
    if task == "masked-lm":
        labels = torch.where((ids + torch.arange(LENGTH)) % 3 == 0, ids, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if task == "seq2seq":
        labels = _ids(29, 1, size, 4)
        labels[1, 2:] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _loss(task, kind):
    return oracle.classes(kind) if task == "classification" else oracle.tokens(task, kind)


def _assert_close(fisher, expected, rtol=1e-5):
    assert set(fisher) == set(expected)
    largest = max(float(tensor.max()) for tensor in expected.values())
    for name, tensor in expected.items():
        bound = max(float(tensor.max()), 1e-12 * largest) * rtol
        assert float((fisher[name].double() - tensor).abs().max()) <= bound, name


@pytest.mark.parametrize("labels", ["true", "predicted"])
@pytest.mark.parametrize("name", MODELS)
def test_language_models_of_every_kind_match_the_oracle(name, labels):
    """Example by example in float64, with padding, ties, shared layers and experts: within 1e-5 of the largest entry."""
    torch.manual_seed(1)
    task, make = MODELS[name]
    model = make()
    batch = _batch(task)
    fisher = estimate_fisher(model.double(), [batch], labels, statistic="sum")
    _assert_close(fisher, oracle.fisher(model, [batch], _loss(task, labels), "example"))
