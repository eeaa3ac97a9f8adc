"""Cases of FSDP, written by accelerate, and of torch.distributed.checkpoint, with gloo processes on the CPU.

The second moments are gathered from the live optimizer's shards: flat pieces under FSDP1, DTensors under FSDP2.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scripts.checkpoints.foreign_states.common import (
    STEPS,
    Case,
    Made,
    adamw,
    compare_with_plain_run,
    freeze,
    groups_of,
    keep_weights,
    tiny,
    train,
)

_WRAPPER = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")


def _fsdp1(model: nn.Module, bf16: bool, original: bool, mesh: Any) -> nn.Module:
    """Wrap a model with FSDP1."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({type(model.model.layers[0])}),
        use_orig_params=original,
        device_mesh=mesh,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD if mesh is not None else ShardingStrategy.FULL_SHARD,
        mixed_precision=MixedPrecision(torch.bfloat16, torch.float32) if bf16 else None,
        device_id=torch.device("cpu"),
    )


def _fsdp2(model: nn.Module, bf16: bool, mesh: Any) -> nn.Module:
    """Wrap a model with FSDP2."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if bf16 else {}
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def _start(two_dimensions: bool) -> Any:
    """Join the processes and return the mesh."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    if two_dimensions:
        return init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (ranks,))


def of_pieces(model: nn.Module, optimizer: Any, mesh: Any, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Return the second moments under FSDP1, the concatenated flat pieces of the ranks."""
    truth: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        piece = optimizer.state.get(p, {}).get("exp_avg_sq", torch.zeros(0)).reshape(-1)
        sides: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(sides, piece)
        if not any(one.numel() for one in sides):  # frozen
            continue
        # The first row of a two-dimensional mesh has every piece once.
        ranks = range(dist.get_world_size()) if mesh is None else mesh.mesh[0].tolist()
        whole = torch.cat([sides[rank] for rank in ranks])
        clean = _WRAPPER.sub("", name)
        if hasattr(p, "_fqns"):  # one flat parameter for several, which FSDP describes
            prefix = clean.rpartition("_flat_param")[0]
            begin = 0
            padded = zip(p._numels_with_padding, p._is_padding_mask, strict=True)
            real = iter(zip(p._fqns, p._shapes, strict=True))
            for count, padding in padded:
                if not padding:
                    fqn, shape = next(real)
                    truth[prefix + _WRAPPER.sub("", fqn)] = whole[begin : begin + count].reshape(shape)
                begin += count
        else:
            truth[clean] = whole.reshape(shapes[clean])
    return truth


def of_tensors(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return the second moments under FSDP2."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: optimizer.state[p]["exp_avg_sq"] for name, p in parameters.items()}
    return {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in found.items()}


def _trained(
    version: int, bf16: bool, frozen: bool | str, two: bool, original: bool = True, hybrid: bool = False
) -> tuple[Any, Any, dict[str, Tensor], dict[str, Tensor]]:
    """Train under FSDP; return model, optimizer, second moments and weights."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    mesh = _start(hybrid)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model: Any = tiny()
    if frozen:
        freeze(model, frozen == "most")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    config = model.config
    model = _fsdp1(model, bf16, original, mesh if hybrid else None) if version == 1 else _fsdp2(model, bf16, mesh)
    optimizer = adamw(groups_of(model, two))
    train(model, optimizer, rank=rank, ranks=ranks)
    truth = (
        of_pieces(model, optimizer, mesh if hybrid else None, shapes) if version == 1 else of_tensors(model, optimizer)
    )
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        compare_with_plain_run(truth, ranks, frozen, two, rough=bf16)
    model.config = config
    return model, optimizer, truth, weights


def fsdp(
    out: Path,
    version: int,
    kind: str,
    dcp: bool = True,
    bf16: bool = False,
    frozen: bool = False,
    two: bool = False,
    original: bool = True,
    hybrid: bool = False,
) -> Made:
    """Make a checkpoint of FSDP with accelerate's functions."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer
    from torch.distributed.fsdp import FullOptimStateDictConfig

    model, optimizer, truth, weights = _trained(version, bf16, frozen, two, original, hybrid)
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, state_dict_type=kind, use_orig_params=original if version == 1 else None
    )
    if version == 1 and kind == "FULL_STATE_DICT":  # offloading from the CPU to the CPU crashes
        plugin.optim_state_dict_config = FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=True)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(out), use_dcp=dcp)
    if kind != "FULL_STATE_DICT":
        save_fsdp_model(plugin, accelerator, model, str(out), use_dcp=dcp)
    if dist.get_rank() == 0:
        keep_weights(out, model.config, weights)
    more = {"state_dict_type": kind, "use_dcp": dcp, "use_orig_params": original, "bf16": bf16, "frozen": frozen}
    more |= {"two_groups": two}
    return Made(truth, trainer=f"FSDP{version}, written by accelerate.utils.fsdp_utils", more=more)


def checkpoint(
    out: Path,
    flat: bool = True,
    titan: bool = False,
    asynchronous: bool = False,
    hybrid: bool = False,
    cached: bool = False,
    two: bool = True,
    frozen: bool | str = False,
    **writer: Any,
) -> Made:
    """Make a checkpoint of DTensors with torch.distributed.checkpoint on several ranks."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    model, optimizer, truth, weights = _trained(2, False, frozen, two, hybrid=hybrid)
    for number in (STEPS - 1, STEPS) if cached else (STEPS,):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        state: dict[str, Any] = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
        module = get_model_state_dict(model)
        state |= module if titan else {"model": module}
        if titan:
            state |= {"train_state": {"step": torch.tensor(STEPS)}, "lr_scheduler": {"last_epoch": STEPS}}
        planner = DefaultSavePlanner(enable_plan_caching=True) if cached else None
        folder = out / f"step-{number}"
        target = dcp.FileSystemWriter(str(folder), **writer)
        if asynchronous:
            dcp.async_save(state, storage_writer=target, planner=planner).result()
        else:
            dcp.save(state, storage_writer=target, planner=planner)
    dist.barrier()
    if dist.get_rank() == 0:
        keep_weights(out, model.config, weights)
    more = {"flatten_optimizer_state_dict": flat}
    return Made(truth, trainer="torch.distributed.checkpoint", file=f"step-{STEPS}", more=more)


def alone(out: Path, numbered: bool = False, at_top: bool = False, flat: bool = False, two: bool = True) -> Made:
    """Make a checkpoint of plain tensors with torch.distributed.checkpoint in one process."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    model = tiny(layers=2)
    optimizer = adamw(groups_of(model, two))
    train(model, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = optimizer.state_dict() if numbered else get_optimizer_state_dict(model, optimizer, options=options)
    whole = state if at_top else {"model": model.state_dict(), "optimizer": state}
    dcp.save(whole, checkpoint_id=str(out / f"step-{STEPS}"), no_dist=True)
    keep_weights(out, model.config, model.state_dict())
    truth = {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
    return Made(truth, trainer="torch.distributed.checkpoint", file=f"step-{STEPS}")


def _fsdp(version: int, kind: str, ranks: int = 2, **options: Any) -> Case:
    return Case(fsdp, {"version": version, "kind": f"{kind}_STATE_DICT", **options}, ranks)


def _dcp(ranks: int = 2, **options: Any) -> Case:
    return Case(checkpoint, options, ranks)


CASES = {
    "fsdp1_full": _fsdp(1, "FULL"),
    "fsdp1_full_flat": _fsdp(1, "FULL", original=False),
    "fsdp1_full_two_bf16": _fsdp(1, "FULL", two=True, bf16=True),
    "fsdp1_sharded": _fsdp(1, "SHARDED"),
    "fsdp1_sharded_flat": _fsdp(1, "SHARDED", original=False),
    "fsdp1_sharded_two": _fsdp(1, "SHARDED", two=True),
    "fsdp1_sharded_frozen": _fsdp(1, "SHARDED", frozen=True),
    "fsdp1_nodcp": _fsdp(1, "SHARDED", dcp=False),
    "fsdp1_hybrid_sharded": _fsdp(1, "SHARDED", ranks=4, hybrid=True),
    "fsdp2_full": _fsdp(2, "FULL"),
    "fsdp2_full_two_bf16": _fsdp(2, "FULL", two=True, bf16=True),
    "fsdp2_sharded": _fsdp(2, "SHARDED"),
    "fsdp2_sharded_two_bf16": _fsdp(2, "SHARDED", two=True, bf16=True),
    "fsdp2_sharded_frozen": _fsdp(2, "SHARDED", frozen=True),
    "fsdp2_sharded_3": _fsdp(2, "SHARDED", ranks=3),
    "fsdp2_nodcp": _fsdp(2, "SHARDED", dcp=False),
    "fsdp2_nodcp_two_bf16": _fsdp(2, "SHARDED", dcp=False, two=True, bf16=True),
    "fsdp2_nodcp_frozen_3": _fsdp(2, "SHARDED", ranks=3, dcp=False, frozen=True),
    "fsdp2_hybrid_full": _fsdp(2, "FULL", ranks=4, hybrid=True),
    "fsdp2_hybrid_sharded": _fsdp(2, "SHARDED", ranks=4, hybrid=True),
    "fsdp2_hybrid_nodcp": _fsdp(2, "SHARDED", ranks=4, hybrid=True, dcp=False),
    "dcp_flat": _dcp(),
    "dcp_nested": _dcp(flat=False),
    "dcp_titan": _dcp(titan=True, two=False),
    "dcp_titan_3_frozen": _dcp(ranks=3, titan=True, frozen=True),
    "dcp_titan_few": _dcp(titan=True, frozen="most"),
    "dcp_hybrid": _dcp(ranks=4, hybrid=True),
    "dcp_async": _dcp(asynchronous=True),
    "dcp_cached": _dcp(cached=True),
    "dcp_one_tensor_a_file": _dcp(single_file_per_rank=False),
    "dcp_two_threads": _dcp(thread_count=2),
    "dcp_alone_nested": Case(alone),
    "dcp_alone_flat": Case(alone, {"flat": True}),
    "dcp_alone_numbered": Case(alone, {"numbered": True}),
    "dcp_alone_numbered_top": Case(alone, {"numbered": True, "at_top": True, "two": False}),
}
