"""Metadata of a Fisher, and the scale that follows from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.tensors.input_files import read_json

FORMAT_VERSION = 1
CONFIG_NAME = "fisher_config.json"
AS_STORED = "second moments without metadata"  # layout of plain safetensors

Estimator = Literal[
    "squisher", "empirical", "sampled", "exact", "predicted", "joint_empirical", "joint_sampled", "ema_empirical",
    "lifted_lora", "recorded_lora", "merged",
]  # fmt: skip
Statistic = Literal["ema", "sum", "mean"]
Scaling = Literal["raw", "debiased", "per_example"]
_OF_LORAS = ("lifted_lora", "recorded_lora")
_SQUISHERS = ("squisher", *_OF_LORAS)

# Ranges of the numbers: products and quotients of them with entries of a float32 tensor stay finite.
_LEAST, _MOST = 1e-307, 1e200
MOST_COUNT = 10**15


def _number(value: Any) -> Any:
    """Refuse a flag or a text in the place of a number, which pydantic would convert."""
    if isinstance(value, bool | str):
        raise ValueError("must be a number")
    return value


_Number = BeforeValidator(_number)
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), _Number]
Count = Annotated[int, Field(ge=0, le=MOST_COUNT), _Number]
BatchSize = Annotated[float, Field(gt=0, le=MOST_COUNT, allow_inf_nan=False), _Number]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), _Number]
NotNegative = Annotated[float, Field(ge=0, le=_MOST, allow_inf_nan=False), _Number]
Flag = Annotated[bool, Field(strict=True)]

T = TypeVar("T")


def in_range(value: float) -> float | None:
    """Return a mean or norm as it is; None where it is outside the range of a Fisher's metadata.

    Example:
        >>> in_range(0.5), in_range(float("inf"))
        (0.5, None)
    """
    return value if value == 0 or _LEAST <= value <= _MOST else None


def _check_moment(value: float) -> float:
    """Refuse a mean or norm so small that its reciprocal could overflow."""
    if in_range(value) is None:
        raise ValueError(f"a mean or norm must be 0 or between {_LEAST} and {_MOST}")
    return value


def _unless_infinite(value: Any) -> Any:
    """Return None for an infinite norm, at which nothing is clipped."""
    return None if value == math.inf else value


MomentValue = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_check_moment), _Number]


class _Frozen(BaseModel):
    """Immutable model that forbids unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OptimizerInfo(_Frozen):
    """Optimizer whose accumulator a Squisher is; an unknown value is None.

    Args:
        class_: Qualified name of the optimizer's class (``class`` in the file).
        beta2: Decay of the moving average (RMSprop's alpha, Adadelta's rho): a number, or a mapping
            ``{"default": ..., parameter name: ...}``.
        decoupled_weight_decay: False if weight decay was added to the gradient, as by Adam's L2 penalty.
        amsgrad: True if the accumulator is AMSGrad's running maximum.
        max_grad_norm: Norm at which gradients were clipped.
        initial_accumulator_value: Adagrad's initial value, recorded only if it is not 0.
    """

    class_: str | None = Field(default=None, alias="class")
    beta2: Decay | dict[str, Decay] | None = None
    decoupled_weight_decay: Flag | None = None
    amsgrad: Flag | None = None
    max_grad_norm: Annotated[NotNegative | None, BeforeValidator(_unless_infinite)] = None
    initial_accumulator_value: NotNegative | None = None

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class SourceInfo(_Frozen):
    """Source of a Fisher.

    Args:
        layout: Name of the checkpoint's layout on disk.
        files: Relative names of the files that were read.
        versions: Package -> version that wrote them.
        model: Hub id of the model.
    """

    layout: str | None = None
    files: tuple[str, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    model: str | None = None


class Coverage(_Frozen):
    """Coverage of a model's tensors by a Fisher.

    Args:
        with_: Number of tensors with a Fisher (``with`` in the file).
        without: Name of each other tensor -> the reason why it has none.
    """

    with_: Count = Field(default=0, alias="with")
    without: dict[str, str] = Field(default_factory=dict)

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class FactorsInfo(_Frozen):
    """Factors over rows and columns of matrices, beside the diagonal; an unknown value is None.

    Args:
        source: Origin of the factors: ``optimizer`` (a state of Shampoo or SOAP), ``recorded`` during training from
            gradients of batches, or ``estimated`` from data.
        statistic: ``ema`` (moving average), ``sum`` or ``mean`` of ``G G^T`` and ``G^T G``.
        rows: Names of the matrices with a factor over their rows.
        columns: Names of the matrices with a factor over their columns.
        form: ``full`` blocks, or ``low_rank`` for vectors and a level.
        decay: Decay of a moving average.
        every: Number of optimizer steps per recorded gradient.
        steps: Number of gradients behind a factor.
        initial: Multiple of the identity that a factor began with.
        num_examples: Number of examples behind an estimate.
        error: Relative error of the stored factors against those before compression, in the Frobenius norm.
    """

    source: Literal["optimizer", "recorded", "estimated"]
    statistic: Statistic
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    form: Literal["full", "low_rank"] = "full"
    decay: Decay | None = None
    every: Count | None = None
    steps: Count | None = None
    initial: NotNegative | None = None
    num_examples: Count | None = None
    error: NotNegative | None = None


class FisherConfig(_Frozen):
    """Metadata of a Fisher (``fisher_config.json``); an unknown value is None.

    Args:
        format_version: Version of the file format.
        estimator: The estimator that made the Fisher.
        statistic: ``ema`` (moving average), ``sum`` or ``mean`` of squared gradients.
        parameters: ``model``, or ``adapter`` for the Fisher of a LoRA.
        optimizer: The optimizer of a Squisher.
        steps: Optimizer steps behind the accumulator: a number, or ``{"default": ..., parameter name: ...}``.
        bias_corrected: True if a moving average is divided by ``1 - beta2^steps`` already.
        examples_per_step: Examples behind one optimizer step, over all processes and accumulation.
        tokens_per_step: Tokens behind one optimizer step.
        clipped_share: Share of the steps whose gradient was clipped.
        loss_reduction: Reduction of the loss over a batch, such as ``mean``.
        datum: Unit of a computed Fisher: ``example`` or ``token``.
        num_examples: Number of examples behind a computed Fisher.
        mean: Mean over all entries, debiased.
        norm: L2 norm over all entries, debiased.
        encoding: dtype or compact form, by parameter name and ``default``.
        source: The files that the Fisher comes from.
        coverage: The tensors with and without a Fisher.
        weights_fingerprint: Digest of the weights at which the Fisher was made.
        factors: The factors beside the diagonal; None if there are none.

    Example:
        >>> config = FisherConfig(estimator="squisher", statistic="ema", steps=1, optimizer={"beta2": 0.999})
        >>> round(config.factor("w", "debiased"), 3)
        1000.0
    """

    format_version: int = FORMAT_VERSION
    estimator: Estimator | None = None
    statistic: Statistic | None = None
    parameters: Literal["model", "adapter"] = "model"
    optimizer: OptimizerInfo | None = None
    steps: Count | dict[str, Count] | None = None
    bias_corrected: Flag | None = None
    examples_per_step: BatchSize | None = None
    tokens_per_step: BatchSize | None = None
    clipped_share: Share | None = None
    loss_reduction: str | None = None
    datum: str | None = None
    num_examples: Count | None = None
    mean: MomentValue | None = None
    norm: MomentValue | None = None
    encoding: dict[str, str] = Field(default_factory=lambda: {"default": "float32"})
    source: SourceInfo = Field(default_factory=SourceInfo)
    coverage: Coverage = Field(default_factory=Coverage)
    weights_fingerprint: str | None = None
    factors: FactorsInfo | None = None

    @property
    def from_optimizer(self) -> bool:
        """True for an optimizer's accumulator (a Squisher), and for its like of the merged weights of a LoRA."""
        return self.estimator in _SQUISHERS

    @property
    def of_squishers(self) -> bool:
        """True for a Squisher, and for the Fisher of a merge of Squishers at their own scales."""
        return self.from_optimizer or (self.estimator == "merged" and self.source.layout == "merge of squishers")

    @property
    def of_lora(self) -> bool:
        """True for the Fisher of a LoRA's merged weights, which has rank 1 in each of them."""
        return self.estimator in _OF_LORAS

    @property
    def as_stored(self) -> bool:
        """True for second moments that were published without their steps or beta2: no scale but ``raw`` is known."""
        return self.source.layout == AS_STORED and (
            self.steps is None or not self.optimizer or self.optimizer.beta2 is None
        )

    @property
    def of_batches(self) -> bool:
        """True if the squared gradients are those of whole batches (a Squisher, or ``GradientSquares``)."""
        return self.estimator in (*_SQUISHERS, "ema_empirical")

    def steps_of(self, name: str) -> int | None:
        """Return the number of optimizer steps behind the accumulator of one parameter."""
        return of_parameter(self.steps, name)

    def beta2_of(self, name: str) -> float | None:
        """Return the decay of the moving average of one parameter."""
        return of_parameter(self.optimizer.beta2, name) if self.optimizer else None

    def offset(self, scaling: Scaling) -> float:
        """Return the number to subtract from raw entries before :meth:`factor` (Adagrad's initial value)."""
        start = self.optimizer.initial_accumulator_value if self.optimizer else None
        return 0.0 if scaling == "raw" or self.statistic != "sum" or start is None else start

    def factor(self, name: str, scaling: Scaling, where: str = "this Fisher") -> float:
        """Return the factor from raw entries, less :meth:`offset`, to a scale.

        * ``raw``: 1.
        * ``debiased``, the mean square per step: ``1 / (1 - beta2^t)`` for a moving average without bias correction,
          ``1 / t`` for an optimizer's sum, ``1 / num_examples`` for a computed sum, 1 for a mean.
        * ``per_example``: the debiased factor, times ``examples_per_step`` if the squared gradients are those of
          batches (Eq. 12 of the paper: a mean loss over B examples gives ``v ~ g^2 / B``).

        Args:
            name: Parameter name (steps and decay may differ between parameters).
            scaling: The scale.
            where: Place of the Fisher, for the error.

        Returns:
            A positive factor.

        Raises:
            ConfigError: The scaling needs a number that the metadata lack.
        """
        if scaling == "raw":
            return 1.0
        debiased = self._debias(name, where)
        if scaling == "debiased" or not self.of_batches:
            return debiased
        if not self.examples_per_step:
            raise ConfigError(
                f"scaling per_example needs examples_per_step, which {where} does not record; "
                "extract it again with --examples-per-step N, or use scaling: debiased"
            )
        return debiased * self.examples_per_step

    def _debias(self, name: str, where: str) -> float:
        """Return the factor from raw entries to the mean square per step."""
        if self.statistic in ("mean", None):
            return 1.0
        if self.statistic == "sum":
            count = self.steps_of(name) if self.from_optimizer else self.num_examples
            if not count:
                missing = "steps" if self.from_optimizer else "num_examples"
                raise ConfigError(f"scaling debiased of a sum needs {missing}, which {where} lacks; use raw")
            return 1.0 / count
        if self.bias_corrected or self.as_stored:
            return 1.0
        steps, beta2 = self.steps_of(name), self.beta2_of(name)
        if not steps or beta2 is None:
            missing = "steps" if not steps else "beta2"
            raise ConfigError(
                f"scaling debiased needs the {missing} of {name}, which {where} does not record; give "
                f"--{missing} to squisher extract, or use scaling: raw"
            )
        return 1.0 / (1.0 - float(beta2) ** steps)

    def to_json(self) -> str:
        """Return the text of ``fisher_config.json``, with all keys; unknown values are ``null``.

        ``factors`` is written only if there are factors, so that earlier versions read all other files.
        """
        data = self.model_dump(mode="json", by_alias=True)
        if self.factors is None:
            del data["factors"]
        if self.optimizer is not None and self.optimizer.initial_accumulator_value is None:
            del data["optimizer"]["initial_accumulator_value"]
        return json.dumps(data, indent=2) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> FisherConfig:
        """Read ``fisher_config.json``.

        Args:
            path: The file.

        Returns:
            The metadata.

        Raises:
            CorruptFileError: The file is not JSON.
            ConfigError: A later version wrote the file, or a value does not fit.
        """
        data = read_json(path, "extract the Fisher again")
        version = data.get("format_version") if isinstance(data, dict) else None
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ConfigError(
                f"{path} must have a format_version of at most {FORMAT_VERSION}, found {_shown(version)}; "
                "upgrade squisher-mergekit"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"{path} must have valid values, but {first_error(error)}; extract it again") from error


def first_error(error: ValidationError) -> str:
    """Return place, reason and value of the first of pydantic's errors; of those of a union, of the deepest."""
    errors = error.errors(include_url=False)
    field = len(errors[0]["loc"]) - 1
    same = [each for each in errors if each["loc"][:field] == errors[0]["loc"][:field]]
    first = max(same, key=lambda each: len([part for part in each["loc"] if not _is_type(part)]))
    place = ".".join(str(part) for part in first["loc"] if not _is_type(part))
    return f"{place}: {first['msg']}, found {_shown(first['input'])}"


def _is_type(part: str | int) -> bool:
    """Return True for a part of pydantic's places that names a type of a union."""
    return str(part).startswith(("constrained-", "dict[", "function-", "lax-or-strict["))


def _shown(value: Any) -> str:
    """Return a value as text of at most 80 characters."""
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):  # a number with too many digits to print
        return f"a {type(value).__name__}"


def of_parameter(value: T | dict[str, T] | None, name: str) -> T | None:
    """Return the value of one parameter, from a common value or a mapping ``{"default": ..., name: ...}``.

    Example:
        >>> of_parameter({"default": 1200, "head.weight": 900}, "head.weight")
        900
    """
    if isinstance(value, dict):
        return value.get(name, value.get("default"))
    return value


def per_parameter(values: dict[str, T]) -> T | dict[str, T] | None:
    """Return the short form of a value per parameter: the common value, or ``{"default": ..., name: ...}``.

    Example:
        >>> per_parameter({"a": 5, "b": 5, "c": 3})
        {'default': 5, 'c': 3}
    """
    if not values:
        return None
    counts: dict[Any, int] = {}
    for value in values.values():
        counts[value] = counts.get(value, 0) + 1
    common = max(counts, key=lambda value: counts[value])
    if len(counts) == 1:
        return common  # type: ignore[no-any-return]
    return {"default": common} | {name: value for name, value in values.items() if value != common}
