"""Process of a distributed run that writes a Fisher; of one process with world 1."""

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from squisher_mergekit import save_squisher
from squisher_mergekit.training import GradientSquares
from tests.training.cases import Tokens, make

STEPS, BATCH, CLIP = 3, 4, 0.5


def wrap(kind, model):
    """Wrap the model for a kind of parallel training."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if kind.startswith("fsdp2"):
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def train(kind, model, rank, world):
    """Take the steps, each process on its part of the batch; return the trained objects."""
    wrapped = wrap(kind, model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    squares = None if kind == "fsdp1" else GradientSquares(wrapped, 0.9)
    rows = Tokens("llama").ids[: STEPS * BATCH].view(STEPS, world, -1, 11)
    for batch in rows[:, rank]:
        optimizer.zero_grad()
        wrapped(input_ids=batch, labels=batch).loss.backward()
        if kind == "fsdp1":
            wrapped.clip_grad_norm_(CLIP)
        else:
            torch.nn.utils.clip_grad_norm_(wrapped.parameters(), CLIP)
            squares.update()
        optimizer.step()
    return wrapped, optimizer, squares


def gathered(wrapped, optimizer):
    """Return exp_avg_sq and weights by name as torch itself gathers them, empty except in the first process."""
    options = StateDictOptions(full_state_dict=True)
    weights = get_model_state_dict(wrapped, options=options)
    state = get_optimizer_state_dict(wrapped, optimizer, options=options)
    return {name: one["exp_avg_sq"] for name, one in state.get("state", {}).items()}, weights


def resumed(squares, wrapped, folder):
    """Return True if the average comes back from its file, to the bit in each process."""
    from squisher_mergekit import load_fisher

    again = GradientSquares(wrapped, 0.9)
    again.load_fisher(load_fisher(folder))
    local = [
        (a.to_local(), b.to_local()) if hasattr(a, "to_local") else (a, b)
        for a, b in ((again.squares[name], tensor) for name, tensor in squares.squares.items())
    ]
    return again.steps == squares.steps and all(torch.equal(a, b) for a, b in local)


def main(kind, folder, rank, world):
    """Train, write the Fisher, and in the first process write the state that torch gathers."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    model = make("mixtral" if kind == "fsdp2_mixtral" else "llama")
    wrapped, optimizer, squares = train(kind, model, rank, world)
    truth, weights = gathered(wrapped, optimizer)
    if kind == "fsdp2_nan":
        last = optimizer.param_groups[-1]["params"][-1]
        optimizer.state[last]["exp_avg_sq"].to_local().fill_(float("nan"))
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in truth.items()}, folder / "gathered.safetensors")
        make("mixtral" if kind == "fsdp2_mixtral" else "llama").save_pretrained(folder / "out", state_dict=weights)
    if world > 1:
        dist.barrier()
    returned = save_squisher(wrapped, optimizer, folder / "out", examples_per_step=BATCH, max_grad_norm=CLIP)
    if (returned is None) != (rank != 0):
        raise AssertionError("the first process alone returns the Fisher")
    if squares is not None:
        squares.save(folder / "out" / "fisher_ema", weights=folder / "out")
        if world > 1:
            dist.barrier()
        if not resumed(squares, wrapped, folder / "out" / "fisher_ema"):
            raise AssertionError("the average did not come back from its file")
