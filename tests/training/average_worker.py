"""Process of a run with the callback of an average."""

from types import SimpleNamespace

import torch
import torch.distributed as dist

from squisher_mergekit.training import FisherAverageCallback
from tests.training.cases import Tokens, make
from tests.training.worker import wrap


def main(kind, folder, rank, world):
    """Call the callback's events like a trainer, each process on its part of the batch."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    model = wrap(kind, make("llama")) if world > 1 else make("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = FisherAverageCallback(beta=0.7, share=1.0)
    args = SimpleNamespace(seed=0, output_dir=str(folder), resume_from_checkpoint=None)
    state = SimpleNamespace(global_step=0)
    average.on_train_begin(args, state, None, model=model)
    for batch in Tokens("llama").ids[:12].view(3, world, -1, 11)[:, rank]:
        average.on_step_begin(args, state, None)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        average.on_pre_optimizer_step(args, state, None, model=model)
        optimizer.step()
        state.global_step += 1
    average.on_train_end(args, state, None)
