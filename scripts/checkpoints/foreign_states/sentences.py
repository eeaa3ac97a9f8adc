"""Cases of sentence-transformers: its trainer on small encoders of transformers, with and without further modules."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from scripts.checkpoints.foreign_states.common import BETAS, STEPS, Case, Made

_SHAPES: tuple[dict[str, int], ...] = (
    {"hidden_size": 20, "intermediate_size": 28, "num_attention_heads": 5, "vocab_size": 39},
    {"hidden_size": 18, "intermediate_size": 18, "num_attention_heads": 3, "vocab_size": 41},
)
_WORDS = ("red", "green", "blue", "round", "flat", "tall", "house", "tree", "river", "stone", "bird", "road")


def _encoder(folder: Path, kind: str, shape: int) -> None:
    """Write a small encoder and its tokenizer, which splits at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    settings = {"pad_token_id": 0, "max_position_embeddings": 32, "num_hidden_layers": 2}
    AutoModel.from_config(AutoConfig.for_model(kind, **_SHAPES[shape], **settings)).save_pretrained(folder)
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *_WORDS])}
    splitter = Tokenizer(models.WordLevel(words, "[UNK]"))  # type: ignore[call-arg]
    splitter.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


def sentences(out: Path, kind: str, shape: int, dense: tuple[int, ...] = ()) -> Made:
    """Save ``checkpoint-N`` by SentenceTransformerTrainer.

    Args:
        out: Folder of the case.
        kind: ``model_type`` of the encoder.
        shape: Number of the shape.
        dense: Sizes of the Dense modules after the pooling.
    """
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
        models,
    )

    logging.disable(logging.INFO)
    _encoder(out / "start", kind, shape)
    encoder = models.Transformer(str(out / "start"))
    modules: list[Any] = [encoder, models.Pooling(_SHAPES[shape]["hidden_size"])]
    width = _SHAPES[shape]["hidden_size"]
    for size in dense:
        modules.append(models.Dense(width, size))
        width = size
    torch.manual_seed(1)
    model = SentenceTransformer(modules=modules, device="cpu")
    pairs = [(_WORDS[k % 12] + " " + _WORDS[(5 * k + 1) % 12], _WORDS[(7 * k + 3) % 12]) for k in range(4 * STEPS)]
    data = Dataset.from_dict({"anchor": [one for one, _ in pairs], "positive": [other for _, other in pairs]})
    arguments = SentenceTransformerTrainingArguments(
        str(out),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        save_steps=STEPS,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=data, loss=losses.MultipleNegativesRankingLoss(model)
    )
    trainer.train()
    live = trainer.optimizer
    while hasattr(live, "optimizer"):  # accelerate's wrapper
        live = live.optimizer
    inside: Any = encoder.auto_model if hasattr(encoder, "auto_model") else encoder.model
    truth = {name: live.state[p]["exp_avg_sq"] for name, p in inside.named_parameters() if live.state.get(p)}
    for file in (out / "start").iterdir():
        file.unlink()
    (out / "start").rmdir()
    return Made(truth, trainer="SentenceTransformerTrainer", file=f"checkpoint-{STEPS}")


def _case(kind: str, shape: int, **options: Any) -> Case:
    return Case(sentences, {"kind": kind, "shape": shape, **options}, libraries=("sentence-transformers",))


CASES = {
    "sentences_bert_0": _case("bert", 0),
    "sentences_bert_1": _case("bert", 1),
    "sentences_mpnet": _case("mpnet", 0),
    "sentences_dense": _case("bert", 0, dense=(7,)),
    "sentences_two_dense": _case("bert", 1, dense=(18, 18)),
}
