"""Optimizer states of large models in the layouts of trainers with names of their own, for ``states``.

``nanotron`` has one file with fused tensors, ``torch_dist`` (Megatron-Core) stacked layers in pieces of two ranks, and
``neox`` (GPT-NeoX) the sub-partitions of two ranks. First moments and master weights, which no reader opens without the
weights, take no space on disk: they are one number, repeated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.benchmarks.models import Recipe, write_config

RANKS = 2
BETAS = (0.9, 0.95)
Draw = Callable[[tuple[int, ...]], Tensor]


def repeated(shape: tuple[int, ...]) -> Tensor:
    """Return zeros that take the space of one number."""
    return torch.zeros(1).expand(torch.Size(shape).numel()).as_strided(shape, [0] * len(shape))


def nanotron(folder: Path, recipe: Recipe, steps: int, draw: Draw) -> None:
    """Write ``N/optimizer`` with one file, queries, keys and values fused, gate and up fused."""
    hidden, wide = recipe["hidden"], recipe["intermediate"]
    shapes = {"model.token_position_embeddings.pp_block.token_embedding.weight": (recipe["vocab"], hidden)}
    for layer in range(recipe["layers"]):
        block = f"model.decoder.{layer}.pp_block"
        shapes[f"{block}.input_layernorm.weight"] = (hidden,)
        shapes[f"{block}.attn.qkv_proj.weight"] = (3 * hidden, hidden)
        shapes[f"{block}.attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{block}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{block}.mlp.gate_up_proj.weight"] = (2 * wide, hidden)
        shapes[f"{block}.mlp.down_proj.weight"] = (hidden, wide)
    shapes["model.final_layer_norm.pp_block.weight"] = (hidden,)
    shapes["model.lm_head.pp_block.weight"] = (recipe["vocab"], hidden)
    state = {
        number: {"step": torch.tensor(float(steps)), "exp_avg": repeated(shape), "exp_avg_sq": draw(shape)}
        for number, shape in enumerate(shapes.values())
    }
    groups = [{"lr": 1e-4, "betas": BETAS, "eps": 1e-8, "weight_decay": 0.0, "params": list(state)}]
    place = folder / str(steps) / "optimizer"
    place.mkdir(parents=True)
    content = {"state": state, "param_groups": groups, "names": dict(enumerate(shapes))}
    torch.save(content, place / "optimizer_pp-0-of-1_tp-0-of-1_exp-0-of-1.pt")
    (place / "optimizer_config.json").write_text(json.dumps({"type": "NamedOptimizer", "configs": {}}))
    (place.parent / "model_config.json").write_text(json.dumps({"rope_interleaved": False}))
    (folder / "latest.txt").write_text(str(steps))


def torch_dist_tensors(recipe: Recipe) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield key and shape of each tensor of Megatron-Core's state: layers are stacked."""
    hidden, wide, layers = recipe["hidden"], recipe["intermediate"], recipe["layers"]
    shapes = {
        "embedding.word_embeddings.weight": (recipe["vocab"], hidden),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (layers, hidden),
        "decoder.layers.self_attention.linear_qkv.weight": (layers, 3 * hidden, hidden),
        "decoder.layers.self_attention.linear_proj.weight": (layers, hidden, hidden),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (layers, hidden),
        "decoder.layers.mlp.linear_fc1.weight": (layers, 2 * wide, hidden),
        "decoder.layers.mlp.linear_fc2.weight": (layers, hidden, wide),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (recipe["vocab"], hidden),
    }
    for name, shape in shapes.items():
        yield f"optimizer.state.exp_avg_sq.{name}", shape


def neox(folder: Path, recipe: Recipe, steps: int, draw: Draw) -> None:
    """Write ``global_stepN`` of GPT-NeoX with DeepSpeed 0.3, and the config of a GPT-NeoX in place of a Llama's."""
    import transformers

    write_config(folder, recipe)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    last = recipe["layers"] + 3
    outside = {"embed_in": "0.word_embeddings", "final_layer_norm": f"{last}.norm"}
    shapes: dict[str, torch.Size] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        own = ".".join([str(int(parts[2]) + 2), *parts[3:]]) if ".layers." in name else outside.get(parts[1], "")
        inside = ".layers." in name
        shapes[own if inside else f"{own or f'{last + 1}.final_linear'}.{parts[-1]}"] = parameter.shape
    sizes = [sum(shape.numel() for shape in shapes.values() if (len(shape) > 1) is matrix) for matrix in (True, False)]
    step = folder / f"global_step{steps}"
    step.mkdir()
    (step / "20B.yml").write_text(json.dumps({"optimizer": {"params": {"betas": list(BETAS)}}}))
    torch.save({"module": None, "global_steps": steps, "skipped_steps": 0}, step / "mp_rank_00_model_states.pt")
    for rank in range(RANKS):
        parts_of_rank = [size * (rank + 1) // RANKS - size * rank // RANKS for size in sizes]
        state: dict[str, Any] = {
            "zero_stage": 1,
            "partition_count": RANKS,
            "num_comm_intervals_per_group": [1, 1],
            "base_optimizer_state": [[{"exp_avg": repeated((n,)), "exp_avg_sq": draw((n,))}] for n in parts_of_rank],
            "local_sub_partitions_of_fp32_groups": [[repeated((n,))] for n in parts_of_rank],
        }
        file = step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "param_shapes": shapes}, file)
