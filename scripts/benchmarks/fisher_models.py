"""Models and batches of the benchmark ``fisher``: random weights and random data without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Batch = Any  # (inputs, labels), or keyword arguments of a Hugging Face model


def mlp() -> tuple[nn.Module, Batch]:
    """Return a perceptron of 784-400-400-10 and a batch of 256."""
    model = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))
    return model, (torch.randn(256, 784), torch.randint(10, (256,)))


def cnn() -> tuple[nn.Module, Batch]:
    """Return three convolutions with two batch norms and a batch of 64 images of 32 x 32."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return model, (torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))


def bert(vocab: int) -> tuple[nn.Module, Batch]:
    """Return a BERT of four layers of 256 without dropout (Opacus needs train mode) and a batch of 16 x 64 tokens."""
    config = transformers.BertConfig(
        vocab_size=vocab,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    batch = {"input_ids": torch.randint(3, vocab, (16, 64)), "labels": torch.randint(3, (16,))}
    return transformers.BertForSequenceClassification(config), batch


def llama(layers: int, hidden: int, vocab: int, tied: bool = False) -> tuple[nn.Module, Batch]:
    """Return a causal language model and a batch of 8 x 64 tokens."""
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    ids = torch.randint(vocab, (8, 64))
    return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


MODELS: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "mlp": mlp,
    "cnn": cnn,
    "bert": lambda: bert(30522),
    "bert-small-vocab": lambda: bert(1000),
    "llama": lambda: llama(4, 256, 8192),
    "llama-tied": lambda: llama(4, 256, 8192, tied=True),
    "llama-large": lambda: llama(6, 512, 32000),
}


def build(name: str, device: str) -> tuple[nn.Module, Batch]:
    """Return a model in eval mode and its batch on a device, from a fixed seed."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    return model.to(device).eval(), convert(batch, lambda part: part.to(device))


def convert(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return a batch with a function applied to each tensor."""
    if isinstance(batch, tuple):
        return tuple(change(part) for part in batch)
    return {key: change(part) for key, part in batch.items()}


def one(batch: Batch, n: int) -> Batch:
    """Return one example as a batch."""
    return convert(batch, lambda part: part[n : n + 1])


def labels_of(batch: Batch) -> Tensor:
    """Return the labels of a batch, one for each example or token."""
    found: Tensor = batch[1] if isinstance(batch, tuple) else batch["labels"]
    return found


def relabelled(batch: Batch, labels: Tensor) -> Batch:
    """Return a batch with other labels."""
    return (batch[0], labels) if isinstance(batch, tuple) else {**batch, "labels": labels}


def task_of(batch: Batch) -> str:
    """Return the name of the task in this package."""
    return "causal-lm" if labels_of(batch).ndim == 2 else "classification"


def terms(model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
    """Run a model and return logits ``(M, C)`` and targets ``(M)``.

    M is the number of examples; for a language model, of all tokens but the first of each sequence.
    """
    if isinstance(batch, tuple):
        return model(batch[0]), batch[1]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits, labels = model(**inputs).logits, batch["labels"]
    if labels.ndim == 2:
        return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return logits, labels
