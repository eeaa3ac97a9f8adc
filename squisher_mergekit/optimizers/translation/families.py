"""Table of the trainers whose parameter names are not those of Hugging Face models.

A family is chosen by the layout, or by names that no other trainer gives. The scheme within it is chosen by the
``model_type`` in the model's config, never by shapes: OLMo's norms, for example, have equal shapes at both places.
"""

import re
from dataclasses import replace

from squisher_mergekit.optimizers.translation.pipelines import BLOOM, NEOX, NEOX_BLOCK, NEOX_BY_RANK, NEOX_HEAD
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
    part_of,
    query_rows,
    rows_in_groups,
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
_REORDERED = ("post_attention_layernorm", "post_feedforward_layernorm")
_BEFORE_FEEDFORWARD = "pre_feedforward_layernorm"
_Q, _K, _V, _O = (f"self_attn.{part}_proj" for part in "qkvo")
_GATE, _UP, _DOWN = (f"mlp.{part}_proj" for part in ("gate", "up", "down"))
_Q_NORM, _K_NORM = "self_attn.q_norm", "self_attn.k_norm"
_FUSED_QKV = (Target(_Q, (query_rows,)), Target(_K, (key_rows,)), Target(_V, (value_rows,)))
_QKV_IN_GROUPS = tuple(Target(name, (rows_of_groups(part),)) for name, part in ((_Q, "q"), (_K, "k"), (_V, "v")))
_GATE_UP = (Target(_GATE, (first_half,)), Target(_UP, (second_half,)))
_UP_GATE = (Target(_UP, (first_half,)), Target(_GATE, (second_half,)))


def _outside(embedding: str, norm: str, head: str, *padded: Prepare) -> Table:
    return {embedding: to(_EMBEDDING, *padded), norm: to(_NORM), head: to(_HEAD, *padded)}


def _torchtune(rotary: bool, changes: Table | None = None, norm: str = "norm") -> Scheme:
    """Return torchtune's scheme; its Llamas and Gemmas have rotary rows in pairs, its Qwens and Phis in halves."""
    inside = {
        "attn.q_proj": to(_Q, *[pairs_of_queries] * rotary),
        "attn.k_proj": to(_K, *[pairs_of_keys] * rotary),
        "attn.v_proj": to(_V),
        "attn.output_proj": to(_O),
        "attn.q_norm": to(_Q_NORM),
        "attn.k_norm": to(_K_NORM),
        "mlp.w1": to(_GATE),
        "mlp.w2": to(_DOWN),
        "mlp.w3": to(_UP),
        "sa_norm": to(_BEFORE_ATTENTION),
        "mlp_norm": to(_BEFORE_MLP),
    }
    return Scheme(_LLAMA_BLOCK, _outside("tok_embeddings", norm, "output"), {**inside, **(changes or {})})


_PARTS_OF_PHI3 = {
    "attn.q_proj": part_of("self_attn.qkv_proj", query_rows),
    "attn.k_proj": part_of("self_attn.qkv_proj", key_rows),
    "attn.v_proj": part_of("self_attn.qkv_proj", value_rows),
    "mlp.w1": part_of("mlp.gate_up_proj", first_half),
    "mlp.w3": part_of("mlp.gate_up_proj", second_half),
}
# torchtune's own conversion exchanges the norms before and after the MLP, and so names the weights that it exports.
_NORMS_OF_GEMMA2 = {
    "mlp_norm": to(_REORDERED[1]),
    "sa_scale": to(_REORDERED[0]),
    "mlp_scale": to(_BEFORE_FEEDFORWARD),
}
TORCHTUNE = Family(
    "torchtune",
    re.compile(r"layers\.\d+\.(?:attn\.output_proj|sa_norm)\.\w+"),
    re.compile(r"layers\.(\d+)\.(.+)"),
    {
        **dict.fromkeys(("llama", "mistral", "gemma"), _torchtune(True)),
        **dict.fromkeys(("qwen2", "qwen3"), _torchtune(False)),
        "gemma2": _torchtune(True, _NORMS_OF_GEMMA2, "norm.rms_norm"),
        "phi3": _torchtune(False, _PARTS_OF_PHI3),
    },
)


def _torchtitan(rotary: bool) -> Scheme:
    """Return torchtitan's scheme; its Llamas have rotary rows in pairs, its Qwens in halves.

    Version 0.3 fuses queries, keys and values. The weights are split when they are saved, the optimizer's state is not.
    """
    queries, keys = [pairs_of_queries] * rotary, [pairs_of_keys] * rotary
    return Scheme(
        _LLAMA_BLOCK,
        {**_outside("tok_embeddings", "norm", "output"), "lm_head": to(_HEAD)},
        {
            "attention.wqkv": (
                Target(_Q, (rows_of_groups("q"), *queries)),
                Target(_K, (rows_of_groups("k"), *keys)),
                Target(_V, (rows_of_groups("v"),)),
            ),
            "attention.wq": to(_Q, *queries),
            "attention.wk": to(_K, *keys),
            "attention.wv": to(_V),
            "attention.wo": to(_O),
            "attention.q_norm": to(_Q_NORM),
            "attention.k_norm": to(_K_NORM),
            "feed_forward.w1": to(_GATE),
            "feed_forward.w2": to(_DOWN),
            "feed_forward.w3": to(_UP),
            "attention_norm": to(_BEFORE_ATTENTION),
            "ffn_norm": to(_BEFORE_MLP),
        },
    )


TORCHTITAN = Family(
    "torchtitan",
    re.compile(r"(?:model\.)?layers\.\d+\.attention\.(?:qkv_linear\.)?wq(?:kv)?\.weight"),
    re.compile(r"layers\.(\d+)\.(.+)"),
    {"llama": _torchtitan(True), "qwen3": _torchtitan(False)},
    rewrites=((r"^model\.", ""), (r"\.qkv_linear\.", ".")),
)


_LITGPT_QKV = {
    "attn.attn": _QKV_IN_GROUPS,  # before version 0.5
    "attn.qkv": _FUSED_QKV,
    "attn.proj": to(_O),
    "attn.norm_q": to(_Q_NORM),
    "attn.norm_k": to(_K_NORM),
}
_LITGPT_MLP = {"mlp.fc_1": to(_GATE), "mlp.fc_2": to(_UP), "mlp.proj": to(_DOWN)}


def _litgpt(inside: Table, block: str = _LLAMA_BLOCK, outside: tuple[str, str, str] = ("", "", "")) -> Scheme:
    """Return litgpt's scheme, with the head before the embeddings; ``outside`` has the names of another model."""
    embedding, norm, head = outside if outside[0] else (_EMBEDDING, _NORM, _HEAD)
    modules = {
        "lm_head": to(head, vocabulary_rows),
        "transformer.wte": to(embedding, vocabulary_rows),
        "transformer.ln_f": to(norm),
    }
    return Scheme(block, modules, inside)


_LITGPT_LLAMA = _litgpt({"norm_1": to(_BEFORE_ATTENTION), **_LITGPT_QKV, "norm_2": to(_BEFORE_MLP), **_LITGPT_MLP})
_LITGPT_GEMMA2 = _litgpt(
    {
        "norm_1": to(_BEFORE_ATTENTION),
        **_LITGPT_QKV,
        "post_attention_norm": to(_REORDERED[0]),
        "norm_2": to(_BEFORE_FEEDFORWARD),
        **_LITGPT_MLP,
        "post_mlp_norm": to(_REORDERED[1]),
    }
)
_LITGPT_PHI3 = _litgpt(
    {
        "norm_1": to(_BEFORE_ATTENTION),
        "attn.qkv": to("self_attn.qkv_proj"),
        "attn.proj": to(_O),
        "norm_2": to(_BEFORE_MLP),
        "mlp.fc_1": part_of("mlp.gate_up_proj", first_half),
        "mlp.fc_2": part_of("mlp.gate_up_proj", second_half),
        "mlp.proj": to(_DOWN),
    }
)
_LITGPT_PYTHIA = replace(
    _litgpt(
        {
            "norm_1": to("input_layernorm"),
            "attn.qkv": to("attention.query_key_value", rows_in_groups),
            "attn.proj": to("attention.dense"),
            "norm_2": to("post_attention_layernorm"),
            "mlp.fc": to("mlp.dense_h_to_4h"),
            "mlp.proj": to("mlp.dense_4h_to_h"),
        },
        NEOX_BLOCK,
        ("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
    ),
    since=NEOX_HEAD,
)
LITGPT = Family(
    "litgpt",
    re.compile(r"transformer\.h\.\d+\.(?:attn\.qkv|norm_1)\.\w+"),
    re.compile(r"transformer\.h\.(\d+)\.(.+)"),
    {
        **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LITGPT_LLAMA),
        **dict.fromkeys(("gemma2", "gemma3_text"), _LITGPT_GEMMA2),
        "phi3": _LITGPT_PHI3,
        "gpt_neox": _LITGPT_PYTHIA,
    },
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
            "attention.q_norm": to(_Q_NORM),
            "attention.k_norm": to(_K_NORM),
            "attention_norm": to(attention_norm),
            "feed_forward.w1": to(_GATE),
            "feed_forward.w2": to(_DOWN),
            "feed_forward.w3": to(_UP),
            "feed_forward_norm": to(mlp_norm),
        },
    )


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
                "q_norm": to(_Q_NORM),
                "k_norm": to(_K_NORM),
                "attn_norm": to(_REORDERED[0]),
                "ff_norm": to(_REORDERED[1]),
            }
        ),
    },
)


def _nanotron(rotary: bool) -> Scheme:
    """Return nanotron's scheme; its ``model_config.json`` tells whether rotary rows are in pairs."""
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

_MEGATRON = Scheme(
    _LLAMA_BLOCK,
    _outside("embedding.word_embeddings", "decoder.final_layernorm", "output_layer", vocabulary_rows),
    {
        "self_attention.linear_qkv.layer_norm": to(_BEFORE_ATTENTION),
        "self_attention.linear_qkv": _QKV_IN_GROUPS,
        "self_attention.q_layernorm": to(_Q_NORM),
        "self_attention.k_layernorm": to(_K_NORM),
        "self_attention.linear_proj": to(_O),
        "mlp.linear_fc1.layer_norm": to(_BEFORE_MLP),
        "mlp.linear_fc1": _GATE_UP,
        "mlp.linear_fc1.w": to(_GATE),  # with singleton_local_shards, each half has a key
        "mlp.linear_fc1.v": to(_UP),
        "mlp.linear_fc2": to(_DOWN),
        "input_layernorm": to(_BEFORE_ATTENTION),
        "pre_mlp_layernorm": to(_BEFORE_MLP),
    },
)
MEGATRON = Family(
    "Megatron-Core",
    re.compile(r"(?:module\.|model\.)*decoder\.layers\.(?:\d+\.)?self_attention\.linear_qkv\.\w+"),
    re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)"),
    dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _MEGATRON),
    rewrites=(
        (r"^(?:module\.|model\.)+", ""),  # NeMo's
        (r"\.layer_norm_(weight|bias)$", r".layer_norm.\1"),
        (r"\.(weight|bias)_([wv])$", r".\2.\1"),
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
    TORCHTUNE, TORCHTITAN, LITGPT, OLMO_CORE, OLMO, NANOTRON, NANOTRON_PAIRS, MEGATRON, NEOX,
    NEOX_BY_RANK, BLOOM, NANOGPT,
)  # fmt: skip
