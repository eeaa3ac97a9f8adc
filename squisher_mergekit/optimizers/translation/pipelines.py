"""Trainers that number the layers of a pipeline in the names: GPT-NeoX, and Megatron-DeepSpeed for BLOOM."""

import re

from squisher_mergekit.optimizers.translation.schemes import (
    Family,
    Scheme,
    Target,
    rows_of_heads,
    to,
    vocabulary_rows,
)

NEOX_BLOCK, NEOX_HEAD = "gpt_neox.layers.{}.", {"embed_out.weight": "lm_head.weight"}

_NEOX_LLAMA = Scheme(
    "model.layers.{}.",
    {
        "word_embeddings": to("model.embed_tokens", vocabulary_rows),
        "norm": to("model.norm"),
        "final_linear": to("lm_head", vocabulary_rows),
    },
    {
        "input_layernorm": to("input_layernorm"),
        "post_attention_layernorm": to("post_attention_layernorm"),
        "attention.query_key_value": tuple(Target(f"self_attn.{part}_proj", (rows_of_heads(part),)) for part in "qkv"),
        "attention.dense": to("self_attn.o_proj"),
        "mlp.w1": to("mlp.gate_proj"),
        "mlp.w2": to("mlp.down_proj"),
        "mlp.w3": to("mlp.up_proj"),
    },
)
NEOX = Family(
    "GPT-NeoX",
    re.compile(r"(?:sequential\.)?\d+\.attention\.query_key_value\.weight"),
    re.compile(r"(\d+)\.(.+)"),
    {
        "gpt_neox": Scheme(
            NEOX_BLOCK,
            {
                "word_embeddings": to("gpt_neox.embed_in"),
                "norm": to("gpt_neox.final_layer_norm"),
                "final_linear": to("embed_out"),
            },
            {
                "input_layernorm": to("input_layernorm"),
                "post_attention_layernorm": to("post_attention_layernorm"),
                "attention.query_key_value": to("attention.query_key_value"),
                "attention.dense": to("attention.dense"),
                "mlp.dense_h_to_4h": to("mlp.dense_h_to_4h"),
                "mlp.dense_4h_to_h": to("mlp.dense_4h_to_h"),
                "mlp.linear1": to("mlp.dense_h_to_4h"),
                "mlp.linear2": to("mlp.dense_4h_to_h"),
            },
            since=NEOX_HEAD,
        ),
        **dict.fromkeys(("llama", "mistral"), _NEOX_LLAMA),
    },
    first=2,
    rewrites=(
        (r"^sequential\.", ""),
        (r"^tied_modules\.embed\.", ""),
        (r"^\d+\.(word_embeddings|norm|final_linear)\.", r"\1."),
    ),
)

_BLOOM_PARTS = (
    "input_layernorm", "self_attention.query_key_value", "self_attention.dense", "post_attention_layernorm",
    "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",
)  # fmt: skip
BLOOM = Family(
    "Megatron-DeepSpeed",
    re.compile(r"\d+\.self_attention\.query_key_value\.weight"),
    re.compile(r"(\d+)\.(.+\..+)"),
    {
        "bloom": Scheme(
            "transformer.h.{}.",
            {
                "word_embeddings": to("transformer.word_embeddings", vocabulary_rows),
                "word_embeddings.norm": to("transformer.word_embeddings_layernorm"),
                "final": to("transformer.ln_f"),
            },
            {part: to(part) for part in _BLOOM_PARTS},
        )
    },
    first=3,
    rewrites=(
        (r"^tied_modules\.embed\.", ""),
        (r"^\d+\.word_embeddings\.", "word_embeddings."),
        (r"^\d+\.(weight|bias)$", r"final.\1"),
    ),
)
