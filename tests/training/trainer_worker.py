"""Process of a run of the Trainer in a group, as torchrun starts it."""

import copy

import torch
from torch import nn

from squisher_mergekit import SquisherCallback
from squisher_mergekit.applications.ewc.penalty import EWCPenalty
from squisher_mergekit.training.ewc import EWCCallback
from tests.training.cases import make, trainer

LAM, CLIP = 3.0, 0.5
SETTINGS = {"lr_scheduler_type": "constant", "max_grad_norm": CLIP, "learning_rate": 1e-2}


def model():
    """Return a classifier without dropout, so that two runs can agree."""
    made = make("bert")
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return made


def penalty_of(learner, **settings):
    """Return a penalty with one task, with another anchor and a Fisher that varies between weights."""
    anchor, generator = copy.deepcopy(learner), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in anchor.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    fisher = {name: torch.rand(p.shape, generator=generator) for name, p in anchor.named_parameters()}
    penalty = EWCPenalty(LAM, **settings)
    penalty.add(anchor, fisher)
    return penalty


def main(kind, folder, rank, world):
    """Train with SquisherCallback (``squisher``) or EWCCallback (``ewc``) on this process's part of each batch."""
    if kind == "squisher":
        run = trainer("bert", str(folder), [SquisherCallback(beta=0.9)], ddp_backend="gloo", max_grad_norm=0.6)
        run.train()
    else:
        train_with_penalty(folder, world)


def train_with_penalty(folder, world):
    """Train with EWC, and write the state of the penalty."""
    # Or else the Trainer multiplies this model's loss by the number of processes.
    more = {"average_tokens_across_devices": False}
    more |= {"ddp_backend": "gloo", "per_device_train_batch_size": 1} if world == 2 else {}
    learner = model()
    penalty = penalty_of(learner)
    run = trainer("bert", str(folder), [EWCCallback(penalty)], learner, **SETTINGS | more)
    run.train()
    if run.is_world_process_zero():
        torch.save(penalty.state_dict(), folder / "penalty.pt")
