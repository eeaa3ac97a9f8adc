"""Cases of verl: its FSDPCheckpointManager, with its own rules for wrapping, on FSDP1 and FSDP2 in gloo processes.

The model is one of transformers, as in verl, and its actor's loop is reduced to the loss of a language model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scripts.checkpoints.foreign_states.common import STEPS, Case, Made, adamw, tiny, train
from scripts.checkpoints.foreign_states.sharded import of_pieces, of_tensors

_SHAPES: tuple[dict[str, Any], ...] = (
    {"hidden_size": 20, "intermediate_size": 27, "num_attention_heads": 5, "num_key_value_heads": 1, "layers": 3},
    {"hidden_size": 18, "intermediate_size": 18, "num_attention_heads": 6, "num_key_value_heads": 3, "layers": 2},
)


def _sharded(model: Any, mode: str) -> nn.Module:
    """Shard a model as verl's engine does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from verl.utils.fsdp_utils import apply_fsdp2, get_fsdp_wrap_policy, get_shard_placement_fn

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    if mode.startswith("fsdp2"):
        options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
        if mode == "fsdp2_columns":
            options["shard_placement_fn"] = get_shard_placement_fn(dist.get_world_size())
        apply_fsdp2(model, options, {})
        return model
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=get_fsdp_wrap_policy(model),
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        device_mesh=mesh,
        use_orig_params=mode == "fsdp1_original",
    )


def verl(out: Path, mode: str, shape: int, tied: bool, missing: bool = False) -> Made:
    """Save ``global_step_N/actor`` by verl's FSDPCheckpointManager.

    Args:
        out: Folder of the case.
        mode: ``fsdp1`` (flat parameters), ``fsdp1_original``, ``fsdp2``, or ``fsdp2_columns`` (the first axis that the
            ranks divide is sharded).
        shape: Number of the shape.
        tied: Tie the head to the embeddings.
        missing: Remove the file of the last rank.
    """
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = tiny(tie_word_embeddings=tied, **_SHAPES[shape])
    model.config.architectures = ["LlamaForCausalLM"]
    shapes = {name: p.shape for name, p in model.named_parameters()}
    whole = _sharded(model, mode)
    optimizer = adamw(whole.parameters())
    train(whole, optimizer, rank=rank, ranks=ranks)
    truth: dict[str, Tensor] = (
        of_tensors(whole, optimizer) if mode.startswith("fsdp2") else of_pieces(whole, optimizer, None, shapes)
    )
    manager = FSDPCheckpointManager(model=whole, optimizer=optimizer)
    folder = out / f"global_step_{STEPS}" / "actor"
    manager.save_checkpoint(str(folder), global_step=STEPS)
    if rank == 0:
        (out / "latest_checkpointed_iteration.txt").write_text(str(STEPS))
        if missing:
            (folder / f"optim_world_size_{ranks}_rank_{ranks - 1}.pt").unlink()
    dist.barrier()
    return Made(truth, trainer="verl, FSDPCheckpointManager", more={"mode": mode})


def _case(mode: str, shape: int, tied: bool, ranks: int = 2, **options: Any) -> Case:
    refuse = {"refuse": ("NotFoundError",), "why": "the file of a rank is missing"} if "missing" in options else {}
    made = {"mode": mode, "shape": shape, "tied": tied, **options}
    return Case(verl, made, ranks, libraries=("verl",), **refuse)  # type: ignore[arg-type]


CASES = {
    "verl_fsdp1": _case("fsdp1", 0, tied=False),
    "verl_fsdp1_3_tied": _case("fsdp1", 1, tied=True, ranks=3),
    "verl_fsdp1_original": _case("fsdp1_original", 0, tied=True),
    "verl_fsdp1_original_3": _case("fsdp1_original", 1, tied=False, ranks=3),
    "verl_fsdp2": _case("fsdp2", 0, tied=False),
    "verl_fsdp2_3_tied": _case("fsdp2", 1, tied=True, ranks=3),
    "verl_fsdp2_columns": _case("fsdp2_columns", 0, tied=False),
    "verl_rank_missing": _case("fsdp2", 0, tied=False, missing=True),
}
