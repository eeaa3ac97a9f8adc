"""Process of a run under a mask."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from squisher_mergekit.training.masked import MaskedTraining

CLIP = 0.2


def mlp():
    """Return a network with the same weights at each call."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 11), nn.Tanh(), nn.Linear(11, 5))


def data():
    """Return batches of inputs and labels."""
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(6, 7, generator=generator), torch.randint(5, (6,), generator=generator)) for _ in range(4)]


def random_mask(model, share):
    """Return a mask of a model's parameters, by name."""
    generator = torch.Generator().manual_seed(5)
    return {name: torch.rand(p.shape, generator=generator) < share for name, p in model.named_parameters()}


def steps(model, optimizer, count, part=slice(None)):
    """Take clipped steps on a part of each batch; return the gradient norms before clipping."""
    norms = []
    for number in range(count):
        inputs, labels = data()[number % 4]
        optimizer.zero_grad()
        outputs = model(inputs[part].to(next(model.parameters()).dtype))
        nn.functional.cross_entropy(outputs, labels[part]).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.step()
    return norms


def main(kind, folder, rank, world):
    """Train on this process's part of each batch, and write the weights."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    model = mlp()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=kind == "ddp_views")
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.1)
    with MaskedTraining(wrapped, optimizer, random_mask(model, 0.3)):
        norms = steps(wrapped, optimizer, 20, slice(rank, None, world))
    torch.save(
        {name: p.detach() for name, p in model.named_parameters()} | {"norms": torch.stack(norms)},
        folder / f"{rank}.pt",
    )
