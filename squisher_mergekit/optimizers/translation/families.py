"""Table of the trainers whose parameter names are not those of Hugging Face models.

A family is chosen by the layout, or by names that no other trainer gives. The scheme within it is chosen by the
``model_type`` in the model's config, never by shapes: OLMo's norms, for example, have equal shapes at both places.
"""

import re

from squisher_mergekit.optimizers.translation.schemes import (
    Family,
    Prepare,
    Scheme,
    Table,
    Target,
    first_half,
    key_rows,
    pairs_of_keys,
    pairs_of_queries,
    query_rows,
    rows_of_groups,
    second_half,
    to,
    turned,
    value_rows,
    vocabulary_rows,
)

_LLAMA_BLOCK = "model.layers.{}."
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens", "model.norm", "lm_head"
_BEFORE_ATTENTION, _BEFORE_MLP = "input_layernorm", "post_attention_layernorm"
_Q, _K, _V, _O = (f"self_attn.{part}_proj" for part in "qkvo")
_GATE, _UP, _DOWN = (f"mlp.{part}_proj" for part in ("gate", "up", "down"))
_FUSED_QKV = (Target(_Q, (query_rows,)), Target(_K, (key_rows,)), Target(_V, (value_rows,)))
_GATE_UP = (Target(_GATE, (first_half,)), Target(_UP, (second_half,)))
_UP_GATE = (Target(_UP, (first_half,)), Target(_GATE, (second_half,)))


def _outside(embedding: str, norm: str, head: str, *padded: Prepare) -> Table:
    return {embedding: to(_EMBEDDING, *padded), norm: to(_NORM), head: to(_HEAD, *padded)}


def _torchtune(rotary: bool) -> Scheme:
    """Return torchtune's scheme; its Llamas have rotary rows in pairs, its Qwens in halves."""
    return Scheme(
        _LLAMA_BLOCK,
        _outside("tok_embeddings", "norm", "output"),
        {
            "attn.q_proj": to(_Q, *[pairs_of_queries] * rotary),
            "attn.k_proj": to(_K, *[pairs_of_keys] * rotary),
            "attn.v_proj": to(_V),
            "attn.output_proj": to(_O),
            "mlp.w1": to(_GATE),
            "mlp.w2": to(_DOWN),
            "mlp.w3": to(_UP),
            "sa_norm": to(_BEFORE_ATTENTION),
            "mlp_norm": to(_BEFORE_MLP),
        },
    )


TORCHTUNE = Family(
    "torchtune",
    re.compile(r"layers\.\d+\.(?:attn\.output_proj|sa_norm)\.\w+"),
    re.compile(r"layers\.(\d+)\.(.+)"),
    {"llama": _torchtune(True), "mistral": _torchtune(True), "qwen2": _torchtune(False)},
)

TORCHTITAN = Family(
    "torchtitan",
    re.compile(r"(?:model\.)?layers\.\d+\.attention\.(?:qkv_linear\.)?wq\.weight"),
    re.compile(r"layers\.(\d+)\.(.+)"),
    {
        "llama": Scheme(
            _LLAMA_BLOCK,
            _outside("tok_embeddings", "norm", "output"),
            {
                "attention.wq": to(_Q, pairs_of_queries),
                "attention.wk": to(_K, pairs_of_keys),
                "attention.wv": to(_V),
                "attention.wo": to(_O),
                "feed_forward.w1": to(_GATE),
                "feed_forward.w2": to(_DOWN),
                "feed_forward.w3": to(_UP),
                "attention_norm": to(_BEFORE_ATTENTION),
                "ffn_norm": to(_BEFORE_MLP),
            },
        )
    },
    rewrites=((r"^model\.", ""), (r"\.qkv_linear\.", ".")),
)


def _litgpt() -> Scheme:
    return Scheme(
        _LLAMA_BLOCK,
        {
            "lm_head": to(_HEAD, vocabulary_rows),
            "transformer.wte": to(_EMBEDDING, vocabulary_rows),
            "transformer.ln_f": to(_NORM),
        },
        {
            "norm_1": to(_BEFORE_ATTENTION),
            "attn.qkv": _FUSED_QKV,
            "attn.proj": to(_O),
            "norm_2": to(_BEFORE_MLP),
            "mlp.fc_1": to(_GATE),
            "mlp.fc_2": to(_UP),
            "mlp.proj": to(_DOWN),
        },
    )


LITGPT = Family(
    "litgpt",
    re.compile(r"transformer\.h\.\d+\.(?:attn\.qkv|norm_1)\.\w+"),
    re.compile(r"transformer\.h\.(\d+)\.(.+)"),
    dict.fromkeys(("llama", "mistral", "qwen2"), _litgpt()),
)


def _olmo_core(attention_norm: str, mlp_norm: str) -> Scheme:
    return Scheme(
        _LLAMA_BLOCK,
        _outside("embeddings", "lm_head.norm", "lm_head.w_out"),
        {
            "attention.w_q": to(_Q),
            "attention.w_k": to(_K),
            "attention.w_v": to(_V),
            "attention.w_out": to(_O),
            "attention.q_norm": to("self_attn.q_norm"),
            "attention.k_norm": to("self_attn.k_norm"),
            "attention_norm": to(attention_norm),
            "feed_forward.w1": to(_GATE),
            "feed_forward.w2": to(_DOWN),
            "feed_forward.w3": to(_UP),
            "feed_forward_norm": to(mlp_norm),
        },
    )


_REORDERED = ("post_attention_layernorm", "post_feedforward_layernorm")
REORDERED_NORMS = frozenset({"olmo2", "olmo3"})
OLMO_CORE = Family(
    "OLMo-core",
    re.compile(r"blocks\.\d+\.(?:attention\.w_q|attention_norm|feed_forward_norm)\.weight"),
    re.compile(r"blocks\.(\d+)\.(.+)"),
    {
        **dict.fromkeys(sorted(REORDERED_NORMS), _olmo_core(*_REORDERED)),
        **dict.fromkeys(("llama", "qwen3"), _olmo_core(_BEFORE_ATTENTION, _BEFORE_MLP)),
    },
)


def _olmo(norms: Table) -> Scheme:
    return Scheme(
        _LLAMA_BLOCK,
        _outside("transformer.wte", "transformer.ln_f", "transformer.ff_out"),
        {"att_proj": _FUSED_QKV, "attn_out": to(_O), "ff_proj": _UP_GATE, "ff_out": to(_DOWN), **norms},
    )


OLMO = Family(
    "OLMo",
    re.compile(r"transformer\.blocks\.\d+\.(?:att_proj|ff_proj)\.\w+"),
    re.compile(r"transformer\.blocks\.(\d+)\.(.+)"),
    {
        "olmo": _olmo({}),
        "olmo2": _olmo(
            {
                "q_norm": to("self_attn.q_norm"),
                "k_norm": to("self_attn.k_norm"),
                "attn_norm": to(_REORDERED[0]),
                "ff_norm": to(_REORDERED[1]),
            }
        ),
    },
)


def _nanotron(rotary: bool) -> Scheme:
    """Return nanotron's scheme; ``rope_interleaved`` in its config tells whether rotary rows are in pairs."""
    fused = (
        Target(_Q, (query_rows, *[pairs_of_queries] * rotary)),
        Target(_K, (key_rows, *[pairs_of_keys] * rotary)),
        Target(_V, (value_rows,)),
    )
    return Scheme(
        _LLAMA_BLOCK,
        _outside(
            "model.token_position_embeddings.pp_block.token_embedding",
            "model.final_layer_norm.pp_block",
            "model.lm_head.pp_block",
        ),
        {
            "attn.qkv_proj": fused,
            "attn.o_proj": to(_O),
            "mlp.gate_up_proj": _GATE_UP,
            "mlp.down_proj": to(_DOWN),
            "input_layernorm": to(_BEFORE_ATTENTION),
            "post_attention_layernorm": to(_BEFORE_MLP),
        },
    )


_NANOTRON_BLOCK = re.compile(r"model\.decoder\.(\d+)\.pp_block\.(.+)")
_NANOTRON_MODELS = ("llama", "qwen2")
NANOTRON = Family(
    "nanotron",
    re.compile(r"model\.decoder\.\d+\.pp_block\..+"),
    _NANOTRON_BLOCK,
    dict.fromkeys(_NANOTRON_MODELS, _nanotron(False)),
)
NANOTRON_PAIRS = Family(
    "nanotron with rope_interleaved", None, _NANOTRON_BLOCK, dict.fromkeys(_NANOTRON_MODELS, _nanotron(True))
)

MEGATRON = Family(
    "Megatron-Core",
    re.compile(r"decoder\.layers\.(?:\d+\.)?self_attention\.linear_qkv\.\w+"),
    re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)"),
    dict.fromkeys(
        ("llama", "mistral", "qwen2"),
        Scheme(
            _LLAMA_BLOCK,
            _outside("embedding.word_embeddings", "decoder.final_layernorm", "output_layer", vocabulary_rows),
            {
                "self_attention.linear_qkv.layer_norm": to(_BEFORE_ATTENTION),
                "self_attention.linear_qkv": (
                    Target(_Q, (rows_of_groups("q"),)),
                    Target(_K, (rows_of_groups("k"),)),
                    Target(_V, (rows_of_groups("v"),)),
                ),
                "self_attention.linear_proj": to(_O),
                "mlp.linear_fc1.layer_norm": to(_BEFORE_MLP),
                "mlp.linear_fc1": _GATE_UP,
                "mlp.linear_fc2": to(_DOWN),
                "input_layernorm": to(_BEFORE_ATTENTION),
                "pre_mlp_layernorm": to(_BEFORE_MLP),
            },
        ),
    ),
    rewrites=((r"\.layer_norm_(weight|bias)$", r".layer_norm.\1"),),
)

NEOX = Family(
    "GPT-NeoX",
    re.compile(r"(?:sequential\.)?\d+\.attention\.query_key_value\.weight"),
    re.compile(r"(\d+)\.(.+)"),
    {
        "gpt_neox": Scheme(
            "gpt_neox.layers.{}.",
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
            since={"embed_out.weight": "lm_head.weight"},
        )
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

NANOGPT = Family(
    "nanoGPT",
    None,
    re.compile(r"transformer\.h\.(\d+)\.(.+)"),
    {
        "gpt2": Scheme(
            "transformer.h.{}.",
            {
                "transformer.wte": to("transformer.wte", vocabulary_rows),
                "transformer.wpe": to("transformer.wpe"),
                "transformer.ln_f": to("transformer.ln_f"),
                "lm_head": to("lm_head", vocabulary_rows),
            },
            {
                **{part: to(part) for part in ("ln_1", "ln_2")},
                **{part: to(part, turned) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
            },
        )
    },
)

FAMILIES = (
    TORCHTUNE, TORCHTITAN, LITGPT, OLMO_CORE, OLMO, NANOTRON, NANOTRON_PAIRS, MEGATRON, NEOX, BLOOM, NANOGPT,
)  # fmt: skip
