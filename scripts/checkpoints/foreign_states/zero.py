"""Cases of DeepSpeed: ZeRO 0 to 3 and universal checkpoints, on the CPU.

The second moments are cut from the live flat buffers at the memory addresses of the parameters. So they do not depend
on the lists of shapes and slices that a reader has.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scripts.checkpoints.foreign_states.common import (
    BATCH,
    BETAS,
    STEPS,
    Case,
    Made,
    adamw,
    batches,
    compare_with_plain_run,
    freeze,
    groups_of,
    keep_weights,
    loss_of,
    tiny,
)

LIBRARIES = ("deepspeed",)


def engine(
    out: Path, stage: int, bf16: bool = False, frozen: bool = False, two: bool = True, listed: bool = False, **zero: Any
) -> tuple[Any, Made]:
    """Train with DeepSpeed and save a checkpoint; if ``listed``, DeepSpeed's configuration names the optimizer."""
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = tiny()
    if frozen:
        freeze(model)
    if bf16:
        model = model.bfloat16()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "steps_per_print": 1000,
    }
    groups = groups_of(model, two)
    if listed:
        settings = {"lr": 1e-3, "betas": list(BETAS), "torch_adam": True}
        config["optimizer"] = {"type": "AdamW", "params": settings}
    optimizer = {"model_parameters": groups} if listed else {"optimizer": adamw(groups)}
    run, *_ = deepspeed.initialize(model=model, config=config, **optimizer)
    for ids in batches(rank, ranks):
        run.backward(loss_of(run, ids))
        run.step()
    run.save_checkpoint(str(out))
    truth = {0: _stage_0, 1: _stage_2, 2: _stage_2, 3: _stage_3}[stage](run)
    state = _weights(run, stage)
    if rank == 0:
        if (
            ranks > 1
        ):  # on one rank, DeepSpeed 0.19.8 has three quarters of a plain run's second moments after four steps
            compare_with_plain_run(truth, ranks, frozen, two, rough=bf16)
        keep_weights(out, run.module.config, state)
        for script in out.glob("zero_to_*.py"):
            script.unlink()
    more = {"bf16": bf16, "frozen": frozen, "groups": two, "zero": zero}
    return run, Made(truth, trainer=f"DeepSpeed ZeRO-{stage}", step=_steps(run), more=more)


def _steps(run: Any) -> int:
    """Return the step count of the inner optimizer; stage 0 in bf16 counts one step without gradients."""
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    return int(next(iter(inner.state.values()))["step"])


def _config(stage: int, zero: Mapping[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's configuration for an optimizer that the Trainer or accelerate makes."""
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def through_trainer(out: Path, stage: int, **zero: Any) -> Made:
    """Train with the Hugging Face Trainer over DeepSpeed, which saves the last step."""
    from transformers import Trainer, TrainingArguments

    settings = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "save_steps": STEPS, "optim": "adamw_torch"}
    quiet = {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "adam_beta2": BETAS[1], "max_grad_norm": 0.5}
    arguments = TrainingArguments(str(out / "run"), deepspeed=_config(stage, zero), **settings, **quiet)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = [row for ids in batches(0, 1, STEPS * ranks) for row in ids]
    data = [{"input_ids": row, "labels": row} for row in rows]
    run = Trainer(tiny(), arguments, train_dataset=data)
    run.train()
    truth = {1: _stage_2, 2: _stage_2, 3: _stage_3}[stage](run.model_wrapped)
    dist.barrier()
    if rank == 0:
        for path in (out / "run" / f"checkpoint-{STEPS}").iterdir():
            if not path.name.startswith(("training_args", "rng_state", "generation_config", "scheduler", "zero_to_")):
                path.rename(out / path.name)
        shutil.rmtree(out / "run")
    return Made(truth, trainer=f"transformers.Trainer over DeepSpeed ZeRO-{stage}")


def through_accelerate(out: Path, stage: int, **zero: Any) -> Made:
    """Train with accelerate over DeepSpeed in a loop, and save its state."""
    from accelerate import Accelerator, DeepSpeedPlugin

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=_config(stage, zero)))
    model = tiny()
    wrapped, optimizer = accelerator.prepare(model, adamw(groups_of(model, True)))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for ids in batches(rank, ranks):
        accelerator.backward(loss_of(wrapped, ids))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(out), safe_serialization=True)
    truth, state = {1: _stage_2, 2: _stage_2, 3: _stage_3}[stage](wrapped), _weights(wrapped, stage)
    dist.barrier()
    if rank == 0:
        compare_with_plain_run(truth, ranks, False, True)
        keep_weights(out, model.config, state)
        for path in [*out.glob("zero_to_*.py"), *out.glob("random_states*")]:
            path.unlink()
    return Made(truth, trainer=f"accelerate over DeepSpeed ZeRO-{stage}")


def make(out: Path, **options: Any) -> Made:
    """Make a checkpoint of ZeRO."""
    return engine(out, **options)[1]


def universal(out: Path, **options: Any) -> Made:
    """Make a checkpoint of ZeRO, convert it to a universal one, and remove the original."""
    _, made = engine(out, **options)
    dist.barrier()
    if dist.get_rank() == 0:
        step = out / f"global_step{STEPS}"
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", str(step), "--output_folder", f"{step}_universal"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(step)
        (out / "latest").unlink()
        made.trainer += " -> ds_to_universal"
    dist.barrier()
    return made


def _weights(run: Any, stage: int) -> Mapping[str, Tensor]:
    import deepspeed

    if stage < 3:
        return run.module.state_dict()
    with deepspeed.zero.GatheredParameters(list(run.module.parameters())):
        return {name: value.detach().clone() for name, value in run.module.named_parameters()}


def _gathered(part: Tensor) -> Tensor:
    """Return the concatenated parts of all ranks."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def _place(parameter: Tensor, flats: list[Tensor]) -> tuple[int, int]:
    """Return the number of the flat buffer that contains a parameter, and its offset."""
    for number, flat in enumerate(flats):
        begin = parameter.data_ptr() - flat.data_ptr()
        if 0 <= begin < flat.numel() * flat.element_size():
            return number, begin // flat.element_size()
    raise AssertionError("a parameter is in no buffer")


def _stage_0(run: Any) -> dict[str, Tensor]:
    inner, masters = run.optimizer, {}
    if hasattr(inner, "fp32_groups"):  # half-precision parameters, each with a float32 copy
        pairs = (zip(*groups, strict=True) for groups in zip(inner.fp16_groups, inner.fp32_groups, strict=True))
        masters = {id(parameter): master for group in pairs for parameter, master in group}
        inner = inner.optimizer
    parameters = {name: p for name, p in run.module.named_parameters() if p.requires_grad}
    return {name: inner.state[masters.get(id(p), p)]["exp_avg_sq"] for name, p in parameters.items()}


def _stage_2(run: Any) -> dict[str, Tensor]:
    zero = run.optimizer
    if hasattr(zero, "bf16_groups_flat"):
        flats, masters = zero.bf16_groups_flat, zero.fp32_groups_flat_partition
    else:
        flats, masters = zero.bit16_groups_flat, zero.single_partition_of_fp32_groups
    wholes = [_gathered(zero.optimizer.state[master]["exp_avg_sq"]) for master in masters]
    truth = {}
    for name, parameter in run.module.named_parameters():
        if parameter.requires_grad:
            number, begin = _place(parameter.data, flats)
            truth[name] = wholes[number][begin : begin + parameter.numel()].reshape(parameter.shape)
    return truth


def _stage_3(run: Any) -> dict[str, Tensor]:
    zero = run.optimizer
    flats, masters = zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat
    truth = {}
    for name, parameter in run.module.named_parameters():
        if parameter.requires_grad:
            shard = parameter.ds_tensor
            number, begin = _place(shard.data, flats)
            part = zero.optimizer.state[masters[number]]["exp_avg_sq"][begin : begin + shard.numel()]
            truth[name] = _gathered(part)[: parameter.ds_numel].reshape(parameter.ds_shape)
    return truth


def _case(stage: int, ranks: int = 2, note: str = "", **options: Any) -> Case:
    return Case(make, {"stage": stage, **options}, ranks, libraries=LIBRARIES, note=note)


_SMALL = {"sub_group_size": 500}
_ROBIN = {"round_robin_gradients": True}
_ALIGNED = {"parameter_alignment": True}
_ELASTIC = {"elastic_checkpoint": True}

CASES = {
    "ds_stage0": _case(0),
    "ds_stage0_bf16": _case(0, bf16=True),
    "ds_zero1": _case(1),
    "ds_zero2": _case(2),
    "ds_zero3": _case(3),
    "ds_zero1_bf16": _case(1, bf16=True),
    "ds_zero2_bf16": _case(2, bf16=True),
    "ds_zero3_bf16": _case(3, bf16=True),
    "ds_zero1_frozen": _case(1, frozen=True),
    "ds_zero2_one_group": _case(2, two=False),
    "ds_zero3_one_group": _case(3, two=False),
    "ds_zero2_robin_bf16_frozen": _case(2, bf16=True, frozen=True, **_ROBIN),
    "ds_zero2_robin": _case(2, **_ROBIN),
    "ds_zero2_robin_3": _case(2, ranks=3, **_ROBIN),
    "ds_zero3_frozen": _case(3, frozen=True),
    "ds_zero3_small_groups": _case(3, **_SMALL),
    "ds_zero3_small_bf16_frozen": _case(3, bf16=True, frozen=True, **_SMALL),
    "ds_zero3_small_3": _case(3, ranks=3, **_SMALL),
    "ds_zero1_aligned": _case(1, **_ALIGNED),
    "ds_zero2_aligned_bf16": _case(2, bf16=True, **_ALIGNED),
    "ds_zero1_aligned_bf16": _case(1, bf16=True, **_ALIGNED),
    "ds_zero2_aligned_robin": _case(2, **_ALIGNED, **_ROBIN),
    "ds_zero1_elastic": _case(1, listed=True, **_ELASTIC),
    "ds_zero2_elastic_bf16": _case(2, listed=True, bf16=True, **_ELASTIC),
    "ds_zero2_elastic_3_robin": _case(2, ranks=3, listed=True, **_ELASTIC, **_ROBIN),
    "ds_zero2_elastic_no_betas": Case(
        make, {"stage": 2, **_ELASTIC}, 2, ("UnsupportedStateError",), "beta2 is nowhere", LIBRARIES
    ),
    "ds_zero1_3": _case(1, ranks=3),
    "ds_zero2_3": _case(2, ranks=3, bf16=True),
    "ds_zero2_single": _case(2, ranks=1),
    "ds_zero3_single": _case(3, ranks=1),
    "ds_trainer_2": Case(through_trainer, {"stage": 2}, 2, libraries=LIBRARIES),
    "ds_trainer_3": Case(through_trainer, {"stage": 3}, 2, libraries=LIBRARIES),
    "ds_accelerate_1": Case(through_accelerate, {"stage": 1}, 2, libraries=LIBRARIES),
    "ds_accelerate_2": Case(through_accelerate, {"stage": 2}, 2, libraries=LIBRARIES),
    "ds_accelerate_3": Case(through_accelerate, {"stage": 3}, 2, libraries=LIBRARIES),
    "ds_universal_1": Case(universal, {"stage": 1}, 2, libraries=LIBRARIES),
    "ds_universal_2_bf16": Case(universal, {"stage": 2, "bf16": True}, 2, libraries=LIBRARIES),
    "ds_universal_2_frozen": Case(universal, {"stage": 2, "frozen": True}, 2, libraries=LIBRARIES),
    "ds_universal_3": Case(universal, {"stage": 3}, 2, libraries=LIBRARIES),
    "ds_universal_3_small": Case(universal, {"stage": 3, **_SMALL}, 2, libraries=LIBRARIES),
    "ds_universal_robin": Case(
        universal,
        {"stage": 2, **_ROBIN},
        2,
        ("MismatchError",),
        "converted in a wrong way",
        LIBRARIES,
        "DeepSpeed cuts it by the slices of other parameters",
    ),
    "ds_universal_aligned": Case(universal, {"stage": 2, **_ALIGNED}, 2, libraries=LIBRARIES),
}
