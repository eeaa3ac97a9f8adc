"""Recognition of the second moment in an optimizer's state: the key of its tensor, and its statistic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from squisher_mergekit.errors import NothingKeptError, UnsupportedStateError
from squisher_mergekit.fisher.config import Statistic


@dataclass(frozen=True)
class Moment:
    """Kind of a second moment.

    Attributes:
        key: Key of the tensor in the state; of the row means where ``columns`` is given.
        statistic: ``ema`` for a moving average, ``sum`` for a sum.
        decay: Decay of the moving average; None if it changes from step to step.
        class_: Class of the optimizer; None if the file does not tell.
        decoupled: True for decoupled weight decay; None if the file does not tell.
        amsgrad: True for AMSGrad; None if the file does not tell.
        start: Initial value of a sum.
        coupled_decay: True if weight decay was added to the gradient before it was squared.
        columns: Key of the column means of a factored second moment; None if it is not factored.
        corrected: True if the average is unbiased without a correction.
        caution: Warning for the user about this kind; None if there is none.
    """

    key: str
    statistic: Statistic
    decay: float | None = None
    class_: str | None = None
    decoupled: bool | None = None
    amsgrad: bool | None = None
    start: float = 0.0
    coupled_decay: bool = False
    columns: str | None = None
    corrected: bool = False
    caution: str | None = None


_ADAM = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "mu_product"}
# Relatives of Adam with the same v, an average that starts at 0: name, keys or settings that only they have, and their
# keys other than Adam's.
_RELATIVES: tuple[tuple[str, set[str], set[str]], ...] = (
    ("AdEMAMix", {"exp_avg_slow"}, {"exp_avg_slow", "exp_avg_fast"}),
    ("LAMB", {"trust_ratio", "trust_clip", "always_adapt"}, {"weight_norm", "adam_norm", "trust_ratio"}),
    ("AdamP", {"wd_ratio"}, set()),
    ("schedulefree.AdamWScheduleFree", {"z"}, {"z"}),
)
# Relatives whose decay is adjusted at each step, so that their average is unbiased: name, marks, further keys.
_UNBIASED = (
    ("QHAdam", {"beta2_weight"}, {"beta1_weight", "beta2_weight"}),
    ("StableAdamW", {"kahan_comp", "eps_sq"}, {"kahan_comp", "eps_sq", "mean_square", "group"}),
)
_RMSPROP = {"step", "square_avg", "grad_avg", "momentum_buffer"}
_ADADELTA = {"step", "square_avg", "acc_delta"}
_ADAGRAD = {"step", "sum"}
# Adafactor: name, its setting in the group, keys of the row means, the column means, and the unfactored v of vectors.
_ADAFACTORS = (
    ("transformers.optimization.Adafactor", "decay_rate", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"),
    ("torch.optim.Adafactor", "beta2_decay", "row_var", "col_var", "variance"),
)
_BNB_WRAPPER = "__bnb_optimizer_quant_state__"
_ADAFACTOR_REST = {"step", "RMS", "exp_avg"}

# Settings of look-alikes (timm's RMSpropTF, Yogi, ADOPT), whose accumulator starts at a value that the file does not
# record, or is no moving average. ADOPT's authors set ``clip_lambda`` and ``decouple``, timm ``clip_exp``: its average
# starts at the first squared gradient.
_LOOKALIKES = {"decoupled_decay", "initial_accumulator", "clip_lambda", "clip_exp", "decouple"}

_CURE = "train with AdamW, or estimate a Fisher from data"
_REFUSED = (
    ({"projector"}, "GaLore keeps it in a projected space, not for the parameters"),
    ({"exp_inf"}, "Adamax keeps a running maximum of the gradient, not a mean square"),
)


def moment_of(state: Mapping[str, Any], group: Mapping[str, Any], location: str) -> Moment:
    """Find the second moment in the state of one parameter.

    Args:
        state: The optimizer's state of the parameter: key -> tensor or number.
        group: The hyper-parameters of its parameter group.
        location: File and index, for messages.

    Raises:
        NothingKeptError: The optimizer keeps momentum alone.
        UnsupportedStateError: The state has no second moment that can serve as a Fisher.
    """
    keys = set(state)
    for marks, why in _REFUSED:
        if marks & keys:
            raise UnsupportedStateError(f"a Fisher needs the mean squared gradient, but {why} ({location}); {_CURE}")
    if _LOOKALIKES & set(group):
        raise UnsupportedStateError(_explain(keys, group, location))
    if "exp_avg_sq" in keys:
        related = _relative(keys, group)
        if related is not None:
            return related
    if "state1" in keys:
        return _bitsandbytes(keys, group, location)
    factored = _adafactor(keys, group)
    if factored is not None:
        return factored
    coupled = bool(group.get("weight_decay"))
    for known, decay, name in ((_ADADELTA, "rho", "torch.optim.Adadelta"), (_RMSPROP, "alpha", "torch.optim.RMSprop")):
        if "square_avg" in keys and keys <= known and decay in group:
            return Moment("square_avg", "ema", float(group[decay]), name, decoupled=False, coupled_decay=coupled)
    if "sum" in keys and keys <= _ADAGRAD and "lr_decay" in group:
        return Moment(
            "sum",
            "sum",
            None,
            "torch.optim.Adagrad",
            decoupled=False,
            start=float(group.get("initial_accumulator_value") or 0.0),
            coupled_decay=coupled,
        )
    if keys <= {"momentum_buffer"} or keys <= {"exp_avg", "step"}:
        raise NothingKeptError(_explain(keys, group, location))
    raise UnsupportedStateError(_explain(keys, group, location))


def ivon(group: Mapping[str, Any]) -> Moment:
    """Return the kind of IVON's second moment: a moving average of the Hessian's diagonal that starts at ``hess_init``.

    Source: Shen et al., "Variational Learning is Effective for Large Deep Networks", 2024.
    """
    beta2 = group.get("beta2")
    return Moment(
        "hess",
        "ema",
        float(beta2) if isinstance(beta2, float | int) else None,
        "ivon.IVON",
        decoupled=True,
        corrected=True,
        caution=(
            f"IVON's Hessian began at hess_init {group.get('hess_init')} everywhere, which is in it still where "
            "training was short against 1 / (1 - beta2) steps; the file does not tell how long it was"
        ),
    )


def unwrapped_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state of one parameter without the wrapper of later versions of bitsandbytes."""
    inner = state.get(_BNB_WRAPPER)
    if not isinstance(inner, Mapping):
        return state
    return {key: value for key, value in state.items() if key != _BNB_WRAPPER} | dict(inner)


def _bitsandbytes(keys: set[str], group: Mapping[str, Any], location: str) -> Moment:
    """Recognise the optimizers of bitsandbytes with two moments; their files do not tell the class."""
    if "state2" not in keys or len(group.get("betas", ())) < 2:
        raise UnsupportedStateError(
            "a Fisher needs the mean squared gradient, but bitsandbytes kept one moment alone, which can be Lion's or "
            f"SGD's momentum ({location}); {_CURE}"
        )
    name = "AdEMAMix" if len(group["betas"]) == 3 else None
    return Moment("state2", "ema", float(group["betas"][1]), name)


def _adafactor(keys: set[str], group: Mapping[str, Any]) -> Moment | None:
    """Recognise Adafactor, whose average is unbiased: the decay starts at 0 and grows with the steps."""
    for name, setting, rows, columns, whole in _ADAFACTORS:
        left = keys - _ADAFACTOR_REST
        if setting in group and left == {rows, columns}:
            return Moment(rows, "ema", None, name, decoupled=True, columns=columns, corrected=True)
        if setting in group and left == {whole}:
            return Moment(whole, "ema", None, name, decoupled=True, corrected=True)
    return None


def _relative(keys: set[str], group: Mapping[str, Any]) -> Moment | None:
    """Recognise Adam and its relatives."""
    if "betas" in group and group["betas"] is None:  # a layout whose files do not record them
        return Moment("exp_avg_sq", "ema", None, None) if keys <= _ADAM else None
    betas = group.get("betas") or [group.get(key) for key in ("beta1", "beta2")]
    if not isinstance(betas, Sequence) or len(betas) < 2:
        return None
    # torch's Adam takes tensors as well.
    betas = [beta.item() if isinstance(beta, Tensor) and beta.numel() == 1 else beta for beta in betas]
    if not all(isinstance(beta, float | int) for beta in betas):
        return None
    marks = keys | set(group)
    decay, decoupled = float(betas[1]), _flag(group, "decouple_weight_decay", "weight_decouple")
    into_gradient = decoupled is False or group.get("weight_decay_type") == "grad"
    coupled = into_gradient and bool(group.get("weight_decay"))
    for name, own, more in _UNBIASED:
        if own & keys and keys <= _ADAM | more:
            # optimi's Adam and RAdam in 16 bits keep ``kahan_comp`` as well, and have no ``betas``.
            known = name if "betas" in group or "eps_sq" in keys else None
            return Moment("exp_avg_sq", "ema", decay, known, decoupled, coupled_decay=coupled, corrected=True)
    for name, own, more in _RELATIVES:
        if own & marks and keys <= _ADAM | more:
            caution = None
            if name.startswith("schedulefree") and group.get("train_mode"):
                caution = (
                    "it was saved in the training mode of a schedule-free optimizer: the weights beside it may be "
                    "those of training, not of use (call optimizer.eval() before saving)"
                )
            return Moment("exp_avg_sq", "ema", decay, name, decoupled, coupled_decay=coupled, caution=caution)
    # Under these settings pytorch_optimizer keeps other statistics (ADOPT, Grams, LaProp) under Adam's keys.
    if not keys <= _ADAM or len(betas) != 2 or "fixed_decay" in group:
        return None
    if "betas" not in group:  # optimi's, whose decay is adjusted
        return Moment("exp_avg_sq", "ema", decay, None, corrected=True)
    return _adam(keys, group)


def _flag(group: Mapping[str, Any], *names: str) -> bool | None:
    """Return the first of these settings in a group; None if there is none, or it is neither true nor false."""
    value = next((group[name] for name in names if name in group), None)
    return value if isinstance(value, bool) else None


def _adam(keys: set[str], group: Mapping[str, Any]) -> Moment:
    decoupled = _flag(group, "decoupled_weight_decay")
    name = None
    if "mu_product" in keys or "momentum_decay" in group:
        name = "torch.optim.NAdam"
    elif "correct_bias" in group:
        name, decoupled = "transformers.optimization.AdamW", True
    elif decoupled is not None and "amsgrad" not in group:
        name = "torch.optim.RAdam"
    elif decoupled is not None:
        name = "torch.optim.AdamW" if decoupled else "torch.optim.Adam"
    caution = None
    if "maximize" in group and "weight_decay" not in group:
        name = "torch.optim.SparseAdam"
        caution = (
            "rows that a batch does not touch stand still in SparseAdam, while its step counts on: rare ones are low"
        )
    return Moment(
        "exp_avg_sq",
        "ema",
        float(group["betas"][1]),
        name,
        decoupled,
        amsgrad=_flag(group, "amsgrad"),
        coupled_decay=decoupled is False and bool(group.get("weight_decay")),
        caution=caution,
    )


def _explain(keys: set[str], group: Mapping[str, Any], location: str) -> str:
    if keys <= {"momentum_buffer"}:
        return (
            f"a Fisher needs the mean squared gradient, but {_momentum_class(group)} keeps none ({location}); {_CURE}"
        )
    if keys <= {"exp_avg", "step"}:
        return f"a Fisher needs the mean squared gradient, but Lion keeps momentum alone ({location}); {_CURE}"
    return (
        f"a Fisher needs the mean squared gradient, but the state of {location} has the keys "
        f"{', '.join(sorted(map(str, keys)))}, which are of no optimizer known here; {_CURE}"
    )


def nothing_kept(groups: Sequence[Mapping[str, Any]], location: str) -> str:
    """Return the message that refuses an optimizer without any state.

    Args:
        groups: The optimizer's parameter groups.
        location: File, for messages.
    """
    plain = [group for group in groups if any(mark in group for mark in ("dampening", "ns_steps"))]
    why = f" (plain {_momentum_class(plain[0])} keeps nothing)" if plain else ""
    dummy = len(groups) == 1 and len(groups[0]["params"]) == 1 and set(groups[0]) <= {"lr", "initial_lr", "params"}
    if dummy:
        why = " (a layer-wise optimizer steps inside the backward pass, and a dummy was saved in its place)"
    elif groups and "clip_grad_norm" in groups[0]:
        why = " (LOMO keeps none, and AdaLomo its moments outside of its state)"
    return (
        f"{location} must come from an optimizer that has stepped, but its state is empty{why}; take a checkpoint "
        "saved after the first step, by an optimizer such as AdamW"
    )


def _momentum_class(group: Mapping[str, Any]) -> str:
    return "Muon" if "ns_steps" in group or "ns_coefficients" in group else "SGD"
