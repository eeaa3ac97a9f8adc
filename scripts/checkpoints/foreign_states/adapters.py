"""Cases of LoRAs of peft: 8-bit optimizers, Adafactor, DDP and FSDP2, with the adapter where each trainer saves it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scripts.checkpoints.foreign_states.common import BATCH, BETAS, STEPS, Case, Made, adamw, batches, tiny, train
from scripts.checkpoints.foreign_states.plain import live
from scripts.checkpoints.foreign_states.quantized import of_bitsandbytes

FINAL = "final"


def adapted(rank: int = 3, wide: bool = False) -> Any:
    """Return a small Llama with a LoRA, ``wide`` enough for 8 bits."""
    import peft

    model = tiny(wide, tie_word_embeddings=False)
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))


def keep_base(out: Path, wide: bool = False) -> None:
    """Write the base model."""
    tiny(wide, tie_word_embeddings=False).save_pretrained(out / "base")


def on_disk(moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the moments of the factors under the names of ``adapter_model.safetensors``."""
    return {name.replace(".default", ""): value for name, value in moments.items() if ".lora_" in name}


def of_adafactor(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return the second moments of Adafactor, the product of its row means and column means over their mean."""
    found = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    means = {name: (state["exp_avg_sq_row"], state["exp_avg_sq_col"]) for name, state in found.items()}
    return {name: row[:, None] * column / row.mean() for name, (row, column) in means.items()}


READERS = {"8bit": of_bitsandbytes, "32bit": of_bitsandbytes, "adafactor": of_adafactor}


def trainer(out: Path, optim: str, rank: int = 3, wide: bool = False) -> Made:
    """Train a LoRA with the Hugging Face Trainer, in as many processes as the case has."""
    from transformers import Trainer, TrainingArguments

    ranks, number = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if ranks == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # otherwise the Trainer would join a distributed run
            del os.environ[name]
    model = adapted(rank, wide)
    data = [{"input_ids": row, "labels": row} for ids in batches(ranks=ranks) for row in ids]
    settings = {"max_steps": STEPS, "save_steps": STEPS, "per_device_train_batch_size": BATCH, "adam_beta2": BETAS[1]}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    ddp = {"ddp_backend": "gloo"} if ranks > 1 else {}
    arguments = TrainingArguments(str(out / "run"), optim=optim, learning_rate=1e-2, **settings, **quiet, **ddp)
    run = Trainer(model, arguments, train_dataset=data)
    run.train()
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    moments = READERS.get(optim.split("_")[-1], live)(model, inner)
    kind = f"{type(inner).__module__}.{type(inner).__name__}"
    if ranks > 1:
        dist.barrier()
    if number == 0:
        for path in (out / "run" / f"checkpoint-{STEPS}").iterdir():
            if path.name not in ("training_args.bin", "generation_config.json", "scheduler.pt", "README.md"):
                path.rename(out / path.name)
        shutil.rmtree(out / "run")
        keep_base(out, wide)
    return Made(on_disk(moments), kind, "transformers.Trainer", file="optimizer.pt", more={"optim": optim})


def fsdp(out: Path, kind: str, dcp: bool = True) -> Made:
    """Train a LoRA under FSDP2, and save it by accelerate's functions.

    With sharded state dicts the checkpoint has no adapter files, as the Trainer leaves it: the final folder has them.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer
    from safetensors.torch import save_file

    dist.init_process_group("gloo")
    model = _sharded(adapted())
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, rank=dist.get_rank(), ranks=dist.get_world_size())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments = {name: optimizer.state[p]["exp_avg_sq"].full_tensor() for name, p in trained.items()}
    weights = {name: p.detach().full_tensor() for name, p in trained.items()}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    accelerator, sharded = Accelerator(cpu=True), kind != "FULL_STATE_DICT"
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(out), use_dcp=dcp)
    if sharded:
        save_fsdp_model(plugin, accelerator, model, str(out), use_dcp=dcp, adapter_only=True)
    if dist.get_rank() == 0:
        folder = out / FINAL if sharded else out
        folder.mkdir(exist_ok=True)
        save_file(on_disk(weights), folder / "adapter_model.safetensors", {"format": "pt"})
        model.peft_config["default"].save_pretrained(str(folder))
        keep_base(out)
    more = {"state_dict_type": kind, "use_dcp": dcp} | ({"model": FINAL} if sharded else {})
    return Made(on_disk(moments), trainer="FSDP2, written by accelerate.utils.fsdp_utils", more=more)


def _sharded(model: Any) -> Any:
    """Shard a model by FSDP2, layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _trained(optim: str, ranks: int = 1, **options: Any) -> Case:
    libraries = ("peft", "bitsandbytes") if "bit" in optim else ("peft",)
    return Case(trainer, {"optim": optim, **options}, ranks, libraries=libraries)


def _fsdp(kind: str, **options: Any) -> Case:
    return Case(fsdp, {"kind": f"{kind}_STATE_DICT", **options}, 2, libraries=("peft",))


CASES = {
    "lora_bnb_8bit": _trained("adamw_bnb_8bit", rank=67, wide=True),
    "lora_bnb_8bit_small": _trained("adamw_8bit"),
    "lora_bnb_paged_8bit": _trained("paged_adamw_8bit", rank=67, wide=True),
    "lora_bnb_paged_32bit": _trained("paged_adamw_32bit"),
    "lora_adafactor": _trained("adafactor"),
    "lora_ddp": _trained("adamw_torch", 2),
    "lora_fsdp2_full": _fsdp("FULL"),
    "lora_fsdp2_sharded": _fsdp("SHARDED"),
    "lora_fsdp2_nodcp": _fsdp("SHARDED", dcp=False),
}
