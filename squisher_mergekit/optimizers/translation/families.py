"""Table of the trainers whose parameter names are not those of Hugging Face models, with the moves of rows.

A family is chosen by the layout, or by names that no other trainer gives. The scheme within it is chosen by the
``model_type`` in the model's config, never by shapes: OLMo's norms, for example, have equal shapes at both places.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from squisher_mergekit.optimizers.translation.moves import (
    Dimensions,
    Move,
    Rows,
    halves_of_pairs,
    of_groups,
    transposed,
)

Prepare = Callable[[Dimensions, int], Move]  # from the sizes of a model and the rows of a tensor to a move


@dataclass(frozen=True)
class Target:
    """Module of a Hugging Face model that a trainer's module corresponds to.

    Attributes:
        module: Name of the module, below the block for a module of a block.
        moves: Moves from the trainer's tensor, in order.
    """

    module: str
    moves: tuple[Prepare, ...] = ()


Table = Mapping[str, tuple[Target, ...]]


@dataclass(frozen=True)
class Scheme:
    """Translation of a family's names to those of one kind of model.

    Attributes:
        block: Name of a block of the Hugging Face model, with ``{}`` for its number.
        outside: Module outside of the blocks -> targets, in the trainer's order.
        inside: Module in a block -> targets, in the trainer's order.
        since: Name of a parameter -> its name in later versions of transformers.
    """

    block: str
    outside: Table
    inside: Table
    since: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Trainer with names of its own.

    Attributes:
        name: Name of the trainer, for messages.
        mark: Pattern of names that no other trainer gives; None if only the layout tells the trainer.
        block: Pattern of the names in a block; its groups are the number of the block and the rest of the name.
        schemes: ``model_type`` of a Hugging Face config -> translation.
        first: Number of the first block.
        rewrites: Patterns in own names, and their replacement before the table is looked up.
    """

    name: str
    mark: re.Pattern[str] | None
    block: re.Pattern[str]
    schemes: Mapping[str, Scheme]
    first: int = 0
    rewrites: tuple[tuple[str, str], ...] = field(default=())


def _to(module: str, *moves: Prepare) -> tuple[Target, ...]:
    return (Target(module, moves),)


def _queries(sizes: Dimensions, _: int) -> Move:
    return Rows(0, sizes.heads * sizes.width)


def _keys(sizes: Dimensions, _: int) -> Move:
    begin = sizes.heads * sizes.width
    return Rows(begin, begin + sizes.groups * sizes.width)


def _values(sizes: Dimensions, _: int) -> Move:
    begin = (sizes.heads + sizes.groups) * sizes.width
    return Rows(begin, begin + sizes.groups * sizes.width)


def _first_half(_: Dimensions, rows: int) -> Move:
    return Rows(0, rows // 2)


def _second_half(_: Dimensions, rows: int) -> Move:
    return Rows(rows // 2, rows)


def _vocabulary(sizes: Dimensions, rows: int) -> Move:
    """Return the move that drops the rows by which the vocabulary was padded."""
    return Rows(0, min(sizes.vocabulary, rows))


def _pairs_of_queries(sizes: Dimensions, _: int) -> Move:
    return halves_of_pairs(sizes.heads, sizes.width)


def _pairs_of_keys(sizes: Dimensions, _: int) -> Move:
    return halves_of_pairs(sizes.groups, sizes.width)


def _transposed(_: Dimensions, __: int) -> Move:
    return transposed


def _group(part: str) -> Prepare:
    return lambda sizes, _: of_groups(sizes, part)


_LLAMA_BLOCK = "model.layers.{}."
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens", "model.norm", "lm_head"
_BEFORE_ATTENTION, _BEFORE_MLP = "input_layernorm", "post_attention_layernorm"
_Q, _K, _V, _O = (f"self_attn.{part}_proj" for part in "qkvo")
_GATE, _UP, _DOWN = (f"mlp.{part}_proj" for part in ("gate", "up", "down"))
_FUSED_QKV = (Target(_Q, (_queries,)), Target(_K, (_keys,)), Target(_V, (_values,)))
_GATE_UP = (Target(_GATE, (_first_half,)), Target(_UP, (_second_half,)))
_UP_GATE = (Target(_UP, (_first_half,)), Target(_GATE, (_second_half,)))


def _outside(embedding: str, norm: str, head: str, *padded: Prepare) -> Table:
    return {embedding: _to(_EMBEDDING, *padded), norm: _to(_NORM), head: _to(_HEAD, *padded)}


def _torchtune(rotary: bool) -> Scheme:
    """Return torchtune's scheme; its Llamas have rotary rows in pairs, its Qwens in halves."""
    return Scheme(
        _LLAMA_BLOCK,
        _outside("tok_embeddings", "norm", "output"),
        {
            "attn.q_proj": _to(_Q, *[_pairs_of_queries] * rotary),
            "attn.k_proj": _to(_K, *[_pairs_of_keys] * rotary),
            "attn.v_proj": _to(_V),
            "attn.output_proj": _to(_O),
            "mlp.w1": _to(_GATE),
            "mlp.w2": _to(_DOWN),
            "mlp.w3": _to(_UP),
            "sa_norm": _to(_BEFORE_ATTENTION),
            "mlp_norm": _to(_BEFORE_MLP),
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
                "attention.wq": _to(_Q, _pairs_of_queries),
                "attention.wk": _to(_K, _pairs_of_keys),
                "attention.wv": _to(_V),
                "attention.wo": _to(_O),
                "feed_forward.w1": _to(_GATE),
                "feed_forward.w2": _to(_DOWN),
                "feed_forward.w3": _to(_UP),
                "attention_norm": _to(_BEFORE_ATTENTION),
                "ffn_norm": _to(_BEFORE_MLP),
            },
        )
    },
    rewrites=((r"^model\.", ""), (r"\.qkv_linear\.", ".")),
)


def _litgpt() -> Scheme:
    return Scheme(
        _LLAMA_BLOCK,
        {
            "lm_head": _to(_HEAD, _vocabulary),
            "transformer.wte": _to(_EMBEDDING, _vocabulary),
            "transformer.ln_f": _to(_NORM),
        },
        {
            "norm_1": _to(_BEFORE_ATTENTION),
            "attn.qkv": _FUSED_QKV,
            "attn.proj": _to(_O),
            "norm_2": _to(_BEFORE_MLP),
            "mlp.fc_1": _to(_GATE),
            "mlp.fc_2": _to(_UP),
            "mlp.proj": _to(_DOWN),
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
            "attention.w_q": _to(_Q),
            "attention.w_k": _to(_K),
            "attention.w_v": _to(_V),
            "attention.w_out": _to(_O),
            "attention.q_norm": _to("self_attn.q_norm"),
            "attention.k_norm": _to("self_attn.k_norm"),
            "attention_norm": _to(attention_norm),
            "feed_forward.w1": _to(_GATE),
            "feed_forward.w2": _to(_DOWN),
            "feed_forward.w3": _to(_UP),
            "feed_forward_norm": _to(mlp_norm),
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
        {"att_proj": _FUSED_QKV, "attn_out": _to(_O), "ff_proj": _UP_GATE, "ff_out": _to(_DOWN), **norms},
    )


OLMO = Family(
    "OLMo",
    re.compile(r"transformer\.blocks\.\d+\.(?:att_proj|ff_proj)\.\w+"),
    re.compile(r"transformer\.blocks\.(\d+)\.(.+)"),
    {
        "olmo": _olmo({}),
        "olmo2": _olmo(
            {
                "q_norm": _to("self_attn.q_norm"),
                "k_norm": _to("self_attn.k_norm"),
                "attn_norm": _to(_REORDERED[0]),
                "ff_norm": _to(_REORDERED[1]),
            }
        ),
    },
)


def _nanotron(rotary: bool) -> Scheme:
    """Return nanotron's scheme; ``rope_interleaved`` in its config tells whether rotary rows are in pairs."""
    fused = (
        Target(_Q, (_queries, *[_pairs_of_queries] * rotary)),
        Target(_K, (_keys, *[_pairs_of_keys] * rotary)),
        Target(_V, (_values,)),
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
            "attn.o_proj": _to(_O),
            "mlp.gate_up_proj": _GATE_UP,
            "mlp.down_proj": _to(_DOWN),
            "input_layernorm": _to(_BEFORE_ATTENTION),
            "post_attention_layernorm": _to(_BEFORE_MLP),
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
            _outside("embedding.word_embeddings", "decoder.final_layernorm", "output_layer", _vocabulary),
            {
                "self_attention.linear_qkv.layer_norm": _to(_BEFORE_ATTENTION),
                "self_attention.linear_qkv": (
                    Target(_Q, (_group("q"),)),
                    Target(_K, (_group("k"),)),
                    Target(_V, (_group("v"),)),
                ),
                "self_attention.linear_proj": _to(_O),
                "mlp.linear_fc1.layer_norm": _to(_BEFORE_MLP),
                "mlp.linear_fc1": _GATE_UP,
                "mlp.linear_fc2": _to(_DOWN),
                "input_layernorm": _to(_BEFORE_ATTENTION),
                "pre_mlp_layernorm": _to(_BEFORE_MLP),
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
                "word_embeddings": _to("gpt_neox.embed_in"),
                "norm": _to("gpt_neox.final_layer_norm"),
                "final_linear": _to("embed_out"),
            },
            {
                "input_layernorm": _to("input_layernorm"),
                "post_attention_layernorm": _to("post_attention_layernorm"),
                "attention.query_key_value": _to("attention.query_key_value"),
                "attention.dense": _to("attention.dense"),
                "mlp.dense_h_to_4h": _to("mlp.dense_h_to_4h"),
                "mlp.dense_4h_to_h": _to("mlp.dense_4h_to_h"),
                "mlp.linear1": _to("mlp.dense_h_to_4h"),
                "mlp.linear2": _to("mlp.dense_4h_to_h"),
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
                "word_embeddings": _to("transformer.word_embeddings", _vocabulary),
                "word_embeddings.norm": _to("transformer.word_embeddings_layernorm"),
                "final": _to("transformer.ln_f"),
            },
            {part: _to(part) for part in _BLOOM_PARTS},
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
                "transformer.wte": _to("transformer.wte", _vocabulary),
                "transformer.wpe": _to("transformer.wpe"),
                "transformer.ln_f": _to("transformer.ln_f"),
                "lm_head": _to("lm_head", _vocabulary),
            },
            {
                **{part: _to(part) for part in ("ln_1", "ln_2")},
                **{part: _to(part, _transposed) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
            },
        )
    },
)

FAMILIES = (
    TORCHTUNE, TORCHTITAN, LITGPT, OLMO_CORE, OLMO, NANOTRON, NANOTRON_PAIRS, MEGATRON, NEOX, BLOOM, NANOGPT,
)  # fmt: skip
