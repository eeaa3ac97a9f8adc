"""BERT of one layer in place of the encoder of the experiments, with batches of random words."""

import torch

from scripts.experiments import encoder, texts


def install(monkeypatch):
    """Replace the encoder by a BERT of one layer, and its texts by random words."""
    import transformers

    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2, "vocab_size": 23}
    config = transformers.BertConfig(
        num_hidden_layers=1, num_labels=3, max_position_embeddings=7, attn_implementation="eager", **sizes
    )
    monkeypatch.setattr(encoder, "encoder", lambda work: work)
    monkeypatch.setattr(encoder, "load", lambda *_, **__: transformers.BertForSequenceClassification(config))
    monkeypatch.setattr(
        texts, "parts", lambda *_: texts.Parts(["a", "b", "c"], [("", n % 3) for n in range(40)], [], [])
    )

    def encode(rows, length):
        generator = torch.Generator().manual_seed(len(calls))
        calls.append(rows)
        ids = torch.randint(23, (len(rows), 5), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([n for _, n in rows])}

    calls: list[object] = []
    monkeypatch.setattr(encoder, "encode", encode)
