"""Process of a run with ``EWCPenalty``."""

import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from squisher_mergekit import load_fisher
from squisher_mergekit.applications.ewc.penalty import EWCPenalty
from squisher_mergekit.training import GradientSquares
from tests.training.cases import Tokens, make
from tests.training.worker import wrap

CLIP = 0.5


def main(kind, folder, rank, world):
    """Learn two tasks of three steps, each step of two parts, and write the results of the first process."""
    if world > 1:
        places = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        os.environ |= places | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # accelerate needs them
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2) if kind == "ddp" else None
    model = make("llama")
    model = accelerator.prepare(model) if accelerator else wrap(kind, model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = EWCPenalty(3.0)
    for number, rows in enumerate(Tokens("llama").ids[:24].view(2, 3, 2, world, -1, 11)[:, :, :, rank]):
        squares = GradientSquares(model, 0.9)
        for step in rows:
            optimizer.zero_grad()
            for part in step:
                if accelerator:
                    with accelerator.accumulate(model):
                        accelerator.backward(model(input_ids=part, labels=part).loss)
                else:
                    (model(input_ids=part, labels=part).loss / 2).backward()
            squares.update()
            penalty.add_gradient(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        squares.save(folder / str(number), examples_per_step=4)
        if world > 1:
            dist.barrier()
        if number == 0:
            penalty.add(model, load_fisher(folder / str(number)))
    value = penalty(model)
    optimizer.zero_grad()
    value.backward()
    by_graph = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    ratio = penalty.ratio()
    penalty.add_gradient(model)
    if not all(torch.allclose(_local(a), _local(p.grad)) for a, p in zip(by_graph, model.parameters(), strict=True)):
        raise AssertionError("the scalar's gradient must be the one added in place")
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        weights = {name: tensor.clone() for name, tensor in weights.items()}
        torch.save({"value": value.item(), "ratio": ratio, "weights": weights}, folder / "found.pt")


def _local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
