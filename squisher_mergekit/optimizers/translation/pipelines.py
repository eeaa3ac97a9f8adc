"""Trainers that number the layers of a pipeline in the names: GPT-NeoX, and Megatron-DeepSpeed for BLOOM."""

import re

from squisher_mergekit.optimizers.translation.schemes import (
    Family,
    Scheme,
    Table,
    Target,
    half_of_ranks,
    rows_of_heads,
    rows_of_ranks,
    to,
    vocabulary_rows,
)

NEOX_BLOCK, NEOX_HEAD = "gpt_neox.layers.{}.", {"embed_out.weight": "lm_head.weight"}

_PARTS = tuple((f"self_attn.{part}_proj", part) for part in "qkv")


def _neox_llama(query_key_value: tuple[Target, ...], mlp: Table) -> Scheme:
    return Scheme(
        "model.layers.{}.",
        {
            "word_embeddings": to("model.embed_tokens", vocabulary_rows),
            "norm": to("model.norm"),
            "final_linear": to("lm_head", vocabulary_rows),
        },
        {
            "input_layernorm": to("input_layernorm"),
            "post_attention_layernorm": to("post_attention_layernorm"),
            "attention.query_key_value": query_key_value,
            "attention.dense": to("self_attn.o_proj"),
            **mlp,
        },
    )


_BY_HEAD = tuple(Target(name, (rows_of_heads(part),)) for name, part in _PARTS)
_BY_RANK = tuple(Target(name, (rows_of_ranks(part),)) for name, part in _PARTS)
_THREE_MATRICES = {"mlp.w1": to("mlp.gate_proj"), "mlp.w2": to("mlp.down_proj"), "mlp.w3": to("mlp.up_proj")}
# The first half of each rank's rows is multiplied by the activation of the second half.
_TWO_MATRICES = {
    "mlp.linear1": (Target("mlp.up_proj", (half_of_ranks(0),)), Target("mlp.gate_proj", (half_of_ranks(1),))),
    "mlp.linear2": to("mlp.down_proj"),
}
_NEOX_REWRITES = (
    (r"^sequential\.", ""),
    (r"^tied_modules\.embed\.", ""),
    (r"^\d+\.(word_embeddings|norm|final_linear)\.", r"\1."),
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
        **dict.fromkeys(("llama", "mistral"), _neox_llama(_BY_HEAD, {**_THREE_MATRICES, **_TWO_MATRICES})),
    },
    first=2,
    rewrites=_NEOX_REWRITES,
)
# With grouped queries, GPT-NeoX fused the rows of each query head until November 2024, and those of each rank since
# then. The MLP had three matrices until September 2024, so that two of them are of either time.
NEOX_BY_RANK = Family(
    "GPT-NeoX since November 2024",
    None,
    NEOX.block,
    dict.fromkeys(("llama", "mistral"), _neox_llama(_BY_RANK, _TWO_MATRICES)),
    first=2,
    rewrites=_NEOX_REWRITES,
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
