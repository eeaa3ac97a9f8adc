"""Process of a recorded run with DDP."""

import warnings

import peft
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from squisher_mergekit.training import LoraRecorder
from tests.training.cases import Tokens, make

STEPS, PARTS, ROWS = 2, 2, 4


def record(wrap, rank, world):
    """Take steps with accumulation, each process on its part of the rows; return the recorder."""
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["v_proj", "down_proj"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # peft's call
        model = wrap(peft.get_peft_model(make("llama"), lora).train())
    recorder = LoraRecorder(model, 0.9, seed=7)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows = Tokens("llama").ids[: STEPS * PARTS * ROWS].view(STEPS, PARTS, world, -1, 11)
    for parts in rows[:, :, rank]:
        for number, batch in enumerate(parts):
            if world > 1:
                model.require_backward_grad_sync = number == PARTS - 1
            (model(input_ids=batch, labels=batch).loss / PARTS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        recorder.update()
        optimizer.step()
        optimizer.zero_grad()
    return recorder


def main(kind, folder, rank, world):
    """Record in one of the processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    recorder = record(DistributedDataParallel, rank, world)
    written = recorder.save(folder / str(rank))
    if (written is None) != (rank != 0):
        raise AssertionError("the first process alone writes")
