"""Start of a recorder in a run of the Hugging Face Trainer: its settings, its hooks, and the resumed state."""

from __future__ import annotations

from typing import Any

from torch import nn

from squisher_mergekit.errors import ConfigError, UnsupportedStateError
from squisher_mergekit.models.parameters import uses_deepspeed
from squisher_mergekit.training.lora.files import read_state
from squisher_mergekit.training.lora.recorder import LIFT_CURE, LoraRecorder, check_beta
from squisher_mergekit.training.writing import attempt, resumed_from


def check_lift(lift: str, beta: float, factors: str | None) -> None:
    """Refuse settings of a recorder that are out of their range.

    Args:
        lift: ``record``.
        beta: Decay per optimizer step.
        factors: The factors of gradients to record as well; none can be.

    Raises:
        ConfigError: A setting is out of its range.
    """
    if lift != "record":
        raise ConfigError(f"lift must be None or 'record', found {lift!r}; to lift a finished run, {LIFT_CURE}")
    if factors is not None:
        raise ConfigError(
            f"factors must be None with lift='record', as they are of A and B and not of the merged weights, found "
            f"{factors!r}; give one of both"
        )
    check_beta(beta)


def begin(model: nn.Module, optimizer: Any, args: Any, state: Any, beta: float) -> LoraRecorder:
    """Return a recorder of a model, with the state of the checkpoint from which a run resumes.

    A state that cannot be read is logged, and the averages begin anew.

    Args:
        model: The model in training.
        optimizer: Its optimizer.
        args: The Trainer's arguments.
        state: The Trainer's state.
        beta: Decay per optimizer step.

    Raises:
        UnsupportedStateError: The model trains no plain LoRA, or is split.
    """
    if uses_deepspeed(model, optimizer) or getattr(args, "n_gpu", 1) > 1:
        raise UnsupportedStateError(
            "a recorder needs the whole gradient of A and B in one process per GPU, but DeepSpeed shards it and "
            f"DataParallel copies the model; train with DDP (torchrun), or {LIFT_CURE}"
        )
    recorder = LoraRecorder(model, beta, args.seed)
    if state.global_step:
        attempt("the recorder begins anew", lambda: read_state(recorder, resumed_from(args, state)))
    return recorder
