"""Process of a run of the Trainer in a group, as torchrun starts it."""

import torch

from squisher_mergekit import SquisherCallback
from squisher_mergekit.training.ewc import EWCCallback
from tests.training.cases import trainer


def main(kind, folder, rank, world):
    """Train with SquisherCallback (``squisher``) or EWCCallback (``ewc``) on this process's part of each batch."""
    if kind == "squisher":
        run = trainer("bert", str(folder), [SquisherCallback(beta=0.9)], ddp_backend="gloo", max_grad_norm=0.6)
        run.train()
    else:
        train_with_penalty(folder, world)
    if world > 1:
        torch.distributed.destroy_process_group()


def train_with_penalty(folder, world):
    """Train with EWC, and write the state of the penalty."""
    from tests.training.test_ewc import SETTINGS, model, penalty_of

    # Or else the Trainer multiplies this model's loss by the number of processes.
    more = {"average_tokens_across_devices": False}
    more |= {"ddp_backend": "gloo", "per_device_train_batch_size": 1} if world == 2 else {}
    learner = model()
    penalty = penalty_of(learner)
    run = trainer("bert", str(folder), [EWCCallback(penalty)], learner, **SETTINGS | more)
    run.train()
    if run.is_world_process_zero():
        torch.save(penalty.state_dict(), folder / "penalty.pt")
