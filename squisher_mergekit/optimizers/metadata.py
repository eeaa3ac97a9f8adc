"""Metadata of a Fisher from an optimizer's state: config, coverage of the weights, and warnings."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from squisher_mergekit.errors import CorruptFileError
from squisher_mergekit.fisher.config import (
    Coverage,
    FisherConfig,
    OptimizerInfo,
    SourceInfo,
    first_error,
    per_parameter,
)
from squisher_mergekit.fisher.files import TIED
from squisher_mergekit.models.convert import MomentStore
from squisher_mergekit.models.names import CheckpointNames
from squisher_mergekit.models.roles import is_running_statistic
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.encodings import Packed
from squisher_mergekit.optimizers.second_moments import Moment
from squisher_mergekit.optimizers.slots import OptimizerSlot
from squisher_mergekit.tensors.input_files import read_mapping
from squisher_mergekit.tensors.safetensors import TensorInfo

LOG = logging.getLogger("squisher_mergekit")
TRAINER_STATE = "trainer_state.json"
_FEW = 20  # steps; merges by Fishers of 20 to 50 steps are as good as those of whole runs
_SHORT = 0.1  # share of the memory 1 / (1 - beta2) of the moving average

T = TypeVar("T")


def make_config(
    raw: RawState,
    slots: Mapping[str, OptimizerSlot],
    store: MomentStore,
    coverage: Coverage,
    model_config: Mapping[str, Any] | None,
    fingerprint: str | None,
    adapter: bool,
) -> FisherConfig:
    """Return the metadata of a Fisher; fields that neither the state nor the folder tells are None.

    Args:
        raw: The states.
        slots: Name in memory -> slot.
        store: The second moments by name on disk.
        coverage: Coverage of the weights by second moments.
        model_config: Content of the model's ``config.json``; None if there is none.
        fingerprint: Fingerprint of the weights beside the state; None if there are none.
        adapter: True for a LoRA adapter.
    """
    file, known = raw.location, raw.known
    made_of = {name: [slots[source] for source in origin.sources] for name, origin in store.conversions.items()}
    kinds = {name: _moment(some[0]) for name, some in made_of.items()}
    moments = list(kinds.values())
    decays = {name: kind.decay for name, kind in kinds.items() if kind.decay is not None}
    steps = {name: min(slot.steps for slot in some if slot.steps is not None)
             for name, some in made_of.items() if all(slot.steps is not None for slot in some)}  # fmt: skip
    settings = {
        "class": _common(kind.class_ for kind in moments),
        "beta2": per_parameter(decays) if len(decays) == len(kinds) else None,
        "decoupled_weight_decay": _common(kind.decoupled for kind in moments),
        "amsgrad": _common(kind.amsgrad for kind in moments),
        "max_grad_norm": known.get("max_grad_norm"),
        "initial_accumulator_value": moments[0].start or None,
    }
    dtypes = {name: str(info.dtype).removeprefix("torch.") for name, info in store.infos.items()}
    encoding = per_parameter(dtypes)
    with _valid_settings(file):
        return FisherConfig(
            estimator="squisher",
            statistic=moments[0].statistic,
            parameters="adapter" if adapter else "model",
            optimizer=OptimizerInfo.model_validate(settings),
            steps=per_parameter(steps) if len(steps) == len(kinds) else None if steps else _global_step(file.parent),
            bias_corrected=moments[0].corrected,
            examples_per_step=known.get("examples_per_step"),
            encoding=encoding if isinstance(encoding, dict) else {"default": str(encoding)},
            source=SourceInfo(
                layout=raw.layout or _layout(file),
                files=(file.name,),
                versions=_versions(model_config or {}) | dict(known.get("versions", {})),
            ),
            coverage=coverage,
            weights_fingerprint=fingerprint,
        )


@contextmanager
def _valid_settings(file: Path) -> Iterator[None]:
    """Turn a number out of its range into one line.

    Raises:
        CorruptFileError: A setting of the optimizer, or its number of steps, is out of its range.
    """
    try:
        yield
    except ValidationError as error:
        raise CorruptFileError(
            f"the settings of the optimizer in {file} must be valid, but {first_error(error)}; save it again"
        ) from None


def make_coverage(
    slots: Mapping[str, OptimizerSlot],
    store: MomentStore,
    checkpoint_names: CheckpointNames | None,
    weights: Mapping[str, TensorInfo],
) -> Coverage:
    """Return the number of weights with a second moment, and for each other weight the reason why it has none.

    Args:
        slots: Name in memory -> slot.
        store: The second moments by name on disk.
        checkpoint_names: The model's names, if known.
        weights: Name on disk -> header of the weights; empty if there are none.
    """
    aliases = checkpoint_names.aliases if checkpoint_names else {}
    kept = {origin.key: name for name, origin in store.conversions.items()}
    names = dict.fromkeys([*(weights or (checkpoint_names.sources if checkpoint_names else slots)), *aliases, *kept])
    without = {}
    for name in names:
        if name in store.infos:
            continue
        tied_to = kept.get(aliases.get(name, name))
        without[name] = f"{TIED}{tied_to}" if tied_to is not None else _reason(name, slots, checkpoint_names, weights)
    return Coverage.model_validate({"with": len(store.infos), "without": without})


def _reason(
    name: str,
    slots: Mapping[str, OptimizerSlot],
    checkpoint_names: CheckpointNames | None,
    weights: Mapping[str, TensorInfo],
) -> str:
    if (name in weights and not weights[name].is_floating_point) or is_running_statistic(name):
        return "a buffer"
    sources: Collection[str] = (name,)
    if checkpoint_names is not None:
        sources = checkpoint_names.sources.get(checkpoint_names.aliases.get(name, name), ())
        if not sources:
            return "no parameter of the model (a buffer)"
    if any(source in slots and slots[source].moment for source in sources):
        return "made of several parameters, of which not all were stepped"
    lacking = [slots[source].lacking for source in sources if source in slots and slots[source].lacking]
    if lacking:
        return "its optimizer keeps no second moment of it (Muon, SGD, SOAP of a convolution)"
    if any(source in slots for source in sources):
        return "never stepped (frozen or unused)"
    return "not given to the optimizer (frozen)"


def warnings_of(slots: Mapping[str, OptimizerSlot], folder: Path) -> Iterator[str]:
    """Yield a warning for each property that makes a Fisher less trustworthy than it looks.

    Args:
        slots: Name in memory -> slot.
        folder: Folder of the checkpoint.
    """
    stepped = [slot for slot in slots.values() if slot.moment is not None and slot.tensor is not None]
    narrow = [
        slot.tensor.dtype
        for slot in stepped
        if slot.tensor is not None and slot.tensor.dtype.itemsize < 4 and (_moment(slot).decay or 0) > 0.95
    ]
    if narrow:
        yield (
            f"{len(narrow)} second moments are stored as {str(narrow[0]).removeprefix('torch.')} with beta2 > 0.95, "
            "where they cannot decay: their scale is not to be trusted (train with float32 weights, or beta2 <= 0.95)"
        )
    packed = sum(isinstance(slot.tensor, Packed) for slot in stepped)
    if packed:
        yield (
            f"{packed} second moments are in 4 bits, where small ones are lost: do not weigh a merge by them "
            "(train with optim adamw_torch or adamw_torch_8bit)"
        )
    yield from dict.fromkeys(caution for slot in stepped if (caution := _moment(slot).caution))
    if any(_moment(slot).coupled_decay for slot in stepped):
        yield "weight decay was added to the gradient before it was squared, and so is part of the Fisher (use AdamW)"
    counted = [slot for slot in stepped if slot.steps is not None]
    if not counted:
        return
    known = [(slot.steps or 0, _moment(slot).decay or 0) for slot in counted]
    short = [steps for steps, decay in known if steps < _FEW and steps * (1 - decay) < _SHORT]
    if short:
        yield (
            f"{len(short)} second moments have seen only {min(short)} steps, the mean of as few batches; 20 to 50 "
            "steps suffice (save a checkpoint later in training)"
        )
    most = max(slot.steps or 0 for slot in counted)
    recorded = _global_step(folder)
    # A gradient scaler skips the steps in which float16 overflowed.
    if recorded is not None and most != recorded and not (most < recorded and (folder / "scaler.pt").is_file()):
        yield f"it has seen {most} steps, but {TRAINER_STATE} says {recorded}; are both of one checkpoint?"


def _moment(slot: OptimizerSlot) -> Moment:
    if slot.moment is None:
        raise TypeError(f"parameter {slot.index} was never stepped")
    return slot.moment


def _common(values: Iterator[T | None]) -> T | None:
    """Return the value that all share; None if they differ."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _layout(file: Path) -> str:
    if (file.parent / TRAINER_STATE).is_file():
        return "transformers-trainer"
    return "accelerate" if file.name == "optimizer.bin" else "torch"


def _versions(model_config: Mapping[str, Any]) -> dict[str, str]:
    version = model_config.get("transformers_version")
    return {"transformers": str(version)} if version else {}


def _global_step(folder: Path) -> int | None:
    file = folder / TRAINER_STATE
    step = read_mapping(file).get("global_step") if file.is_file() else None
    return step if isinstance(step, int) else None
