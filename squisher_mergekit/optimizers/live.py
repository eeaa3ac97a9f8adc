"""From an optimizer in memory to a Fisher: the parameter objects give the names."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from squisher_mergekit.errors import ConfigError, MismatchError, UnsupportedStateError
from squisher_mergekit.fisher.config import FisherConfig, OptimizerInfo, SourceInfo, first_error
from squisher_mergekit.fisher.files import tied_aliases
from squisher_mergekit.fisher.fits import check_headers
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.convert import store_moments
from squisher_mergekit.models.parameters import ParameterNames, describe, uses_deepspeed, uses_fsdp1
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.ivon import cut, is_flat
from squisher_mergekit.optimizers.metadata import make_config, make_coverage
from squisher_mergekit.optimizers.preconditioners.attach import factors_of
from squisher_mergekit.optimizers.slots import OptimizerSlot, parse
from squisher_mergekit.tensors.lazy import MaybeLazy, parts, read
from squisher_mergekit.tensors.safetensors import check_shape
from squisher_mergekit.tensors.sharded import OnRankZero, is_sharded

LAYOUT = "live"
_NOWHERE = Path("training")  # location in messages where no weights were saved
_CURE = "take squisher extract on the checkpoint"


@dataclass(frozen=True)
class TrainingInfo:
    """Metadata of a training run that no file of a checkpoint records; None where unknown.

    Attributes:
        examples_per_step: Examples behind one optimizer step, over all processes and accumulation.
        tokens_per_step: The same in tokens.
        max_grad_norm: Norm at which gradients were clipped.
        clipped_share: Share of the steps in which clipping was active.
        loss_reduction: Reduction of the loss over the examples, such as ``mean``.
        datum: Unit of the loss: ``example`` or ``token``.

    Raises:
        ConfigError: A value is none that the metadata of a Fisher can have: no reader would open the file.
    """

    examples_per_step: float | None = None
    tokens_per_step: float | None = None
    max_grad_norm: float | None = None
    clipped_share: float | None = None
    loss_reduction: str | None = None
    datum: str | None = None

    def __post_init__(self) -> None:
        fields = asdict(self)
        try:
            OptimizerInfo(max_grad_norm=fields.pop("max_grad_norm"))
            FisherConfig(**fields)
        except ValidationError as error:
            raise ConfigError(
                f"the numbers of a training run must be in range, but {first_error(error)}; correct it, or leave it out"
            ) from error

    def note(self, config: FisherConfig) -> FisherConfig:
        """Return the metadata of a Fisher, its unknown fields filled from this run."""
        info = config.optimizer or OptimizerInfo()
        if info.max_grad_norm is None:
            info = info.model_copy(update={"max_grad_norm": self.max_grad_norm})
        facts = {key: value for key, value in asdict(self).items() if key != "max_grad_norm"}
        known = {key: value for key, value in facts.items() if getattr(config, key) is None}
        return config.model_copy(update=known | {"optimizer": info})


@dataclass(frozen=True)
class OnCpu:
    """Lazy tensor that is copied to the CPU when it is read.

    Attributes:
        stored: The tensor, on any device.
    """

    stored: MaybeLazy

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return torch.Size(self.stored.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the entries."""
        return self.stored.dtype

    @property
    def parts(self) -> Sequence[Tensor]:
        """Stored tensors that the result is computed from."""
        return parts(self.stored)

    def read(self) -> Tensor:
        """Return the tensor on the CPU."""
        return read(self.stored).detach().cpu()


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's wrapper."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def states_of(model: nn.Module, optimizers: Sequence[Any], on_rank_zero: OnRankZero) -> tuple[Mapping[str, Any], ...]:
    """Return the states of live optimizers, in the form of ``state_dict``; all ranks must call this together.

    Args:
        model: The model in training.
        optimizers: The optimizers, unwrapped.
        on_rank_zero: Collects the sharded tensors, so that rank 0 can gather them.

    Raises:
        UnsupportedStateError: DeepSpeed or ZeroRedundancyOptimizer keeps the state out of reach.
    """
    for optimizer in optimizers:
        if uses_deepspeed(model, optimizer):
            raise UnsupportedStateError(
                f"the state of an optimizer must be within reach, but DeepSpeed keeps it in flat buffers; {_CURE}"
            )
        if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
            raise UnsupportedStateError(
                "the state of an optimizer must be within reach, but ZeroRedundancyOptimizer spreads it over the "
                "processes; train with FSDP2, or save its consolidated state_dict and take squisher extract on it"
            )
    if uses_fsdp1(model):
        return tuple(_gathered_by_torch(model, optimizer) for optimizer in optimizers)
    return tuple(_state(optimizer, on_rank_zero) for optimizer in optimizers)


def _state(optimizer: Any, on_rank_zero: OnRankZero) -> Mapping[str, Any]:
    states: dict[int, Any] = {}
    groups = []
    for group in optimizer.param_groups:
        numbers = []
        for parameter in group["params"]:
            numbers.append(len(states))
            found = optimizer.state.get(parameter, {})
            states[len(states)] = {key: _lazy_if_sharded(value, on_rank_zero) for key, value in found.items()}
        groups.append({key: value for key, value in group.items() if key != "param_names"} | {"params": numbers})
    return {"state": states, "param_groups": groups}


def _lazy_if_sharded(value: Any, on_rank_zero: OnRankZero) -> Any:
    # A sharded tensor of quantized codes stays as it is, so that a later stage names it in its refusal.
    if is_sharded(value) and type(value.to_local()) is Tensor:
        return on_rank_zero.add(value)
    return value


def _gathered_by_torch(model: nn.Module, optimizer: Any) -> Mapping[str, Any]:
    """Return the whole state of FSDP1 by name on rank 0, and an empty state on the other ranks."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    # Offloading a tensor that is on the CPU already aborts the process in some versions of torch.
    offload = next(model.parameters()).device.type != "cpu"
    options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    state: Mapping[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    return state


def squisher_of(
    model: nn.Module,
    optimizers: Sequence[Any],
    states: tuple[Mapping[str, Any], ...],
    folder: Path | None,
    info: TrainingInfo,
) -> tuple[Fisher, Mapping[str, OptimizerSlot]]:
    """Build a Fisher from the result of :func:`states_of`.

    Args:
        model: The model in training.
        optimizers: The optimizers, unwrapped.
        states: Their states.
        folder: Folder of the weights saved at this step; None if they were not saved.
        info: Metadata of the training run.

    Returns:
        The Fisher, under the names on disk, and name in memory -> slot.

    Raises:
        RefusedError: No parameter has a second moment, or a second moment does not fit the model or the weights.
    """
    weights = None if folder is None else Weights(folder)
    described = describe(model, weights.infos if weights is not None else ())
    raw = RawState((folder or _NOWHERE) / "the live optimizer", states, layout=LAYOUT)
    state = parse(raw)
    if state.named:
        names, shapes = [slot.name for slot in state.slots], [slot.shape for slot in state.slots]
    else:
        trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        names, shapes = [described.names.get(id(p)) for p in trained], [tuple(p.shape) for p in trained]
    if is_flat(state):
        state = cut(state, [shape or () for shape in shapes])
    slots: dict[str, OptimizerSlot] = {}
    for name, slot, shape in zip(names, state.slots, shapes, strict=True):
        if name is None or (name in slots and slot.tensor is None):
            continue
        if name in slots and slots[name].tensor is not None:
            raise UnsupportedStateError(
                f"a parameter must have one second moment, but {name} has one in each of two optimizers; give the "
                "optimizer whose Squisher is wanted"
            )
        check_shape(name, (shape or ()) if slot.shape is None else slot.shape, shape or (), str(raw.location))
        slots[name] = slot
    fisher = fisher_of(slots, described, raw, weights, info)
    classes = {_class_name(optimizer) for optimizer in optimizers}
    recorded = fisher.config.optimizer
    if recorded is not None and recorded.class_ is None and len(classes) == 1:
        recorded = recorded.model_copy(update={"class_": classes.pop()})
        fisher.config = fisher.config.model_copy(update={"optimizer": recorded})
    return fisher, slots


def fisher_of(
    slots: Mapping[str, OptimizerSlot],
    described: ParameterNames,
    raw: RawState,
    weights: Weights | None,
    info: TrainingInfo,
) -> Fisher:
    """Build a Fisher from named second moments.

    Args:
        slots: Name in memory -> slot.
        described: The names of the model's parameters.
        raw: The states that the slots are from.
        weights: The weights saved at this step; None if they were not saved.
        info: Metadata of the training run.

    Raises:
        MismatchError: No parameter of the model has a second moment, or names or shapes are not those of the weights.
    """
    if weights is not None and weights.basename != described.basename:
        weights = Weights(weights.folder, described.basename)
    infos = {} if weights is None else weights.infos
    if described.adapter is not None:
        slots = {described.adapter[name]: slot for name, slot in slots.items() if name in described.adapter}
    moments = {name: OnCpu(slot.tensor) for name, slot in slots.items() if slot.tensor is not None}
    if not moments:
        raise MismatchError(
            "an optimizer's parameters must be the model's, but none of those that it has stepped is; give the "
            "optimizer that trains this model, made after the model was moved or wrapped"
        )
    store = store_moments("the live optimizer", moments, described.checkpoint_names, infos)
    coverage = make_coverage(slots, store, described.checkpoint_names, infos)
    fingerprint = None if weights is None else weights.fingerprint
    config = make_config(raw, slots, store, coverage, None, fingerprint, described.adapter is not None)
    source = SourceInfo(layout=LAYOUT, versions=_versions())
    config = info.note(config.model_copy(update={"source": source}))
    fisher = Fisher(store, config, tied_aliases(config), factors_of(slots, store))
    if weights is not None:
        check_headers(fisher, weights)
    return fisher


def _class_name(optimizer: Any) -> str:
    kind = type(optimizer)
    return f"torch.optim.{kind.__name__}" if kind.__module__.startswith("torch.optim.") else (
        f"{kind.__module__}.{kind.__qualname__}"
    )  # fmt: skip


def _versions() -> dict[str, str]:
    """Return the versions of the imported training libraries."""
    found = {name: getattr(sys.modules.get(name), "__version__", None) for name in ("torch", "transformers", "peft")}
    return {name: str(version) for name, version in found.items() if version is not None}
