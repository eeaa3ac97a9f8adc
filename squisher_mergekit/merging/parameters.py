"""Parameters of the two merge methods: names, defaults, accepted values, places in the YAML."""

import difflib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from squisher_mergekit.errors import ConfigError

SQUISHER = "squisher"
UBGM_SQUISHER = "ubgm_squisher"
METHODS = (SQUISHER, UBGM_SQUISHER)
# Numbers, for which a list in the YAML is a gradient over the layers.
GRADIENTS = ("weight", "fisher_scale", "density", "power", "lambda", "floor", "prior", "damping")
# Scores of the entries that ``density`` keeps.
SCORES = ("fisher", "change", "magnitude", "random")
# Structures beyond the diagonal, with their damping.
DAMPING = {"rows": 0.1, "columns": 0.01, "kron": 0.03}


@dataclass(frozen=True)
class MergeParameter:
    """One parameter of a merge method.

    Attributes:
        name: Name in the YAML.
        default: Value if the YAML has none.
        check: Function that returns the value to use, or raises a ``ValueError`` with the accepted values.
        per_model: True if each model has its own value.
        methods: Merge methods that have the parameter.
        meaning: Description in mergekit's list of methods.
    """

    name: str
    default: Any
    check: Callable[[Any], Any]
    per_model: bool = False
    methods: tuple[str, ...] = METHODS
    meaning: str = ""

    def validate(self, value: Any) -> Any:
        """Return the checked value.

        Raises:
            ConfigError: The parameter does not accept the value.
        """
        try:
            return self.check(value)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"parameter {self.name} must be {error}, found {value!r}") from None


# Products of two such factors, a debiasing and a normalizer stay within float64, and their ratios within float32.
_FACTOR = (1e-30, 1e30)
# Relative to a tensor's mean F; beyond it, float32 cannot tell the result from the limit.
_MOST_OF_MEAN = 1e9
_MOST_POWER = 100.0
_LEAST_DAMPING = 1e-6  # in units of the mean eigenvalue; float32 cannot solve with less


def _number(value: Any, zero: bool, least: float, most: float) -> float:
    """Return a number in [least, most], or 0 if ``zero``."""
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        number = float("nan")
    if not (least <= number <= most or (zero and number == 0)):
        above = f">= {least:g}" if not zero else f">= 0 (if not 0, >= {least:g})" if least else ">= 0"
        raise ValueError(f"a finite number {above} and <= {most:g}")
    return number


def _share(value: Any) -> float:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        number = float("nan")
    if not 0 < number <= 1:
        raise ValueError("a number > 0 and <= 1 (to keep nothing of a model, leave the model out)")
    return number


def _one_of(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return str(value)

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _fisher(value: Any) -> Any:
    if isinstance(value, Mapping) or (isinstance(value, str) and value.strip()):
        return value
    raise ValueError("auto, none, a path or a Hub id (in memory: a mapping name -> tensor)")


def _factor(value: Any) -> float:
    return _number(value, False, *_FACTOR)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number >= 1")
    return value


def _damping(value: Any) -> Any:
    if value == "auto":
        return value
    try:
        return _number(value, False, _LEAST_DAMPING, _MOST_OF_MEAN)
    except ValueError as error:
        raise ValueError(f"auto or {error}") from None


def _factor_or_zero(value: Any) -> float:
    return _number(value, True, *_FACTOR)


def _power(value: Any) -> float:
    return _number(value, True, 0.0, _MOST_POWER)


def _of_mean(value: Any) -> float:
    return _number(value, True, 0.0, _MOST_OF_MEAN)


PARAMETERS = (
    MergeParameter("fisher", "auto", _fisher, per_model=True, meaning="source of the model's Fisher"),
    MergeParameter("weight", 1.0, _factor_or_zero, per_model=True, meaning="w_i"),
    MergeParameter("fisher_scale", 1.0, _factor, per_model=True, meaning="factor on the Fisher"),
    MergeParameter("density", 1.0, _share, per_model=True, meaning="kept share of the task vector"),
    MergeParameter("power", 1.0, _power, meaning="exponent of every F"),
    MergeParameter("density_by", "fisher", _one_of(*SCORES), meaning="score of the entries that density keeps"),
    MergeParameter("density_scope", "tensor", _one_of("tensor", "model"), meaning="tensors that share a threshold"),
    MergeParameter("trimmed", "base", _one_of("base", "abstain"), meaning="vote of an entry that is not kept"),
    MergeParameter("consensus", "none", _one_of("none", "sign"), methods=(SQUISHER,), meaning="models that vote"),
    MergeParameter("lambda", 1.0, _factor, methods=(SQUISHER,), meaning="factor on the step from the base"),
    MergeParameter("scaling", "debiased", _one_of("debiased", "raw", "per_example"), meaning="scale of the Fisher"),
    MergeParameter("normalize", "auto", _one_of("auto", "none", "mean", "l2"), meaning="divisor of each Fisher"),
    MergeParameter("floor", 0.0, _of_mean, meaning="smallest F, relative to the tensor's mean F"),
    MergeParameter("missing", "error", _one_of("error", "average"), meaning="merge of a tensor without a Fisher"),
    MergeParameter("allow_missing", False, _flag, meaning="write the model without tensors that the merge would lose"),
    MergeParameter("write_fisher", False, _flag, meaning="write the Fisher of the result beside it"),
    MergeParameter("structure", "diagonal", _one_of("diagonal", *DAMPING), methods=(SQUISHER,), meaning="curvature"),
    MergeParameter("shares", "fisher", _one_of("fisher", "uniform"), methods=(SQUISHER,), meaning="shares of a matrix"),
    MergeParameter("block", 128, _count, methods=(SQUISHER,), meaning="rows or columns that are coupled"),
    MergeParameter("damping", "auto", _damping, methods=(SQUISHER,), meaning="delta of a structure"),
    MergeParameter("steps", 10, _count, methods=(SQUISHER,), meaning="steps of conjugate gradients of kron"),
    MergeParameter("prior", 0.0, _of_mean, methods=(UBGM_SQUISHER,), meaning="d, relative to the tensor's mean F"),
)


def of_method(method: str) -> tuple[MergeParameter, ...]:
    """Return the parameters of a method."""
    return tuple(parameter for parameter in PARAMETERS if method in parameter.methods)


def is_coupled(given: Mapping[str, Any]) -> bool:
    """Return True if the parameters of a merge ask for a structure beyond the diagonal.

    Example:
        >>> is_coupled({"structure": "rows"}), is_coupled({"prior": 0.0})
        (True, False)
    """
    return bool(given.get("structure", "diagonal") != "diagonal")


def no_signal(method: str) -> str:
    """Return the words for entries where no model has information, the same in previews, logs and reports.

    Example:
        >>> no_signal("squisher")
        'no signal in any model (mostly unseen tokens): plain mean'
    """
    return f"no signal in any model (mostly unseen tokens): {'base value' if method == UBGM_SQUISHER else 'plain mean'}"


@dataclass(frozen=True)
class Block:
    """A ``parameters:`` block of a merge configuration.

    Attributes:
        place: Path of the block in the YAML.
        model: Name of the model that the block belongs to; None for a block of all models.
        settings: Keys and values.
    """

    place: str
    model: str | None
    settings: Mapping[str, Any]


def check_blocks(method: str, blocks: Iterable[Block], layers: bool = True) -> None:
    """Refuse keys and values that mergekit accepts silently.

    Args:
        method: Name of the merge method.
        blocks: All ``parameters:`` blocks of the configuration.
        layers: False for single files, which have no layers that a gradient could run over.

    Raises:
        ConfigError: A key is unknown or in the wrong place, or a value is not accepted.
    """
    known = {parameter.name: parameter for parameter in of_method(method)}
    for block in blocks:
        for key, setting in block.settings.items():
            place = f"{block.place}.{key}"
            parameter = known.get(key)
            if parameter is None:
                raise ConfigError(_unknown(method, key, block.place, known))
            if block.model is not None and not parameter.per_model:
                raise ConfigError(
                    f"{place} must be under the top-level parameters: {key} is one value for all models; move it there"
                )
            longest = 0 if key not in GRADIENTS else sys.maxsize if layers else 1
            for value in _values(setting, place, longest):
                try:
                    parameter.validate(value)
                except ConfigError as error:
                    raise ConfigError(f"{place}: {error.message}") from None


def _unknown(method: str, key: str, place: str, known: Mapping[str, MergeParameter]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    owners = [owner for p in PARAMETERS if p.name == key for owner in p.methods]
    hint = f"did you mean {nearest[0]}?" if nearest else f"valid are {', '.join(known)}"
    if owners:
        role = f", and the prior and the weights of {method} play its role" if key in ("consensus", "lambda") else ""
        hint = f"it belongs to {' and '.join(owners)}{role}; remove it"
    return f"{place}: {method} has no parameter {key!r}; {hint}"


def _values(setting: Any, place: str, longest: int) -> Iterator[Any]:
    """Yield the scalars of a setting: a scalar, a gradient of at most ``longest`` scalars, or filters with either."""
    if hasattr(setting, "value") and hasattr(setting, "filter"):
        yield from _values(setting.value, place, longest)
    elif isinstance(setting, Mapping) and "value" in setting:
        yield from _values(setting["value"], place, longest)
    elif isinstance(setting, list | tuple):
        if not setting:
            raise ConfigError(f"{place} must not be empty, found []; give a value, or remove the key")
        scalars = [item for item in setting if not hasattr(item, "filter") and not isinstance(item, Mapping)]
        if len(scalars) > longest:
            raise ConfigError(
                f"{place} must be one value, found the list {scalars!r}, which mergekit reads as a gradient over the "
                "layers; give one value, or one for each filter"
            )
        for item in setting:
            yield from _values(item, place, longest)
    else:
        yield setting


def scalars(setting: Any) -> Iterator[Any]:
    """Yield the scalars of a valid setting.

    Example:
        >>> list(scalars([{"filter": "mlp", "value": 0.5}, {"value": [1, 2]}]))
        [0.5, 1, 2]
    """
    return _values(setting, "", sys.maxsize)


def check_filters(blocks: Iterable[Block], names: Mapping[str | None, Collection[str]]) -> None:
    """Refuse filters that decide about no tensor: mergekit ignores them silently.

    Args:
        blocks: All ``parameters:`` blocks of the configuration.
        names: Model -> names of its tensors in the merge; under None the names of all.

    Raises:
        ConfigError: A filter matches no tensor, or none that an earlier entry of its list leaves.
    """
    for block in blocks:
        known = names.get(block.model) or names[None]
        for key, setting in block.settings.items():
            left = set(known)
            unconditional = False
            for wanted in _filters(setting):
                if unconditional:
                    raise ConfigError(
                        f"{block.place}.{key}: the entry after the one for all tensors never applies; put that one last"
                    )
                unconditional = wanted in (None, "", "*")
                matched = left if unconditional else {name for name in left if wanted in name}
                if not matched and not unconditional:
                    raise ConfigError(_unmatched(f"{block.place}.{key}", wanted, known))
                left = left - matched


def _filters(setting: Any) -> Iterator[Any]:
    """Yield the filters of a setting, in the order in which mergekit tries them."""
    for item in setting if isinstance(setting, list | tuple) else [setting]:
        if hasattr(item, "filter") and hasattr(item, "value"):
            yield item.filter
        elif isinstance(item, Mapping) and "value" in item:
            yield item.get("filter")


def _unmatched(place: str, wanted: str, names: Collection[str]) -> str:
    if any(wanted in name for name in names):
        return (
            f"{place}: the filter {wanted!r} never applies: earlier entries of the list take its tensors; put it first"
        )
    words = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    nearest = difflib.get_close_matches(wanted.split(".")[-1], words, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"a tensor is {min(names, default='none')}, for example"
    return (
        f"{place}: the filter {wanted!r} must be a part of the name of a tensor (no pattern), but none has it; {hint}"
    )
