"""Cases of Composer: its Trainer on a model of transformers, whole or sharded by FSDP2, with Composer's optimizers.

Two unrelated imports need help. torchvision's operators are declared, because its kernels cannot be loaded
(``declare_torchvision``). ``mcli``, the client of MosaicML's platform, is replaced by an empty module.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scripts.checkpoints.foreign_states.common import (
    BETAS,
    STEPS,
    Case,
    Made,
    batches,
    keep_config,
    tiny,
)

_SHAPES: tuple[dict[str, Any], ...] = (
    {"hidden_size": 20, "intermediate_size": 28, "num_attention_heads": 5, "num_key_value_heads": 1},
    {"hidden_size": 18, "intermediate_size": 18, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 37},
)


def composer(out: Path, shape: int, tied: bool, optimizer: str = "DecoupledAdamW", sharded: str = "") -> Made:
    """Save ``epE-baB-rank0.pt``, or the folder ``epE-baB`` of a sharded run, by Composer's Trainer.

    Args:
        out: Folder of the case.
        shape: Number of the shape.
        tied: Tie the head to the embeddings.
        optimizer: Class in ``composer.optim``, or AdamW of torch.
        sharded: State of FSDP2, ``full`` or ``sharded``; empty for a run without it.
    """
    sys.modules.setdefault("mcli", types.ModuleType("mcli"))
    import composer.optim
    from composer import Trainer
    from composer.models import HuggingFaceModel
    from torch.utils.data import DataLoader, DistributedSampler

    model = tiny(layers=3, tie_word_embeddings=tied, **_SHAPES[shape])
    keep_config(out / "model_config", model.config)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cls = torch.optim.AdamW if optimizer == "AdamW" else getattr(composer.optim, optimizer)
    wrapped = HuggingFaceModel(model, use_logits=True, shift_labels=True)
    data = [{"input_ids": ids, "labels": ids.clone()} for ids in torch.cat(batches(0, ranks))]
    if ranks > 1:
        dist.init_process_group("gloo")
    sampler = DistributedSampler(data) if ranks > 1 else None  # type: ignore[arg-type, var-annotated]
    trainer = Trainer(
        model=wrapped,
        train_dataloader=DataLoader(data, batch_size=4, sampler=sampler),  # type: ignore[arg-type]
        optimizers=cls(wrapped.parameters(), lr=1e-3, betas=BETAS),
        max_duration=f"{STEPS}ba",
        save_folder=str(out / "checkpoints"),
        save_interval=f"{STEPS}ba",
        device="cpu",
        progress_bar=False,
        run_name="run",
        parallelism_config={"fsdp2": {"state_dict_type": sharded}} if sharded else None,
    )
    trainer.fit()
    live = trainer.state.optimizers[0].state
    own = {name: live[p]["exp_avg_sq"] for name, p in trainer.state.model.named_parameters()}
    truth = {
        name.removeprefix("module.").removeprefix("model."): v.full_tensor() if hasattr(v, "full_tensor") else v
        for name, v in own.items()
    }
    name = f"{cls.__module__.partition('.')[0]}.{optimizer}" if optimizer != "AdamW" else "torch.optim.AdamW"
    trainer.close()
    if dist.is_initialized():
        dist.barrier()
    if rank:
        return Made()
    for link in list(out.rglob("latest*")):
        link.unlink()
    return Made(truth, name, trainer="Composer's Trainer", file="checkpoints")


def _case(shape: int, tied: bool, ranks: int = 1, **options: Any) -> Case:
    return Case(composer, {"shape": shape, "tied": tied, **options}, ranks, libraries=("mosaicml",))


CASES = {
    "composer_0": _case(0, tied=False),
    "composer_1_tied": _case(1, tied=True),
    "composer_1_adamw": _case(1, tied=False, optimizer="AdamW"),
    "composer_fsdp2_sharded": _case(0, tied=False, ranks=2, sharded="sharded"),
    "composer_fsdp2_full_tied": _case(1, tied=True, ranks=2, sharded="full"),
}
