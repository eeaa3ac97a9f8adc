"""Cases of nanotron: its Llama, optimizers (ZeRO 0 and 1) and ``serialize``, in gloo processes.

The gradients are random: the forward pass needs kernels of flash-attn, whose modules, imported by nanotron's Llama, are
replaced by empty ones. Its pipes between stages and its table of rotary angles are kept from CUDA. In version 0.4,
``logging`` and ``config`` import each other; ``logging`` comes first, with empty modules for the annotation that it
takes. Parts of ZeRO and of tensor parallelism are put together by the offsets and slices in nanotron's own objects. The
names of Hugging Face are looked up by ``under_numbers``.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scripts.checkpoints.foreign_states.common import BETAS, STEPS, Case, Made, under_numbers
from tests.other_trainers import World, to_nanotron

_LAYERS = 3
_SHAPES = (
    {"hidden_size": 20, "num_attention_heads": 5, "num_key_value_heads": 1, "intermediate_size": 28, "vocab_size": 39},
    {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": 38},
)


def _stand_in(*names: str) -> None:
    """Replace modules whose classes and functions only a forward pass needs."""
    for name in names:
        module = types.ModuleType(name)
        module.__getattr__ = _module  # type: ignore[method-assign]
        sys.modules[name] = module


def _module(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (nn.Module,), {"__init__": _nothing})


def _nothing(module: nn.Module, *_: Any, **__: Any) -> None:
    nn.Module.__init__(module)


def _on_the_cpu() -> None:
    for name in ("flash_attn", "layers", "layers.rotary", "flash_attn_interface", "bert_padding", "ops", "ops.triton"):
        _stand_in(name if name == "flash_attn" else f"flash_attn.{name}")
    _stand_in("flash_attn.ops.triton.layer_norm")
    torch.cuda.set_device = lambda *_: None  # type: ignore[assignment]
    _stand_in("nanotron.config", "nanotron.config.config")
    importlib.import_module("nanotron.logging")
    for name in ("nanotron.config", "nanotron.config.config"):
        del sys.modules[name]


def _model(context: Any, parallel: Any, sizes: dict[str, int], tied: bool) -> tuple[Any, Any]:
    from nanotron.config import LlamaConfig
    from nanotron.models import build_model, llama
    from nanotron.models.llama import LlamaForTraining
    from nanotron.trainer import mark_tied_parameters

    pipes = llama.P2P
    llama.P2P = lambda group, device: pipes(group, torch.device("cpu"))
    llama.RotaryEmbedding = llama.FlashRotaryEmbedding  # its table of angles is no parameter, and is put on CUDA
    config = LlamaConfig(
        **sizes, num_hidden_layers=_LAYERS, tie_word_embeddings=tied, pad_token_id=None, max_position_embeddings=32
    )
    model = build_model(
        lambda: LlamaForTraining(config, context, parallel), context, torch.float32, device=torch.device("cpu")
    )
    mark_tied_parameters(model=model, parallel_context=context, parallel_config=parallel)
    return model, config


def _seeded(name: str, step: int, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + sum(map(ord, name))))


def _own(parameter: Any, whole: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    if not parameter.is_sharded:
        return whole
    part = torch.empty(parameter.shape, dtype=whole.dtype)
    for pair in parameter.get_sharded_info().local_global_slices_pairs:
        part[pair.local_slices] = whole[pair.global_slices]
    return part


def _shape(parameter: Any) -> torch.Size:
    return torch.Size(parameter.get_sharded_info().unsharded_shape) if parameter.is_sharded else parameter.shape


def _live(optimizer: Any, named: dict[str, Any], rank: int) -> dict[str, Tensor]:
    """Return the second moments of all ranks, put together by nanotron's own offsets and slices."""
    base = optimizer
    while hasattr(base, "optimizer"):
        base = base.optimizer
    offsets = getattr(optimizer, "param_name_to_dp_rank_offsets", None)
    own = []
    for parameter, entry in base.state.items():
        name = optimizer.id_to_name[id(parameter)]
        whole = named[name]
        begin, end = offsets[name][rank] if offsets else (0, whole.numel())
        places = torch.arange(_shape(whole).numel()).reshape(_shape(whole))
        local = _own(whole, places)
        own.append((name, _shape(whole), local.reshape(-1)[begin:end], entry["exp_avg_sq"].reshape(-1)))
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    truth: dict[str, Tensor] = {}
    for name, shape, places, values in (one for parts in ranks for one in parts):
        truth.setdefault(name, torch.full((shape.numel(),), torch.nan))[places] = values
    return {name: flat.reshape(_shape(named[name])) for name, flat in truth.items()}


def nanotron(out: Path, shape: int, tied: bool, zero: int, parts: int = 1, missing: bool = False) -> Made:
    """Save ``N/`` by nanotron's ``save_weights``, ``save_optimizer`` and ``save_meta``.

    Args:
        out: Folder of the case.
        shape: Number of the shape.
        tied: Tie the head to the embeddings.
        zero: Stage of ZeRO, over all ranks that are not of tensor parallelism.
        parts: Ranks of tensor parallelism.
        missing: Remove the file of the last rank.
    """
    dist.init_process_group("gloo")
    sizes = dict(_SHAPES[shape])
    if dist.get_rank() == 0:  # transformers before the stand-ins
        world = World(out / "model_config", layers=_LAYERS, tie_word_embeddings=tied, **sizes)
        (out / "model_config" / "model.safetensors").unlink()
    _on_the_cpu()
    from nanotron.config import LRSchedulerArgs, OptimizerArgs, ParallelismArgs
    from nanotron.helpers import init_optimizer_and_grad_accumulator
    from nanotron.parallel.context import ParallelContext
    from nanotron.serialize.metadata import save_meta
    from nanotron.serialize.optimizer import save_optimizer
    from nanotron.serialize.weights import save_weights

    ranks = dist.get_world_size() // parts
    context = ParallelContext(tensor_parallel_size=parts, pipeline_parallel_size=1, data_parallel_size=ranks)
    model, config = _model(context, ParallelismArgs(dp=ranks, pp=1, tp=parts), sizes, tied)
    named = dict(model.get_named_params_with_correct_tied())
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(_own(parameter, _seeded(name, 0, _shape(parameter))))
    arguments = OptimizerArgs(
        zero_stage=zero,
        weight_decay=0.1,
        clip_grad=None,
        accumulate_grad_in_fp32=False,
        adam_eps=1e-8,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        torch_adam_is_fused=False,
        learning_rate_scheduler=LRSchedulerArgs(
            1e-3, lr_warmup_style="linear", lr_decay_style="linear", min_decay_lr=0.0
        ),
    )
    optimizer, _ = init_optimizer_and_grad_accumulator(model, arguments, context)
    for step in range(1, STEPS + 1):
        for name, parameter in named.items():
            whole = _seeded(name, step, _shape(parameter))
            parameter.grad = _own(parameter, whole)
        optimizer.step()
        optimizer.zero_grad()
    folder = out / str(STEPS)
    save_weights(model, context, folder)
    save_optimizer(optimizer, context, folder)
    save_meta(context, folder, {"last_train_step": STEPS, "consumed_train_samples": STEPS})
    truth = _live(optimizer, named, dist.get_rank(context.dp_pg))
    dist.barrier()
    if dist.get_rank():
        return Made()
    (folder / "model_config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (out / "latest.txt").write_text(str(STEPS))
    if missing:
        max((folder / "optimizer").glob("optimizer_pp*")).unlink()
    # Version 0.4 has rotary rows in pairs.
    named_truth = under_numbers(world.moments, lambda tensors: to_nanotron(world, tensors, rotary=True), truth)
    return Made(named_truth, trainer="nanotron", more={"zero": zero})


def _case(shape: int, tied: bool, zero: int, ranks: int = 1, **options: Any) -> Case:
    refuse = {"refuse": ("NotFoundError",), "why": "the file of a rank is missing"} if "missing" in options else {}
    made = {"shape": shape, "tied": tied, "zero": zero, **options}
    return Case(nanotron, made, ranks, libraries=("nanotron",), **refuse)  # type: ignore[arg-type]


CASES = {
    "nanotron_0": _case(0, tied=False, zero=0),
    "nanotron_1_tied": _case(1, tied=True, zero=0),
    "nanotron_zero1_0": _case(0, tied=True, zero=1, ranks=2),
    "nanotron_zero1_1_of_3": _case(1, tied=False, zero=1, ranks=3),
    "nanotron_parts": _case(1, tied=False, zero=0, ranks=2, parts=2),
    "nanotron_parts_zero1_tied": _case(1, tied=True, zero=1, ranks=4, parts=2),
    "nanotron_rank_missing": _case(0, tied=False, zero=1, ranks=2, missing=True),
}
