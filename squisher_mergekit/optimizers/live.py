"""From an optimizer in memory to a Fisher: the parameter object tells the name, so nothing has to be guessed."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.errors import MismatchError, UnsupportedStateError
from squisher_mergekit.fisher.config import FisherConfig, OptimizerInfo, SourceInfo
from squisher_mergekit.fisher.files import tied_aliases
from squisher_mergekit.fisher.fits import check
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.convert import store_moments
from squisher_mergekit.models.parameters import Described, describe, uses_deepspeed, uses_fsdp1
from squisher_mergekit.models.weights import headers
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.ivon import cut, is_flat
from squisher_mergekit.optimizers.metadata import make_config, make_coverage
from squisher_mergekit.optimizers.slots import Slot, parse
from squisher_mergekit.tensors.lazy import MaybeLazy, parts, read
from squisher_mergekit.tensors.safetensors import TensorInfo, check_shape
from squisher_mergekit.tensors.sharded import OnRankZero, is_sharded

LAYOUT = "live"
_NOWHERE = Path("training")  # for messages, where no weights were saved
_CURE = "take squisher extract on the checkpoint"


@dataclass(frozen=True)
class Facts:
    """What training knows and no file of a checkpoint tells, by the keys of ``fisher_config.json``; None: unknown."""

    examples_per_step: float | None = None
    tokens_per_step: float | None = None
    max_grad_norm: float | None = None
    clipped_share: float | None = None
    loss_reduction: str | None = None
    datum: str | None = None

    def note(self, config: FisherConfig) -> FisherConfig:
        """Return the metadata with these facts, where they do not know better themselves."""
        info = config.optimizer or OptimizerInfo()
        if info.max_grad_norm is None:
            info = info.model_copy(update={"max_grad_norm": self.max_grad_norm})
        known = {key: value for key, value in asdict(self).items() if getattr(config, key, value) is None}
        return config.model_copy(update=known | {"optimizer": info})


@dataclass(frozen=True)
class OnCpu:
    """A second moment that is brought to the CPU when read."""

    stored: MaybeLazy

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return torch.Size(self.stored.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        return self.stored.dtype

    @property
    def parts(self) -> Sequence[Tensor]:
        """The tensors it is worked out from."""
        return parts(self.stored)

    def read(self) -> Tensor:
        """Return the second moment."""
        return read(self.stored).detach().cpu()


def unwrap_optimizer(optimizer: Any) -> Any:
    """Take off what accelerate puts around an optimizer."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def states_of(model: nn.Module, optimizers: Sequence[Any], together: OnRankZero) -> tuple[Mapping[str, Any], ...]:
    """Return the states of live optimizers as ``state_dict`` gives them; all processes take part.

    Args:
        model: The model in training.
        optimizers: Unwrapped.
        together: Where sharded tensors are noted.

    Raises:
        UnsupportedStateError: The state cannot be had from here.
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
    return tuple(_state(optimizer, together) for optimizer in optimizers)


def _state(optimizer: Any, together: OnRankZero) -> Mapping[str, Any]:
    states: dict[int, Any] = {}
    groups = []
    for group in optimizer.param_groups:
        numbers = []
        for parameter in group["params"]:
            numbers.append(len(states))
            found = optimizer.state.get(parameter, {})
            states[len(states)] = {key: _form(value, together) for key, value in found.items()}
        groups.append({key: value for key, value in group.items() if key != "param_names"} | {"params": numbers})
    return {"state": states, "param_groups": groups}


def _form(value: Any, together: OnRankZero) -> Any:
    # A sharded tensor of codes is left as it is, and refused as what it is.
    if is_sharded(value) and type(value.to_local()) is Tensor:
        return together.add(value)
    return value


def _gathered_by_torch(model: nn.Module, optimizer: Any) -> Mapping[str, Any]:
    """Return the whole state of FSDP1, keyed by name; empty in all processes but the first."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    # Offloading what is on the CPU already ends the process in some versions of torch.
    offload = next(model.parameters()).device.type != "cpu"
    options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    state: Mapping[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    return state


def squisher_of(
    model: nn.Module,
    optimizers: Sequence[Any],
    states: tuple[Mapping[str, Any], ...],
    weights: Path | None,
    facts: Facts,
) -> tuple[Fisher, Mapping[str, Slot]]:
    """Make a Fisher of what :func:`states_of` returned.

    Args:
        model: The model in training.
        optimizers: Unwrapped.
        states: Their states.
        weights: Folder of the weights as they are now, if they were saved.
        facts: What else is known.

    Returns:
        The Fisher, under the names on disk, and the slots by name.

    Raises:
        RefusedError: There is no second moment, or it does not fit the model or the weights.
    """
    described = describe(model, _headers(weights, "model"))
    saved = RawState((weights or _NOWHERE) / "the live optimizer", states, layout=LAYOUT)
    state = parse(saved)
    if state.named:
        names, shapes = [slot.name for slot in state.slots], [slot.shape for slot in state.slots]
    else:
        trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        names, shapes = [described.names.get(id(p)) for p in trained], [tuple(p.shape) for p in trained]
    if is_flat(state):
        state = cut(state, [shape or () for shape in shapes])
    slots = {}
    for name, slot, shape in zip(names, state.slots, shapes, strict=True):
        if name is not None:
            check_shape(name, slot.shape or shape or (), shape or (), str(saved.place))
            slots[name] = slot
    fisher = fisher_of(slots, described, saved, weights, facts)
    classes = {_class_name(optimizer) for optimizer in optimizers}
    info = fisher.config.optimizer
    if info is not None and info.class_ is None and len(classes) == 1:
        info = info.model_copy(update={"class_": classes.pop()})
        fisher.config = fisher.config.model_copy(update={"optimizer": info})
    return fisher, slots


def fisher_of(
    slots: Mapping[str, Slot], described: Described, saved: RawState, weights: Path | None, facts: Facts
) -> Fisher:
    """Make a Fisher of second moments by name.

    Args:
        slots: Name in memory -> second moment.
        described: The model.
        saved: Where they are from.
        weights: Folder of the weights as they are now, if they were saved.
        facts: What else is known.

    Raises:
        MismatchError: No parameter of the model has a second moment, or names or shapes are not those of the weights.
    """
    beside = _headers(weights, described.basename)
    if described.adapter is not None:
        slots = {described.adapter[name]: slot for name, slot in slots.items() if name in described.adapter}
    moments = {name: OnCpu(slot.tensor) for name, slot in slots.items() if slot.tensor is not None}
    if not moments:
        raise MismatchError(
            "an optimizer's parameters must be the model's, but none of those that it has stepped is; give the "
            "optimizer that trains this model, made after the model was moved or wrapped"
        )
    store = store_moments("the live optimizer", moments, described.checkpoint_names, beside)
    coverage = make_coverage(slots, store, described.checkpoint_names, beside)
    config = make_config(saved, slots, store, coverage, saved.place.parent, described.adapter is not None)
    source = SourceInfo(layout=LAYOUT, versions=_versions())
    config = facts.note(config.model_copy(update={"source": source}))
    fisher = Fisher(store, config, tied_aliases(config))
    if weights is not None:
        check(fisher, beside, weights)
    return fisher


def _headers(weights: Path | None, basename: str) -> dict[str, TensorInfo]:
    return headers(weights, basename) if weights is not None else {}


def _class_name(optimizer: Any) -> str:
    kind = type(optimizer)
    return f"torch.optim.{kind.__name__}" if kind.__module__.startswith("torch.optim.") else (
        f"{kind.__module__}.{kind.__qualname__}"
    )  # fmt: skip


def _versions() -> dict[str, str]:
    """Return the versions of what trains."""
    found = {name: getattr(sys.modules.get(name), "__version__", None) for name in ("torch", "transformers", "peft")}
    return {name: str(version) for name, version in found.items() if version is not None}
