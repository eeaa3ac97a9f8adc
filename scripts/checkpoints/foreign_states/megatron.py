"""Cases of Megatron-Core: its own GPT, tensor parallelism and ``dist_checkpointing`` in gloo processes on the CPU.

The optimizer is torch's AdamW, sharded by the ``sharded_state_dict`` of Megatron's own FP32Optimizer, whose constructor
alone needs CUDA. The truth is that of the live optimizer on all ranks. Its Hugging Face names follow from numbers: the
entries of a Hugging Face model are numbered, put in Megatron's order by ``tests.other_trainers``, and looked up there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scripts.checkpoints.foreign_states.common import BETAS, STEPS, Case, Made, adamw
from tests.other_trainers import World, to_megatron

_LAYERS = 3
_SHAPES = (
    {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 44, "vocab_size": 38},
    {"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 12, "vocab_size": 26},
)
_NORMS = (
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
)
_OF_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def _on_the_cpu() -> None:
    """Keep Megatron-Core from CUDA, which it takes for granted in a few places."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()


def _model(sizes: dict[str, int]) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=_LAYERS,
        hidden_size=sizes["hidden_size"],
        num_attention_heads=sizes["num_attention_heads"],
        num_query_groups=sizes["num_key_value_heads"],
        ffn_hidden_size=sizes["intermediate_size"],
        use_cpu_initialization=True,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=dist.get_world_size(),
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=sizes["vocab_size"],
        max_sequence_length=32,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )


def _train(model: Any, vocabulary: int) -> torch.optim.AdamW:
    optimizer = adamw(model.parameters())
    positions, mask = torch.arange(8).expand(2, 8), torch.tril(torch.ones(1, 1, 8, 8)) < 0.5
    for step in range(STEPS):
        ids = torch.randint(0, vocabulary, (2, 8), generator=torch.Generator().manual_seed(step))
        model(ids, positions, mask, labels=ids).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the parts of all ranks of tensor parallelism."""
    whole = {}
    for name, first in parts[0].items():
        tensors = [part[name] for part in parts]
        if first.ndim == 1:
            whole[name] = first
        elif name.endswith("linear_fc1.weight"):  # each rank has rows of gate, then rows of up
            halves = [tensor.chunk(2) for tensor in tensors]
            whole[name] = torch.cat([half[number] for number in (0, 1) for half in halves])
        else:
            whole[name] = torch.cat(tensors, 1 if name.endswith(_OF_COLUMNS) else 0)
    return whole


def _truth(world: World, live: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the second moments under the names of Hugging Face, by the numbers of the entries."""
    numbers, count = {}, 0
    for name, tensor in world.moments.items():
        numbers[name] = torch.arange(count, count + tensor.numel()).reshape(tensor.shape)
        count += tensor.numel()
    flat = torch.empty(count)
    for name, order in to_megatron(world, numbers, padding=0, stacked=False).items():
        # Without Transformer Engine the norms are modules of their own in memory; the checkpoint has them as with it.
        for saved, live_name in _NORMS:
            name = name.replace(saved, live_name)
        flat[order.long().reshape(-1)] = live[name].reshape(-1)
    return {name: flat[order] for name, order in numbers.items()}


def torch_dist(out: Path, shape: int, halves: bool = False) -> Made:
    """Save ``iter_N`` as Megatron-LM does; with ``halves``, gate and up have a key each."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import FP32Optimizer

    _on_the_cpu()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    torch.manual_seed(7)
    sizes = dict(_SHAPES[shape])
    model = _model(sizes)
    optimizer = _train(model, sizes["vocab_size"])
    megatron = object.__new__(FP32Optimizer)
    megatron.optimizer, megatron.config, megatron.is_stub_optimizer = optimizer, OptimizerConfig(lr=1e-3), False
    saved = model.sharded_state_dict(metadata={"singleton_local_shards": halves})
    saved["optimizer"] = megatron.sharded_state_dict(saved)
    saved |= {"args": argparse.Namespace(adam_beta2=BETAS[1]), "iteration": STEPS}
    step = out / f"iter_{STEPS:07}"
    step.mkdir(exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(saved, str(step))
    parts: list[Any] = [None] * dist.get_world_size()
    own = {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
    dist.all_gather_object(parts, own)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    if int(os.environ["RANK"]):
        return Made()
    world = World(out / "model_config", layers=_LAYERS, tie_word_embeddings=False, **sizes)
    (out / "model_config" / "model.safetensors").unlink()
    return Made(_truth(world, _joined(parts)), trainer="megatron.core.dist_checkpointing", more={"ranks": len(parts)})


CASES = {
    f"megatron_{kind}_{shape}_of_{ranks}": Case(
        torch_dist, {"shape": shape, "halves": kind == "halves"}, ranks, libraries=("megatron-core",)
    )
    for kind in ("torch_dist", "halves")
    for shape in (0, 1)
    for ranks in (1, 2)
}
