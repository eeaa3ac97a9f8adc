"""Cases of OLMo-core and of its predecessor OLMo, by their real models, optimizers, checkpointers and conversions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scripts.checkpoints.foreign_states.common import BETAS, STEPS, Case, Made, keep_config, under_numbers
from tests.other_trainers import World, to_olmo

_LENGTH = 8
_CORE: dict[str, dict[str, Any]] = {  # sizes of OLMo-core's own constructors; all differ
    "olmo2": {"d_model": 20, "n_heads": 5, "hidden_size": 28, "vocab_size": 39},
    "olmo2_gqa": {"d_model": 24, "n_heads": 6, "n_kv_heads": 3, "hidden_size": 24, "vocab_size": 41},
    "olmo3_gqa": {"d_model": 24, "n_heads": 4, "n_kv_heads": 2, "hidden_size": 36, "vocab_size": 37},
    "llama": {"d_model": 18, "n_heads": 3, "n_kv_heads": 1, "hidden_size": 18, "vocab_size": 35},
    "qwen3": {"d_model": 20, "n_heads": 4, "n_kv_heads": 2, "hidden_size": 27, "vocab_size": 43, "head_dim": 8},
}


def _core_config(kind: str, tied: bool) -> tuple[Any, Any]:
    """Return the configs of OLMo-core and of Hugging Face for one kind of model."""
    from olmo_core.nn.attention import SlidingWindowAttentionConfig
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig
    from transformers import AutoConfig

    sizes, family = dict(_CORE[kind]), kind.partition("_")[0]
    hidden = sizes.pop("hidden_size")
    more: dict[str, Any] = {"n_layers": 3, "feed_forward": FeedForwardConfig(hidden_size=hidden, bias=False)}
    if family.startswith("olmo"):
        more |= {"qk_norm": True, "block_name": TransformerBlockType.reordered_norm}
    if family == "olmo3":
        pattern = SlidingWindowAttentionConfig(
            force_full_attention_on_first_layer=False, force_full_attention_on_last_layer=True, pattern=[4, 4, 4, -1]
        )
        more["sliding_window"] = pattern
    if family == "qwen3":
        more |= {"qk_norm": True, "use_head_qk_norm": True}
    config = TransformerConfig.llama_like(**sizes, **more, tie_word_embeddings=tied)
    config.init_seed = 3
    hugging_face = AutoConfig.for_model(
        family,
        hidden_size=sizes["d_model"],
        num_hidden_layers=3,
        num_attention_heads=sizes["n_heads"],
        num_key_value_heads=sizes.get("n_kv_heads", sizes["n_heads"]),
        intermediate_size=hidden,
        vocab_size=sizes["vocab_size"],
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **({"head_dim": sizes["head_dim"]} if "head_dim" in sizes else {}),
    )
    return config, hugging_face


def olmo_core(
    out: Path,
    kind: str,
    tied: bool = False,
    flat: bool = False,
    skip_step: bool = True,
    fixed: bool = True,
    low: bool = False,
    sharded: bool = False,
    steps: int = STEPS,
) -> Made:
    """Save ``stepN`` by OLMo-core's Checkpointer from its train module.

    Args:
        out: Folder of the case.
        kind: Key of the sizes; its first part is the family.
        tied: Tie the head to the embeddings.
        flat: Flatten the optimizer's state, as runs with a pipeline do.
        skip_step: Take SkipStepAdamW in place of AdamW.
        fixed: Let SkipStepAdamW count its steps; False is its rule up to version 2.1.
        low: Keep the moments in bfloat16.
        sharded: Shard by FSDP2, on all ranks.
        steps: Number of steps.
    """
    from olmo_core.config import DType
    from olmo_core.distributed.parallel import DataParallelType
    from olmo_core.nn.hf.convert import convert_state_to_hf
    from olmo_core.optim import AdamWConfig, OptimGroupOverride, SkipStepAdamWConfig
    from olmo_core.train.checkpoint import Checkpointer
    from olmo_core.train.train_module import TransformerTrainModule
    from olmo_core.train.train_module.transformer.config import TransformerDataParallelConfig
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    if sharded:
        dist.init_process_group("gloo")
    config, hugging_face = _core_config(kind, tied)
    override = OptimGroupOverride(params=["embeddings.weight"], opts={"weight_decay": 0.0})
    settings: dict[str, Any] = {"lr": 1e-3, "betas": BETAS, "group_overrides": [override]}
    if skip_step:
        settings |= {"step_increment_bugfix": fixed, "dtype": DType.bfloat16 if low else None}
    module = TransformerTrainModule(
        config.build(init_device="cpu"),
        (SkipStepAdamWConfig if skip_step else AdamWConfig)(**settings),
        rank_microbatch_size=_LENGTH,
        max_sequence_length=_LENGTH,
        dp_config=TransformerDataParallelConfig(name=DataParallelType.fsdp) if sharded else None,
        device=torch.device("cpu"),
        state_dict_save_opts=StateDictOptions(flatten_optimizer_state_dict=flat, cpu_offload=True),
    )
    optimizer, rank = module.optim, int(os.environ["RANK"])
    for step in range(steps):
        ids = torch.randint(0, 35, (2, _LENGTH), generator=torch.Generator().manual_seed(10 * step + rank))
        logits = module.model(ids)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
        loss.backward()
        if skip_step:
            optimizer.latest_loss = loss.detach()
        optimizer.step()
        optimizer.zero_grad()
    folder = out / f"step{steps}"
    train_state = {"global_step": steps, "global_train_tokens_seen": steps * _LENGTH, "world_size": 1, "epoch": 1}
    Checkpointer(work_dir=out / "work").save(str(folder), module, train_state)
    own = {name: optimizer.state[p]["exp_avg_sq"] for name, p in module.model.named_parameters()}
    whole = {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in own.items()}
    if sharded:
        dist.barrier()
        dist.destroy_process_group()
    if rank:
        return Made()
    (out / "work").rmdir()
    (folder / "config.json").write_text('{"model": {"d_model": 1}, "train_module": {}}')  # of the experiment
    truth = convert_state_to_hf(hugging_face, whole)
    keep_config(out / "model_config", hugging_face)
    name = f"{type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__name__}"
    return Made(truth, name, trainer="OLMo-core, Checkpointer", step=steps)


_UNSHARDED: tuple[dict[str, int], ...] = (
    {"d_model": 20, "n_heads": 5, "n_kv_heads": 5, "mlp_hidden_size": 56, "vocab_size": 39},
    {"d_model": 24, "n_heads": 6, "n_kv_heads": 3, "mlp_hidden_size": 48, "vocab_size": 41},
)


def olmo(out: Path, kind: str, shape: int, tied: bool = False, form: str = "ddp") -> Made:
    """Save ``stepN-unsharded`` by OLMo's FullCheckpointer.

    Args:
        out: Folder of the case.
        kind: ``olmo`` or ``olmo2``.
        shape: Number of the shape.
        tied: Tie the head to the embeddings.
        form: ``ddp``, or ``safetensors``, the published form of it. The checkpointer's other one, FSDP, ends in a
            segmentation fault of torch 2.13 without a GPU.
    """
    from olmo.checkpoint import FullCheckpointer
    from olmo.config import ModelConfig, OptimizerConfig, OptimizerType, TrainConfig
    from olmo.model import OLMo
    from olmo.optim import build_optimizer
    from olmo.safetensors_util import state_dict_to_safetensors_file
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank, sizes = dist.get_rank(), _UNSHARDED[shape]
    after: dict[str, Any] = {"layer_norm_type": "rms", "layer_norm_with_affine": True, "norm_after": True}
    after |= {"attention_layer_norm": True, "attention_layer_norm_with_affine": True}
    before: dict[str, Any] = {"layer_norm_type": "low_precision", "layer_norm_with_affine": False}
    config = TrainConfig(
        model=ModelConfig(
            **sizes,
            **(after if kind == "olmo2" else before),
            n_layers=3,
            embedding_size=sizes["vocab_size"],
            weight_tying=tied,
            include_bias=False,
            rope=True,
            activation_type="swiglu",
            attention_dropout=0.0,
            residual_dropout=0.0,
            embedding_dropout=0.0,
            max_sequence_length=32,
            init_device="cpu",
            pad_token_id=0,
            eos_token_id=1,
        ),
        optimizer=OptimizerConfig(name=OptimizerType.adamw, learning_rate=1e-3, betas=BETAS),
        save_folder=str(out),
    )
    torch.manual_seed(3)
    model: Any = OLMo(config.model)
    wrapped = DistributedDataParallel(model)
    optimizer = build_optimizer(config, wrapped)
    for step in range(STEPS):
        ids = torch.randint(0, 39, (2, 8), generator=torch.Generator().manual_seed(10 * step + rank))
        logits = wrapped(ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = out / f"step{STEPS}-unsharded"
    FullCheckpointer(config).save_checkpoint(folder, wrapped, optimizer, {"global_step": STEPS})
    own = {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
    dist.barrier()
    if rank:
        return Made()
    if form == "safetensors":
        for name in ("optim", "model"):
            state = torch.load(folder / f"{name}.pt", weights_only=False)
            state_dict_to_safetensors_file(state, folder / f"{name}.safetensors")
            (folder / f"{name}.pt").unlink()
    world = World(
        out / "model_config",
        kind,
        layers=3,
        hidden_size=sizes["d_model"],
        num_attention_heads=sizes["n_heads"],
        num_key_value_heads=sizes["n_kv_heads"],
        intermediate_size=sizes["mlp_hidden_size"] // 2,  # gate and up together in OLMo's config
        vocab_size=sizes["vocab_size"],
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    (out / "model_config" / "model.safetensors").unlink()
    truth = under_numbers(world.moments, lambda tensors: to_olmo(world, tensors), own)
    return Made(truth, trainer="OLMo, FullCheckpointer", more={"form": form})


def _core(kind: str, ranks: int = 1, **options: Any) -> Case:
    return Case(olmo_core, {"kind": kind, "sharded": ranks > 1, **options}, ranks, libraries=("ai2-olmo-core",))


def _olmo(kind: str, shape: int, ranks: int = 1, **options: Any) -> Case:
    return Case(olmo, {"kind": kind, "shape": shape, **options}, ranks, libraries=("ai2-olmo",))


CASES = {
    "olmo_1": _olmo("olmo", 0),
    "olmo_1_tied_safetensors": _olmo("olmo", 1, tied=True, form="safetensors"),
    "olmo_2": _olmo("olmo2", 0),
    "olmo_2_safetensors": _olmo("olmo2", 1, form="safetensors"),
    "olmo_core_2": _core("olmo2"),
    "olmo_core_2_gqa_flat": _core("olmo2_gqa", flat=True),
    "olmo_core_3_gqa": _core("olmo3_gqa", skip_step=False),
    "olmo_core_steps_not_counted": _core("olmo2", fixed=False),
    "olmo_core_bfloat16": _core("olmo2_gqa", low=True),
    "olmo_core_llama": _core("llama", skip_step=False),
    "olmo_core_qwen3_tied": _core("qwen3", tied=True, flat=True),
    "olmo_core_sharded": _core("olmo2_gqa", 2),
    "olmo_core_3_sharded_flat": _core("olmo3_gqa", 2, flat=True, skip_step=False),
}
