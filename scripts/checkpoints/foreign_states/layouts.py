"""Cases of layouts that no package writes on a CPU, written by own code: Megatron-Core, BLOOM, GPT-NeoX and nanoGPT.

The second moments are those of a live AdamW that trains a model of transformers. The own names and the moves of rows
are those of ``tests.other_trainers``, written independently of the package, and the files have the form that the
trainers' sources describe: Megatron-Core with stacked layers (``megatron.py`` has its library), Megatron-DeepSpeed,
ZeRO-1 of DeepSpeed 0.3 under GPT-NeoX, and nanoGPT's script.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.checkpoints.foreign_states.common import BETAS, STEPS, Case, Made, adamw, loss_of
from tests import other_trainers
from tests.other_trainers import World, adam, save_distributed

_SIZES = (
    {"hidden_size": 20, "num_attention_heads": 5, "intermediate_size": 28, "vocab_size": 39},
    {"hidden_size": 18, "num_attention_heads": 3, "intermediate_size": 18, "vocab_size": 41},
)
_GROUPED = ({"num_key_value_heads": 1}, {"num_key_value_heads": 3, "head_dim": 8})
Write = Callable[[Path, dict[str, Tensor], dict[str, Tensor]], None]


def made(out: Path, kind: str, shape: int, names: str, write: Write, **changes: Any) -> Made:
    """Train a model, and write its state under the names and in the layout of a trainer.

    Args:
        out: Folder of the case; the model's config is in ``model_config``.
        kind: ``model_type`` of the model.
        shape: Number of the shape.
        names: Function of ``tests.other_trainers`` that gives second moments the trainer's names.
        write: Function that writes the trainer's files from second moments and weights.
        changes: Further settings of the config.
    """
    import transformers

    world = World(
        out / "model_config", kind, layers=3, tie_word_embeddings=kind in ("bloom", "gpt2"), **_SIZES[shape], **changes
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(world.config)
    optimizer = adamw(model.parameters())
    for step in range(STEPS):
        ids = torch.randint(3, 39, (3, 8), generator=torch.Generator().manual_seed(step))
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    moments = {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
    weights = {name: p.detach() for name, p in model.named_parameters()}
    (out / "model_config" / "model.safetensors").unlink()
    rename = getattr(other_trainers, names)
    torch.manual_seed(1)  # of the rows by which a vocabulary is padded
    write(out, rename(world, moments), rename(world, weights))
    if kind == "gpt_neox":  # transformers 5 calls the head lm_head, and keeps its name in files
        moments["embed_out.weight"] = moments.pop("lm_head.weight")
    return Made(moments, trainer=f"{write.__name__[1:]} (layout by own code)")


def _megatron_core(out: Path, moments: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    step = out / f"iter_{STEPS:07}"
    saved = {f"optimizer.state.exp_avg_sq.{name}": tensor for name, tensor in moments.items()}
    saved |= {f"optimizer.state.exp_avg.{name}": -tensor for name, tensor in moments.items()}
    save_distributed(saved | {f"optimizer.state.fp32_param.{n}": t for n, t in weights.items()} | weights, step)
    (step / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    groups = [{"betas": BETAS, "step": STEPS, "params": []}]
    arguments = argparse.Namespace(adam_beta1=BETAS[0], adam_beta2=BETAS[1])
    torch.save({"optimizer": {"optimizer": {"param_groups": groups}}, "args": arguments}, step / "common.pt")
    (out / "latest_checkpointed_iteration.txt").write_text(str(STEPS))


def _megatron_deepspeed(out: Path, moments: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    folder = out / f"global_step{STEPS}_universal"
    for name, tensor in moments.items():
        place = folder / "zero" / name
        place.mkdir(parents=True)
        torch.save({"param": tensor}, place / "exp_avg_sq.pt")
        torch.save({"param": weights[name]}, place / "fp32.pt")
    arguments = argparse.Namespace(adam_beta1=BETAS[0], adam_beta2=BETAS[1])
    torch.save({"args": arguments, "iteration": STEPS}, folder / "mp_rank_00_model_states.pt")


def _neox(out: Path, moments: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    folder, ranks, skipped = out / f"global_step{STEPS + 2}", 3, 2
    folder.mkdir()
    groups = [[name for name in moments if (moments[name].ndim > 1) == decayed] for decayed in (True, False)]
    flat = {
        key: [torch.cat([source[name].reshape(-1) for name in group]) for group in groups]
        for key, source in (("exp_avg_sq", moments), ("master", weights))
    }
    size = [-(-group.numel() // ranks) for group in flat["master"]]
    for rank in range(ranks):
        parts = {
            key: [group[rank * n : (rank + 1) * n].clone() for group, n in zip(found, size, strict=True)]
            for key, found in flat.items()
        }
        state = {
            "zero_stage": 1,
            "partition_count": ranks,
            "num_comm_intervals_per_group": [1, 1],
            "base_optimizer_state": [[{"exp_avg": -part, "exp_avg_sq": part}] for part in parts["exp_avg_sq"]],
            "local_sub_partitions_of_fp32_groups": [[part] for part in parts["master"]],
        }
        content = {"optimizer_state_dict": state, "param_shapes": {name: t.shape for name, t in moments.items()}}
        torch.save(content, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    counts = {"module": None, "global_steps": STEPS + skipped, "skipped_steps": skipped, "dp_world_size": ranks}
    torch.save(counts, folder / "mp_rank_00_model_states.pt")
    for number in dict.fromkeys(name.partition(".")[0] for name in weights):
        layer = {n.partition(".")[2]: t.half() for n, t in weights.items() if n.startswith(f"{number}.")}
        torch.save(layer, folder / f"layer_{int(number):02}-model_00-model_states.pt")
    (out / "configs").mkdir()
    settings = {"optimizer": {"type": "Adam", "params": {"betas": BETAS}}}
    (out / "configs" / "model.yml").write_text(json.dumps(settings))


def _nanogpt(out: Path, moments: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    groups = [[name for name in moments if (moments[name].ndim > 1) == decayed] for decayed in (True, False)]
    model = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    model["_orig_mod.lm_head.weight"] = model["_orig_mod.transformer.wte.weight"]
    state = adam(moments, STEPS, numbered=True, groups=groups, betas=BETAS)
    torch.save({"model": model, "optimizer": state, "iter_num": STEPS, "model_args": {}}, out / "ckpt.pt")


def _cases(name: str, kind: str, names: str, write: Write, *more: dict[str, Any]) -> dict[str, Case]:
    further = more or ({}, {})
    return {
        f"{name}_{shape}": Case(made, {"kind": kind, "shape": shape, "names": names, "write": write, **further[shape]})
        for shape in (0, 1)
    }


CASES = {
    **_cases("megatron_core", "llama", "to_megatron", _megatron_core, *_GROUPED),
    **_cases("bloom", "bloom", "to_bloom", _megatron_deepspeed, {"n_head": 5}, {"n_head": 3}),
    **_cases("neox", "gpt_neox", "to_neox", _neox),
    **_cases("nanogpt", "gpt2", "to_nanogpt", _nanogpt),
}
