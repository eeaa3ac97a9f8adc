"""Small models of every architecture, their batches, and the comparison with the oracle."""

import copy
import tempfile
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

from tests.estimators import oracle

SIZE, LENGTH = 5, 7


def _ids(vocab, seed=0, size=SIZE, length=LENGTH):
    return torch.randint(3, vocab, (size, length), generator=torch.Generator().manual_seed(seed))


def _masked(ids):
    """Return an attention mask that pads the ends of some sequences."""
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    mask[3, 2:] = 0
    return mask


SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 29}
LLAMA = SMALL | {"intermediate_size": 19, "num_key_value_heads": 3, "max_position_embeddings": 17}
BERT = SMALL | {"intermediate_size": 19, "max_position_embeddings": 17, "num_labels": 3}

DISTIL = {"vocab_size": 29, "dim": 12, "n_layers": 2, "n_heads": 3, "hidden_dim": 19, "num_labels": 3}
GPT2 = {"vocab_size": 29, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 17}
MIXTRAL = LLAMA | {"num_local_experts": 3, "num_experts_per_tok": 2}
T5 = {"vocab_size": 29, "d_model": 12, "d_kv": 4, "d_ff": 19, "num_layers": 2, "num_heads": 3}
BART = {"vocab_size": 29, "d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 17}
BART |= {f"{part}_attention_heads": 3 for part in ("encoder", "decoder")}
BART |= {f"{part}_ffn_dim": 19 for part in ("encoder", "decoder")}
QWEN_MOE = LLAMA | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
EAGER = {"experts_implementation": "eager"}
# The fast implementation of experts requires rows of a multiple of 16 bytes.
FAST = {"hidden_size": 24, "intermediate_size": 20, "experts_implementation": "grouped_mm"}
VIT = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 19, "num_labels": 3}
MAMBA = {"vocab_size": 29, "hidden_size": 12, "num_hidden_layers": 2, "state_size": 4}

# name -> task, configuration, class and settings
MODELS = {
    "bert": ("classification", tf.BertConfig, tf.BertForSequenceClassification, BERT),
    "roberta": ("classification", tf.RobertaConfig, tf.RobertaForSequenceClassification, BERT | {"pad_token_id": 1}),
    "albert": ("classification", tf.AlbertConfig, tf.AlbertForSequenceClassification, BERT | {"embedding_size": 8}),
    "distilbert": ("classification", tf.DistilBertConfig, tf.DistilBertForSequenceClassification, DISTIL),
    "bert-mlm": ("masked-lm", tf.BertConfig, tf.BertForMaskedLM, BERT),
    "gpt2": ("causal-lm", tf.GPT2Config, tf.GPT2LMHeadModel, GPT2),
    "llama": ("causal-lm", tf.LlamaConfig, tf.LlamaForCausalLM, LLAMA),
    "llama-tied": ("causal-lm", tf.LlamaConfig, tf.LlamaForCausalLM, LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("causal-lm", tf.Qwen3Config, tf.Qwen3ForCausalLM, LLAMA | {"head_dim": 4}),
    "gemma": ("causal-lm", tf.GemmaConfig, tf.GemmaForCausalLM, LLAMA | {"head_dim": 4}),
    "mistral": ("causal-lm", tf.MistralConfig, tf.MistralForCausalLM, LLAMA),
    "mixtral": ("causal-lm", tf.MixtralConfig, tf.MixtralForCausalLM, MIXTRAL | EAGER),
    "mixtral-grouped": ("causal-lm", tf.MixtralConfig, tf.MixtralForCausalLM, MIXTRAL | FAST),
    "qwen2-moe": ("causal-lm", tf.Qwen2MoeConfig, tf.Qwen2MoeForCausalLM, QWEN_MOE | EAGER),
    "qwen3-moe": ("causal-lm", tf.Qwen3MoeConfig, tf.Qwen3MoeForCausalLM, QWEN_MOE | EAGER | {"head_dim": 4}),
    "phi3": ("causal-lm", tf.Phi3Config, tf.Phi3ForCausalLM, LLAMA | {"pad_token_id": 0}),
    "mamba": ("causal-lm", tf.MambaConfig, tf.MambaForCausalLM, MAMBA),
    "t5": ("seq2seq", tf.T5Config, tf.T5ForConditionalGeneration, T5 | {"decoder_start_token_id": 0}),
    "bart": ("seq2seq", tf.BartConfig, tf.BartForConditionalGeneration, BART),
    "vit": ("image", tf.ViTConfig, tf.ViTForImageClassification, VIT | {"image_size": 6, "patch_size": 2}),
    "clip-text": ("classification", tf.CLIPTextConfig, None, SMALL | {"intermediate_size": 19, "eos_token_id": 28}),
}


class TextTower(nn.Module):
    """CLIP's text model with a classifier and transformers' classifier output."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tower, self.head = tf.CLIPTextModel(config), nn.Linear(12, 3)

    def forward(self, input_ids, attention_mask):
        found = self.tower(input_ids=input_ids, attention_mask=attention_mask)
        return tf.modeling_outputs.SequenceClassifierOutput(logits=self.head(found.pooler_output))


def make(name):
    """Return a model with random weights."""
    _, config, kind, settings = MODELS[name]
    return (kind or TextTower)(config(**settings))


def task_of(name):
    """Return the task of a model."""
    task = MODELS[name][0]
    return "classification" if task == "image" else task


def batch_of(task, size=SIZE, seed=0):
    """Return a batch for a task, with some padded sequences."""
    classes = torch.tensor([0, 2, 1, 1, 0])[:size]
    if task == "image":
        pixels = torch.randn(size, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        return {"pixel_values": pixels, "labels": classes}
    ids = _ids(29, seed, size)
    mask = _masked(ids) if size == SIZE else torch.ones_like(ids)
    if task == "classification":
        labels = classes
    elif task == "masked-lm":
        labels = torch.where((ids + torch.arange(LENGTH)) % 3 == 0, ids, -100)
    elif task == "seq2seq":
        labels = _ids(29, seed + 1, size, 4)
        labels[1, 2:] = -100
    else:
        labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_of(task, kind):
    """Return the oracle's loss function."""
    return oracle.classes(kind) if task in ("classification", "image") else oracle.tokens(task, kind)


def assert_close(fisher, expected, rtol=1e-5, model=None):
    """Assert that each error is small relative to the largest entry of the tensor, or to 1e-12 of that of the model."""
    if model is not None and hasattr(model, "save_pretrained"):
        expected = _as_saved(model, expected)
    assert set(fisher) == set(expected)
    largest = max(float(tensor.max()) for tensor in expected.values())
    for name, tensor in expected.items():
        bound = max(float(tensor.max()), 1e-12 * largest) * rtol
        assert float((fisher[name].double() - tensor).abs().max()) <= bound, name


def _as_saved(model, tensors):
    """Return tensors with the names and shapes that save_pretrained writes."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[name])
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        saved = load_file(Path(folder) / "model.safetensors")
    others = {name for name, _ in model.named_buffers()}
    others |= {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in saved.items() if name not in others}
