"""Requirements of an estimate on its arguments and its model."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

from squisher_mergekit.errors import ConfigError, UnsupportedStateError
from squisher_mergekit.estimators.output_gradients import Labels
from squisher_mergekit.estimators.tasks import DataTask, Datum, Task
from squisher_mergekit.fisher.config import Estimator
from squisher_mergekit.models.parameters import uses_fsdp1
from squisher_mergekit.tensors.sharded import is_sharded, sharded_modules

Grouping = Literal["example", "batch"]
ESTIMATORS: dict[tuple[Labels, Grouping], Estimator] = {
    ("true", "example"): "empirical",
    ("sampled", "example"): "sampled",
    ("exact", "example"): "exact",
    ("predicted", "example"): "predicted",
    ("true", "batch"): "joint_empirical",
    ("sampled", "batch"): "joint_sampled",
}


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise if an argument is none of its choices.

    Raises:
        ConfigError: The message names the nearest choice.
    """
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, found {value!r}{hint}")


def check_labels(labels: Labels, grouping: Grouping) -> None:
    """Raise if no Fisher has these labels and this grouping.

    Raises:
        ConfigError: An unknown name, or ``batch`` with labels other than ``true`` and ``sampled``.
    """
    check_choice("labels", labels, get_args(Labels))
    check_choice("grouping", grouping, get_args(Grouping))
    if (labels, grouping) not in ESTIMATORS:
        raise ConfigError(
            f"grouping batch needs labels true or sampled, found {labels}; take one of these, or grouping example"
        )


def check_task(task: Task, datum: Datum) -> None:
    """Raise if a task or datum has an unknown name.

    Raises:
        ConfigError: The message names the nearest one.
    """
    check_choice("task", task, ("auto", *get_args(DataTask)))
    check_choice("datum", datum, get_args(Datum))


def check_model(model: nn.Module, grouping: Grouping, offload: bool = False) -> None:
    """Raise if the model's parameters cannot be differentiated in their own shapes.

    Args:
        model: The model, with its wrappers.
        grouping: ``batch`` excludes sharded models.
        offload: True excludes sharded models.

    Raises:
        ConfigError: All parameters are frozen.
        UnsupportedStateError: The parameters are flattened, or sharded in another way than by FSDP2.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError("a Fisher needs trainable parameters, but all are frozen; set requires_grad")
    if uses_fsdp1(model) or any(hasattr(parameter, "ds_id") for parameter in parameters):
        raise UnsupportedStateError(
            "a Fisher needs parameters of their own shapes, but FSDP1 and DeepSpeed flatten them; take FSDP2 "
            "(fully_shard), or a model in each process"
        )
    if any(parameter.is_meta for parameter in parameters):
        raise UnsupportedStateError(
            "a Fisher needs parameters in memory, but some are on the meta device, as a device_map leaves what it "
            "offloads to the host or the disk; load the whole model on GPUs, or on the CPU"
        )
    if not any(is_sharded(parameter) for parameter in parameters):
        return
    if not sharded_modules(model):
        raise UnsupportedStateError(
            "a sharded model must use FSDP2, but its tensors are split in another way, such as tensor parallelism; "
            "take fully_shard, or a model in each process"
        )
    if offload:
        raise UnsupportedStateError(
            "offload moves the accumulators of a whole model to the host, but FSDP2 shards this one; take a model in "
            "each process, or leave offload out"
        )
    if grouping == "batch":
        raise UnsupportedStateError(
            "grouping batch squares the gradient of one process's batch, but FSDP2 sums gradients over all processes; "
            "take grouping example, or a model in each process"
        )
