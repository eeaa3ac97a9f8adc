"""Which tensor of an optimizer's state is the second moment, and what kind of statistic it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.fisher.config import Statistic


@dataclass(frozen=True)
class Moment:
    """What one parameter's state says of its second moment.

    ``key``: where the tensor is. ``decay``: of the moving average. ``class_``, ``decoupled``, ``amsgrad``: of the
    optimizer, None where the file does not tell. ``start``: what a sum began with. ``coupled_decay``: weight decay was
    added to the gradient before it was squared.
    """

    key: str
    statistic: Statistic
    decay: float | None = None
    class_: str | None = None
    decoupled: bool | None = None
    amsgrad: bool | None = None
    start: float = 0.0
    coupled_decay: bool = False


_ADAM = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "mu_product"}
_RMSPROP = {"step", "square_avg", "grad_avg", "momentum_buffer"}
_ADADELTA = {"step", "square_avg", "acc_delta"}
_ADAGRAD = {"step", "sum"}

_CURE = "train with AdamW, or estimate a Fisher from data"
_REFUSED = (
    ({"__bnb_optimizer_quant_state__"}, "bitsandbytes keeps it quantized, which this version cannot read"),
    ({"state1"}, "bitsandbytes keeps it quantized, which this version cannot read"),
    ({"projector"}, "GaLore keeps it in a projected space, not for the parameters"),
    ({"exp_avg_sq_row"}, "Adafactor keeps only its row and column means, which this version cannot read"),
    ({"row_var"}, "Adafactor keeps only its row and column means, which this version cannot read"),
    ({"variance"}, "Adafactor keeps only its row and column means, which this version cannot read"),
    ({"RMS"}, "Adafactor keeps only its row and column means, which this version cannot read"),
    ({"exp_inf"}, "Adamax keeps a running maximum of the gradient, not a mean square"),
)


def moment_of(state: Mapping[str, Any], group: Mapping[str, Any], place: str) -> Moment:
    """Find the second moment in the state of one parameter.

    Args:
        state: The optimizer's state of the parameter: key -> tensor or number.
        group: Its parameter group: hyper-parameters.
        place: File and index, for messages.

    Returns:
        The key and the kind.

    Raises:
        UnsupportedStateError: There is none, or it is kept in a form that cannot be read.
    """
    keys = set(state)
    for marks, why in _REFUSED:
        if marks & keys:
            raise UnsupportedStateError(f"a Fisher needs the mean squared gradient, but in {place} {why}; {_CURE}")
    if "exp_avg_sq" in keys and keys <= _ADAM:
        return _adam(keys, group)
    if "square_avg" in keys and keys <= _ADADELTA | _RMSPROP:
        adadelta = "acc_delta" in keys
        return Moment(
            "square_avg",
            "ema",
            group.get("rho" if adadelta else "alpha"),
            "torch.optim.Adadelta" if adadelta else "torch.optim.RMSprop",
            decoupled=False,
            coupled_decay=bool(group.get("weight_decay")),
        )
    if "sum" in keys and keys <= _ADAGRAD:
        return Moment(
            "sum",
            "sum",
            None,
            "torch.optim.Adagrad",
            decoupled=False,
            start=float(group.get("initial_accumulator_value") or 0.0),
            coupled_decay=bool(group.get("weight_decay")),
        )
    raise UnsupportedStateError(_explain(keys, group, place))


def _adam(keys: set[str], group: Mapping[str, Any]) -> Moment:
    decoupled = group.get("decoupled_weight_decay")
    name = None
    if "mu_product" in keys or "momentum_decay" in group:
        name = "torch.optim.NAdam"
    elif "correct_bias" in group:
        name, decoupled = "transformers.AdamW", True
    elif decoupled is not None and "amsgrad" not in group:
        name = "torch.optim.RAdam"
    elif decoupled is not None:
        name = "torch.optim.AdamW" if decoupled else "torch.optim.Adam"
    betas = group.get("betas")
    return Moment(
        "exp_avg_sq",
        "ema",
        float(betas[1]) if betas is not None else None,
        name,
        decoupled,
        amsgrad=bool(group["amsgrad"]) if "amsgrad" in group else None,
        coupled_decay=decoupled is False and bool(group.get("weight_decay")),
    )


def _explain(keys: set[str], group: Mapping[str, Any], place: str) -> str:
    if keys <= {"momentum_buffer"}:
        name = "Muon" if "ns_steps" in group or "ns_coefficients" in group else "SGD"
        return f"a Fisher needs the mean squared gradient, but {name} keeps none ({place}); {_CURE}"
    if keys <= {"exp_avg", "step"}:
        return f"a Fisher needs the mean squared gradient, but Lion keeps momentum alone ({place}); {_CURE}"
    return (
        f"a Fisher needs the mean squared gradient, but the state in {place} has the keys {', '.join(sorted(keys))}, "
        f"which are of no optimizer known here; {_CURE}"
    )
