"""Small models, their second moments, and the same second moments under the names of other trainers.

Each ``to_NAME`` turns second moments with the names of Hugging Face into those of a trainer, by the inverse of what the
package does, written on its own.
"""

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = [
    {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": 31},
    {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 40, "vocab_size": 16},
    {"hidden_size": 12, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 20, "head_dim": 8,
     "vocab_size": 23},
]  # fmt: skip


class World:
    """Model on disk in ``folder``, with random weights and second moments by name."""

    def __init__(self, folder, kind="llama", layers=2, seed=0, **sizes):
        import transformers

        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(kind, num_hidden_layers=layers, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder)
        self.folder, self.config, self.layers = folder, config, layers
        self.order = [name for name, _ in model.named_parameters()]
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.moments = {name: torch.rand(p.shape) for name, p in self.weights.items()}
        for name in self.weights:
            self.weights[name] = torch.randn(self.weights[name].shape)
        save_file(self.weights, folder / "model.safetensors")
        self.heads = getattr(config, "num_attention_heads", 0)
        self.groups = getattr(config, "num_key_value_heads", None) or self.heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads

    def bare(self, to):
        """Write the config alone to another folder."""
        to.mkdir(parents=True, exist_ok=True)
        (to / "config.json").write_text((self.folder / "config.json").read_text())
        return to


def pairs(tensor, heads):
    """Put the rotary rows of each head into pairs: the first with the first of the second half, and so on."""
    width = tensor.shape[0] // heads
    rows = [
        head * width + half * (width // 2) + k for head in range(heads) for k in range(width // 2) for half in (0, 1)
    ]
    return tensor[rows]


def renamed(tensors, *replacements):
    """Replace parts of the names, in order."""
    result = {}
    for name, tensor in tensors.items():
        for old, new in replacements:
            name = name.replace(old, new)
        result[name] = tensor
    return result


def to_torchtune(world, tensors, rotary=True):
    """Return torchtune's names, in the order of its models; a Gemma 2 has the norms of its MLP exchanged."""
    tensors = split(tensors, "self_attn.qkv_proj", QKV, world)
    tensors = split(tensors, "mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"], world)
    if any("post_feedforward_layernorm" in name for name in tensors):
        tensors = renamed(
            tensors, ("post_attention_layernorm.weight", "sa_scale.scale"), ("model.norm", "norm.rms_norm"),
            ("pre_feedforward_layernorm.weight", "mlp_scale.scale"),
            ("post_feedforward_layernorm.weight", "mlp_norm.scale"), ("rms_norm.weight", "rms_norm.scale"),
        )  # fmt: skip
    moved = {
        name: pairs(t, world.heads if ".q_proj" in name else world.groups)
        if rotary and (".q_proj" in name or ".k_proj" in name)
        else t
        for name, t in tensors.items()
    }
    own = renamed(
        moved, ("input_layernorm.weight", "sa_norm.scale"), ("post_attention_layernorm.weight", "mlp_norm.scale"),
        ("model.norm.weight", "norm.scale"), ("model.embed_tokens", "tok_embeddings"), ("lm_head", "output"),
        ("self_attn.o_proj", "attn.output_proj"), ("self_attn", "attn"), ("gate_proj", "w1"), ("down_proj", "w2"),
        ("up_proj", "w3"), ("model.layers", "layers"), ("_norm.weight", "_norm.scale"),
    )  # fmt: skip
    parts = ["q_proj", "k_proj", "v_proj", "output_proj", "q_norm", "k_norm", "w1", "w2", "w3", "sa_norm", "mlp_norm",
             "sa_scale", "mlp_scale"]  # fmt: skip
    key = {name: _position(name, parts, "tok_embeddings") for name in own}
    return dict(sorted(own.items(), key=lambda item: key[item[0]]))


def _position(name, parts, first):
    number = next((int(part) for part in name.split(".") if part.isdecimal()), None)
    if number is None:
        return (-1 if name.startswith(first) else 1000, 0 if "norm" in name or "ln_f" in name else 1, "")
    return (number, next(k for k, part in enumerate(parts) if f".{part}." in name), name.endswith("bias"))


def split(tensors, source, targets, world):
    """Cut the rows of a fused parameter of each block into several."""
    result = {}
    for name, tensor in tensors.items():
        if source not in name:
            result[name] = tensor
            continue
        counts = [world.heads, world.groups, world.groups] if len(targets) == 3 else [1, 1]
        rows = tensor.shape[0] // sum(counts)
        parts = tensor.split([count * rows for count in counts])
        result |= {name.replace(source, target): part.clone() for target, part in zip(targets, parts, strict=True)}
    return result


def to_torchtitan(world, tensors, rotary=True, fuse=False):
    """Return torchtitan's names; with ``fuse`` those of a state of version 0.3."""
    own = to_torchtune(world, tensors, rotary)
    if fuse:
        own = _grouped(world, own, "attention.qkv_linear.wqkv", "attn.q_proj")
    return renamed(
        own, (".scale", ".weight"), ("attn.q_proj", "attention.wq"), ("attn.k_proj", "attention.wk"),
        ("attn.v_proj", "attention.wv"), ("attn.output_proj", "attention.wo"), ("attn.q_norm", "attention.q_norm"),
        ("attn.k_norm", "attention.k_norm"), ("mlp.w", "feed_forward.w"),
        ("sa_norm", "attention_norm"), ("mlp_norm", "ffn_norm"),
    )  # fmt: skip


def fused(tensors, sources, target):
    """Stack the rows of several parameters of each block into one."""
    result = dict(tensors)
    for name in tensors:
        if f".{sources[0]}." in name:
            parts = [name.replace(sources[0], source) for source in sources]
            result[name.replace(sources[0], target)] = torch.cat([result.pop(part) for part in parts])
    return result


QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]


def padded(tensors, rows, *names):
    """Append rows to the embeddings, as trainers pad a vocabulary."""
    return {
        name: torch.cat([tensor, torch.rand(rows, tensor.shape[1])]) if name in names else tensor
        for name, tensor in tensors.items()
    }


def to_litgpt(world, tensors, padding=5, early=False):
    """Return litgpt's names, in the order of its models, the head first; ``early`` is before version 0.5."""
    own = _litgpt_of_neox(world, tensors) if any("gpt_neox" in name for name in tensors) else dict(tensors)
    own = _grouped(world, own, "attn.attn") if early else fused(own, QKV, "attn.qkv")
    own = split(own, "mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"], world)
    if any("post_feedforward_layernorm" in name for name in own):
        own = renamed(
            own, ("post_attention_layernorm", "post_attention_norm"), ("pre_feedforward_layernorm", "norm_2"),
            ("post_feedforward_layernorm", "post_mlp_norm"),
        )  # fmt: skip
    own = renamed(
        own, ("self_attn.qkv_proj", "attn.qkv"), ("self_attn.q_norm", "attn.norm_q"),
        ("self_attn.k_norm", "attn.norm_k"),
    )  # fmt: skip
    own = renamed(
        own, ("self_attn.o_proj", "attn.proj"), ("gate_proj", "fc_1"), ("up_proj", "fc_2"), ("down_proj", "proj"),
        ("input_layernorm", "norm_1"), ("post_attention_layernorm", "norm_2"), ("model.layers", "transformer.h"),
        ("model.embed_tokens", "transformer.wte"), ("model.norm", "transformer.ln_f"),
    )  # fmt: skip
    own = padded(own, padding, "lm_head.weight", "transformer.wte.weight")
    parts = ["norm_1", "attn.attn", "attn.qkv", "attn.proj", "attn.norm_q", "attn.norm_k", "post_attention_norm",
             "norm_2", "mlp.fc", "mlp.fc_1", "mlp.fc_2", "mlp.proj", "post_mlp_norm"]  # fmt: skip
    blocks = sorted((name for name in own if ".h." in name), key=lambda name: _position(name, parts, ""))
    names = ["lm_head.weight", "transformer.wte.weight", *blocks, "transformer.ln_f.weight", "transformer.ln_f.bias"]
    return {name: own[name] for name in names if name in own}


def _litgpt_of_neox(world, tensors):
    """Return a Pythia under the names of a Llama, with its queries, keys and values apart."""
    own = {}
    for name, tensor in tensors.items():
        if "query_key_value" in name:
            parts = tensor.reshape(world.heads, 3, world.width, *tensor.shape[1:]).unbind(1)
            own[name.replace("attention.query_key_value", "attn.qkv")] = torch.cat(
                [part.reshape(-1, *tensor.shape[1:]) for part in parts]
            )
        else:
            own[name] = tensor
    return renamed(
        own, ("gpt_neox.layers", "model.layers"), ("gpt_neox.embed_in", "model.embed_tokens"),
        ("gpt_neox.final_layer_norm", "model.norm"), ("embed_out", "lm_head"), ("attention.dense", "self_attn.o_proj"),
        ("mlp.dense_h_to_4h", "mlp.fc"), ("mlp.dense_4h_to_h", "down_proj"), (".down_proj", ".mlp.down_proj"),
    )  # fmt: skip


def to_olmo_core(world, tensors):
    """Return OLMo-core's names, with the norms where the model has them."""
    reordered = "post_feedforward_layernorm" in " ".join(tensors)
    norms = [("post_attention_layernorm", "attention_norm"), ("post_feedforward_layernorm", "feed_forward_norm")]
    if not reordered:
        norms = [("input_layernorm", "attention_norm"), ("post_attention_layernorm", "feed_forward_norm")]
    return renamed(
        tensors, *norms, ("model.layers", "blocks"), ("lm_head", "lm_head.w_out"), ("model.norm", "lm_head.norm"),
        ("model.embed_tokens", "embeddings"), ("self_attn.o_proj", "attention.w_out"),
        ("self_attn.q_norm", "attention.q_norm"), ("self_attn.k_norm", "attention.k_norm"),
        ("self_attn.q_proj", "attention.w_q"), ("self_attn.k_proj", "attention.w_k"),
        ("self_attn.v_proj", "attention.w_v"), ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.down_proj", "feed_forward.w2"), ("mlp.up_proj", "feed_forward.w3"),
    )  # fmt: skip


def to_olmo(world, tensors):
    """Return OLMo's names: up before gate."""
    own = fused(fused(tensors, QKV, "att_proj"), ["mlp.up_proj", "mlp.gate_proj"], "ff_proj")
    return renamed(
        own, ("self_attn.o_proj", "attn_out"), ("mlp.down_proj", "ff_out"), ("lm_head", "transformer.ff_out"),
        ("self_attn.", ""), ("post_attention_layernorm", "attn_norm"), ("post_feedforward_layernorm", "ff_norm"),
        ("model.layers", "transformer.blocks"), ("model.embed_tokens", "transformer.wte"),
        ("model.norm", "transformer.ln_f"),
    )  # fmt: skip


def to_nanotron(world, tensors, rotary=False):
    """Return nanotron's names."""
    moved = {
        name: pairs(t, world.heads if ".q_proj" in name else world.groups)
        if rotary and (".q_proj" in name or ".k_proj" in name)
        else t
        for name, t in tensors.items()
    }
    own = fused(fused(moved, QKV, "attn.qkv_proj"), ["mlp.gate_proj", "mlp.up_proj"], "mlp.gate_up_proj")
    own = renamed(
        own, ("self_attn", "attn"), ("lm_head.", "model.lm_head.pp_block."),
        ("model.embed_tokens", "model.token_position_embeddings.pp_block.token_embedding"),
        ("model.norm", "model.final_layer_norm.pp_block"),
    )  # fmt: skip
    return {
        ".".join(["model.decoder", *name.split(".")[2:3], "pp_block", *name.split(".")[3:]])
        if name.startswith("model.layers")
        else name: tensor
        for name, tensor in own.items()
    }


def _grouped(world, tensors, target, queries="self_attn.q_proj"):
    """Fuse queries, keys and values group by group."""
    own = dict(tensors)
    for name in tensors:
        if ".q_proj" in name:
            q, k, v = (own.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv")
            share = world.heads // world.groups
            rest = q.shape[1:]
            grouped = [t.reshape(world.groups, -1, world.width, *rest) for t in (q, k, v)]
            assert grouped[0].shape[1] == share
            joined = torch.cat(grouped, dim=1).reshape(-1, *rest)
            own[name.replace(queries, target)] = joined
    return own


def to_megatron(world, tensors, padding=3, stacked=True):
    """Return Megatron-Core's names: queries, keys and values group by group, layers stacked."""
    own = _grouped(world, tensors, "self_attention.linear_qkv")
    own = fused(own, ["mlp.gate_proj", "mlp.up_proj"], "mlp.linear_fc1")
    own = renamed(
        own, ("self_attn.o_proj", "self_attention.linear_proj"), ("mlp.down_proj", "mlp.linear_fc2"),
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        ("model.embed_tokens", "embedding.word_embeddings"), ("lm_head", "output_layer"),
        ("model.norm", "decoder.final_layernorm"), ("model.layers", "decoder.layers"),
    )  # fmt: skip
    own = padded(own, padding, "embedding.word_embeddings.weight", "output_layer.weight")
    if not stacked:
        return own
    result = {name: tensor for name, tensor in own.items() if ".layers." not in name}
    for name in own:
        if ".layers.0." in name:
            parts = [own[name.replace(".layers.0.", f".layers.{k}.")] for k in range(world.layers)]
            result[name.replace(".layers.0.", ".layers.")] = torch.stack(parts)
    return result


def to_neox(world, tensors):
    """Return GPT-NeoX's names, which number the layers of a pipeline."""
    last = world.layers + 3
    result = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if ".layers." in name:
            name = ".".join([str(int(parts[2]) + 2), *parts[3:]])
        else:
            name = {"embed_in": "0.word_embeddings", "final_layer_norm": f"{last}.norm"}.get(
                parts[1], f"{last + 1}.final_linear"
            )
            name = f"{name}.{parts[-1]}"
        result[name] = tensor
    return dict(sorted(result.items(), key=lambda item: int(item[0].partition(".")[0])))


def to_nanogpt(world, tensors, padding=7):
    """Return nanoGPT's tensors: matrices transposed against GPT-2's, the vocabulary padded."""
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    own = {name: t.T.contiguous() if name.endswith(turned) else t for name, t in tensors.items()}
    return padded(own, padding, "transformer.wte.weight")


def to_bloom(world, tensors, padding=2):
    """Return Megatron-DeepSpeed's names, which number the layers of a pipeline."""
    own = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix("transformer.").split(".")
        if parts[0] == "h":
            name = ".".join([str(int(parts[1]) + 3), *parts[2:]])
        elif parts[0] == "word_embeddings":
            name, tensor = (
                "tied_modules.embed.word_embeddings.weight",
                torch.cat([tensor, torch.rand(padding, tensor.shape[1])]),
            )
        elif parts[0] == "word_embeddings_layernorm":
            name = f"tied_modules.embed.word_embeddings.norm.{parts[1]}"
        else:
            name = f"{world.layers + 4}.{parts[1]}"
        own[name] = tensor
    return own


def adam(own, steps=30, numbered=False, groups=None, betas=(0.9, 0.97)):
    """Return a state of AdamW with these second moments, under names or numbers.

    Args:
        own: Name -> second moment.
        steps: Number of steps.
        numbered: Number the parameters, and leave the names out.
        groups: Lists of names; None for one group.
        betas: Decays.
    """
    groups = groups or [list(own)]
    index = {name: k if numbered else name for k, name in enumerate(name for group in groups for name in group)}
    state = {
        index[name]: {
            "step": torch.tensor(float(steps)),
            "exp_avg": torch.randn(own[name].shape),
            "exp_avg_sq": own[name].clone(),
        }
        for group in groups
        for name in group
    }
    settings = {"lr": 1e-3, "betas": betas, "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "maximize": False,
                "foreach": None, "capturable": False, "differentiable": False, "fused": None,
                "decoupled_weight_decay": True}  # fmt: skip
    return {"state": state, "param_groups": [{**settings, "params": [index[n] for n in group]} for group in groups]}


def assert_moments(fisher, moments, steps=30, beta2=0.97):
    """Assert that a Fisher has exactly these second moments, and the steps and decay of the state."""
    assert set(fisher) == set(moments)
    for name, tensor in moments.items():
        assert torch.equal(fisher[name], tensor), name
    assert fisher.config.steps == steps
    assert fisher.config.optimizer.beta2 == beta2


def write_json(file: Path, content):
    """Write JSON, and make the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def save_distributed(content, folder: Path):
    """Write a distributed checkpoint in one process, without torch's warning that it is one."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(content, checkpoint_id=folder, no_dist=True)


class Opens:
    """Object whose pickle opens a file, if it is run."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")
