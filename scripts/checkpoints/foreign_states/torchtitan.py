"""Cases of torchtitan: its models, optimizers, CheckpointManager, and conversions to the names of Hugging Face.

The gradients are random: its attention needs kernels of a GPU for the backward pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scripts.checkpoints.foreign_states.common import BETAS, STEPS, Case, Made, keep_config

_LAYERS = 3
_SHAPES: tuple[dict[str, int], ...] = (
    {"dim": 20, "n_heads": 5, "n_kv_heads": 1, "hidden_dim": 28, "vocab_size": 39},
    {"dim": 24, "n_heads": 6, "n_kv_heads": 3, "hidden_dim": 24, "vocab_size": 41},
)
_HEAD_DIM = 8  # of Qwen's heads; Llama's follows from the others


def _model(kind: str, sizes: dict[str, int], tied: bool, fused: bool) -> tuple[Any, Any]:
    """Return the config and the adapter of a model for the names of Hugging Face."""
    from torchtitan.models import llama3, qwen3
    from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear
    from torchtitan.models.llama3 import state_dict_adapter as of_llama
    from torchtitan.models.qwen3 import state_dict_adapter as of_qwen

    rest = dict(sizes)
    dim, vocabulary = sizes["dim"], rest.pop("vocab_size")
    ones = {"weight": torch.nn.init.ones_}
    normal = {"weight": torch.nn.init.normal_}
    common: dict[str, Any] = {
        "dim": dim,
        "vocab_size": vocabulary,
        "enable_weight_tying": tied,
        "tok_embeddings": Embedding.Config(num_embeddings=vocabulary, embedding_dim=dim, param_init=normal),
        "norm": llama3.RMSNorm.Config(normalized_shape=dim, param_init=ones),
        "lm_head": Linear.Config(in_features=dim, out_features=vocabulary, param_init=normal),
    }
    rest |= {"n_layers": _LAYERS, "fuse_qkv": fused, "attn_backend": "flex"}  # type: ignore[dict-item]
    if kind == "llama":
        rope = ComplexRoPE.Config(dim=dim // sizes["n_heads"], max_seq_len=32, theta=500000)
        layers = llama3._build_llama3_layers(**rest, rope=rope)
        config = llama3.Llama3Model.Config(**common, layers=layers)
        return config, of_llama.Llama3StateDictAdapter(config, None)
    turns = CosSinRoPE.Config(dim=_HEAD_DIM, max_seq_len=32, theta=500000)
    layers = qwen3._build_qwen3_layers(**rest, rope=turns, head_dim=_HEAD_DIM)
    config = qwen3.Qwen3Model.Config(**common, layers=layers)
    return config, of_qwen.Qwen3StateDictAdapter(config, None)


def torchtitan(out: Path, kind: str, shape: int, tied: bool = False, fused: bool = True, sharded: bool = False) -> Made:
    """Save ``checkpoint/step-N`` by torchtitan's CheckpointManager.

    Args:
        out: Folder of the case.
        kind: ``llama`` or ``qwen3``.
        shape: Number of the shape.
        tied: Tie the head to the embeddings.
        fused: Keep queries, keys and values in one module (``qkv_linear``).
        sharded: Shard by FSDP2.
    """
    from torch.distributed.fsdp import fully_shard
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
    from transformers import AutoConfig

    dist.init_process_group("gloo")
    sizes = _SHAPES[shape]
    config, adapter = _model(kind, sizes, tied, fused)
    torch.manual_seed(3)
    model = config.build()
    model.init_states(buffer_device=torch.device("cpu"))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if sharded:
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    settings = {"lr": 1e-3, "betas": BETAS}
    groups = [
        ParamGroupConfig(pattern="norm", optimizer_name="AdamW", optimizer_kwargs={**settings, "weight_decay": 0.0}),
        ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={**settings, "weight_decay": 0.1}),
    ]
    optimizers = OptimizersContainer(
        OptimizersContainer.Config(param_groups=groups, implementation="for-loop"), model_parts=[model]
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        for name, parameter in model.named_parameters():
            gradient = torch.randn(shapes[name], generator=generator)
            if sharded:
                from torch.distributed.tensor import distribute_tensor

                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizers.step()
    manager = CheckpointManager(
        CheckpointManager.Config(enable=True, interval=STEPS, last_save_model_only=False),
        dataloader=None,
        model_parts=[model],
        optimizers=optimizers,
        lr_schedulers=_Nothing(),  # type: ignore[arg-type]
        states={"train_state": _Counts()},
        sd_adapter=None,
        base_folder=str(out),
    )
    manager.save(STEPS)
    live = next(iter(optimizers.optimizers)).state
    with torch.no_grad():  # so that torchtitan splits fused moments as it splits weights
        for parameter in model.parameters():
            parameter.copy_(live[parameter]["exp_avg_sq"])
    own = {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in model.state_dict().items()}
    dist.barrier()
    truth = adapter.to_hf(own)
    if tied:
        truth.pop("lm_head.weight", None)
    extent = {"head_dim": _HEAD_DIM} if kind == "qwen3" else {}
    keep_config(
        out / "model_config",
        AutoConfig.for_model(
            kind,
            hidden_size=sizes["dim"],
            num_hidden_layers=_LAYERS,
            num_attention_heads=sizes["n_heads"],
            num_key_value_heads=sizes["n_kv_heads"],
            intermediate_size=sizes["hidden_dim"],
            vocab_size=sizes["vocab_size"],
            tie_word_embeddings=tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **extent,
        ),
    )
    return Made(truth, trainer="torchtitan, CheckpointManager", file="checkpoint")


class _Nothing:
    """State of a scheduler that the loop does not have."""

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": STEPS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class _Counts(_Nothing):
    """State of the trainer's loop, which needs a GPU itself."""

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(STEPS, dtype=torch.int32), "ntokens_seen": torch.tensor(64)}


def _case(kind: str, shape: int, ranks: int = 1, **options: bool) -> Case:
    made = {"kind": kind, "shape": shape, "sharded": ranks > 1, **options}
    return Case(torchtitan, made, ranks, libraries=("torchtitan",))


CASES = {
    "torchtitan_llama_0": _case("llama", 0),
    "torchtitan_llama_1_tied": _case("llama", 1, tied=True),
    "torchtitan_llama_sharded": _case("llama", 1, ranks=2),
    "torchtitan_qwen3_0": _case("qwen3", 0),
    "torchtitan_qwen3_1_tied": _case("qwen3", 1, tied=True, ranks=2),
    "torchtitan_qwen3_unfused": _case("qwen3", 1, fused=False),
}
