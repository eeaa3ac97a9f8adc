"""Cases of layouts that no library writes on a CPU, written by own code: Megatron-Core, and BLOOM.

The second moments are those of a live AdamW that trains a model of transformers. The own names and the moves of rows
are those of ``tests.other_trainers``, written independently of the package, and the files have the form that the
trainers' sources describe: Megatron-Core with stacked layers (``megatron.py`` has its library), and Megatron-DeepSpeed.
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
from tests.other_trainers import World, save_distributed

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

    world = World(out / "model_config", kind, layers=3, tie_word_embeddings=kind == "bloom", **_SIZES[shape], **changes)
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


def _cases(name: str, kind: str, names: str, write: Write, *more: dict[str, Any]) -> dict[str, Case]:
    further = more or ({}, {})
    return {
        f"{name}_{shape}": Case(made, {"kind": kind, "shape": shape, "names": names, "write": write, **further[shape]})
        for shape in (0, 1)
    }


CASES = {
    **_cases("megatron_core", "llama", "to_megatron", _megatron_core, *_GROUPED),
    **_cases("bloom", "bloom", "to_bloom", _megatron_deepspeed, {"n_head": 5}, {"n_head": 3}),
}
