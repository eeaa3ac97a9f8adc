"""Records of a plan: parameters, weights, Fishers and plan of one output tensor."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from squisher_mergekit.fisher.config import Scaling
from squisher_mergekit.fisher.factors.mapping import Side
from squisher_mergekit.merging.sources import ModelFiles, OpenFisher
from squisher_mergekit.merging.votes.options import VoteOptions
from squisher_mergekit.tensors.safetensors import TensorInfo


@dataclass(frozen=True)
class Settings:
    """Parameters of one tensor that hold for all models."""

    scaling: Scaling = "debiased"
    normalize: str = "auto"
    floor: float = 0.0
    missing: str = "error"
    prior: float = 0.0
    structure: str = "diagonal"
    block: int = 128
    write_fisher: bool = False
    votes: VoteOptions = field(default_factory=VoteOptions)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Settings":
        """Return the settings in the parameters of a merge."""
        known = {key: given[key] for key in cls.__dataclass_fields__ if key in given}
        return cls(**known, votes=VoteOptions.of(given))


@dataclass(frozen=True)
class Origin:
    """Base weight at which a model's task vector starts, where the base is not an input of the merge.

    Attributes:
        label: Name of the base in the configuration.
        name: Name of the weight.
        load: Task of the graph that reads the weight; None if the base lacks it.
        stored: As in :class:`WeightInput`.
        info: As in :class:`WeightInput`.
        vocabulary_axis: Axis along which vocabularies are brought to one size; None if none is.
    """

    label: str
    name: str
    load: Hashable | None
    stored: str | None
    info: TensorInfo | None
    vocabulary_axis: int | None = None


@dataclass(frozen=True)
class WeightInput:
    """One model's weight for one output tensor.

    Attributes:
        key: The graph's reference to the model.
        model: Files of the model.
        stored: Name in the model's files; None if the weight is built from other tensors when it is read.
        aliases: Other names of the same tensor.
        info: Header of the weight; None if unknown.
        fisher: The parameter ``fisher:``.
        weight: w_i.
        fisher_scale: Factor on the Fisher.
        density: Share of the task vector that is kept; 1 for a base and for weight 0, where it changes nothing.
        origin: theta_0, where the merge needs it; None in ``ubgm_squisher``, where the base is an input.
        is_base: True for the base model.
        vocabulary_axis: Axis of the vocabulary; None if the weight has none.
    """

    key: Hashable
    model: ModelFiles
    stored: str | None
    aliases: tuple[str, ...]
    info: TensorInfo | None
    fisher: str
    weight: float
    fisher_scale: float
    density: float = 1.0
    origin: Origin | None = None
    is_base: bool = False
    vocabulary_axis: int | None = None

    @property
    def moves(self) -> bool:
        """True for a model with a task vector in the merge."""
        return self.weight > 0 and not self.is_base


@dataclass(frozen=True)
class FisherUse:
    """Tensor of a Fisher that weights one model's weight.

    Attributes:
        input: The model's weight.
        opened: The Fisher; None for F = 0 (``fisher: none``).
        name: Name of the tensor.
        converted: True if transformers' checkpoint conversion builds the tensor from others of the Fisher.
        padding: Axis and size to which rows of F = 0 are added: vocabulary entries added after training.
        sides: Sides of the stored matrix whose recorded factors the merge takes.
        filled: True if F is the mean over layers of the same kind, because the model's LoRA left this one alone.
        left: True if F is 0, because the model's LoRA left the weight alone and knows no layer of its kind.
    """

    input: WeightInput
    opened: OpenFisher | None
    name: str
    converted: bool = False
    padding: tuple[int, int] | None = None
    sides: tuple[Side, ...] = ()
    filled: bool = False
    left: bool = False

    @property
    def warning(self) -> str | None:
        """Warning about rows without a Fisher; None if there are none."""
        if self.padding is None or self.opened is None:
            return None
        axis, size = self.padding
        fisher, label = self.opened.fisher, self.input.model.label
        return (
            f"{self.name} of {label} has {size} rows, but {fisher.location} {fisher.info(self.name).shape[axis]}; the "
            "rows added since then count as unseen (F = 0)"
        )


@dataclass(frozen=True)
class TensorPlan:
    """Plan of one output tensor.

    Attributes:
        name: Name of the tensor.
        size: Number of entries.
        settings: Parameters for all models.
        normalize: ``none``, ``mean`` or ``l2``.
        uses: One Fisher tensor for each model; empty if the tensor needs none (a buffer, a tensor of one model alone).
        missing: Model -> reason why it has no Fisher here. If there is one, the tensor is the weighted mean.
        inputs: The models' weights.
        is_buffer: True for a buffer of real numbers, which can have no Fisher and is the weighted mean.
        is_integer: True for integers, which mergekit copies.
        coupled: True for a matrix that is merged with coupled rows or columns.
        uncoupled: Reason why a structure leaves the tensor to the diagonal; empty if none does.
        transposed: True for a matrix ``[in, out]``.
        is_untouched: True for a weight of the base that no LoRA changes, which is copied.
    """

    name: str
    size: int
    settings: Settings
    normalize: str
    uses: tuple[FisherUse, ...]
    missing: dict[str, str]
    inputs: tuple[WeightInput, ...]
    is_buffer: bool = False
    is_integer: bool = False
    coupled: bool = False
    uncoupled: str = ""
    transposed: bool = False
    is_untouched: bool = False

    @property
    def is_copied(self) -> bool:
        """True for a tensor that mergekit copies: one model alone has it, no LoRA changes it, or it is of integers."""
        return not self.uses and not self.missing

    def differenced(self) -> tuple[WeightInput, ...]:
        """Return the inputs whose difference to the base the merge needs."""
        merged = self.inputs if self.missing else tuple(use.input for use in self.uses)
        votes = self.settings.votes
        if self.coupled or (votes.extent != 1 if self.missing else votes.of_origin):
            return tuple(item for item in merged if item.moves and not self.is_buffer)
        return () if self.missing else tuple(item for item in merged if item.density < 1)

    def trimmed_by_model(self) -> tuple[WeightInput, ...]:
        """Return the inputs that one threshold for the whole model trims."""
        trimmed = tuple(use.input for use in self.uses if use.input.density < 1)
        return trimmed if self.settings.votes.whole_model else ()

    def weights(self) -> list[TensorInfo]:
        """Return the headers of the weights that the merge reads, theta_0 included."""
        read = [item.info for item in self.inputs if item.info is not None]
        base = {item.stored for item in self.inputs if item.is_base}
        origins = [item.origin for item in self.differenced() if item.origin is not None]
        other = {origin.stored: origin.info for origin in origins if origin.stored not in base}
        return read + [info for info in other.values() if info is not None]
