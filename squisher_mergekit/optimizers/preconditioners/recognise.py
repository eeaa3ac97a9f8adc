"""Recognition of Shampoo and SOAP: the factors ``G G^T`` and ``G^T G``, and the diagonal that follows from them.

The diagonals of the two factors are the sums of the squared gradient over the rows and over the columns. The diagonal
of the Fisher is the product of the sums, divided by their total, as for Adafactor. The entries of SOAP's ``exp_avg_sq``
are in the eigenbasis of the factors, so they belong to no single weight. They count where no axis is preconditioned;
where one axis is, their sums over that axis count.

Sources: Shampoo (Gupta et al., 2018), SOAP (Vyas et al., 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError, UnsupportedStateError
from squisher_mergekit.optimizers.preconditioners.scalable import KEYS, scalable_shampoo
from squisher_mergekit.optimizers.preconditioners.sums import FromSums, Preconditioned, Sums, square_matrix
from squisher_mergekit.optimizers.second_moments import Moment
from squisher_mergekit.tensors.input_files import reading

# Keys of the factors of Shampoo: of pytorch_optimizer, and of torch_optimizer.
_SHAMPOO = ("pre_cond_", "precond_")
_SOAP = {"exp_avg", "exp_avg_sq", "GG", "Q"}
_TRACES = 1e-2  # relative difference of two sums of the same squares, in other orders
_CURE = "train with SquisherCallback(factors=...), or estimate a Fisher from data"


def preconditioned(state: Mapping[str, Any], group: Mapping[str, Any], location: str) -> Preconditioned | None:
    """Read the state of one parameter if the optimizer is Shampoo or SOAP; None for another optimizer.

    Args:
        state: The optimizer's state of the parameter.
        group: The settings of its parameter group.
        location: File and index, for messages.

    Raises:
        UnsupportedStateError: The factors are not those of the gradients.
        CorruptFileError: The factors do not fit each other, or a setting is missing or has a wrong type.
    """
    with reading(location, "a whole state of Shampoo or SOAP", "save it again"):
        if set(state) >= KEYS:
            return scalable_shampoo(state, group, location)
        if set(state) >= _SOAP and isinstance(state["GG"], list):
            return _soap(state, group, location)
        for prefix in _SHAMPOO:
            if f"{prefix}0" in state and f"inv_{prefix}0" in state:
                return _shampoo(state, group, prefix, location)
    return None


def _soap(state: Mapping[str, Any], group: Mapping[str, Any], location: str) -> Preconditioned:
    """Read SOAP: moving averages ``GG``, one an axis, an empty list for an axis that is not preconditioned."""
    found: list[Tensor | None] = [square_matrix(each, location) if len(each) else None for each in state["GG"]]
    squares = state["exp_avg_sq"]
    if type(squares) is not Tensor or not squares.is_floating_point():
        raise CorruptFileError(f"exp_avg_sq of {location} must be a plain tensor of floats; save it again")
    shape = tuple(squares.shape)
    beta2 = float(group["betas"][1])
    own = state.get("shampoo_beta", group.get("shampoo_beta"))
    decay = beta2 if own is None or own < 0 else float(own)
    # The first gradient enters the factors alone. pytorch_optimizer counts it as a step, the reference does not.
    counts_first = "step" not in state
    of_factors = Moment("GG", "ema", decay, "SOAP", decoupled=True)
    if not any(factor is not None for factor in found):
        plain = Moment("exp_avg_sq", "ema", beta2, "SOAP", decoupled=True)
        return Preconditioned(plain, squares, (None, None), shape, -1 if counts_first else 0)
    before = 0 if counts_first else 1
    sizes = [None if factor is None else len(factor) for factor in found]
    if len(sizes) != len(shape) or any(a is not None and a != b for a, b in zip(sizes, shape, strict=False)):
        return Preconditioned(of_factors, None, (None, None), shape)  # merged axes
    if len(shape) == 1 and found[0] is not None:
        return Preconditioned(of_factors, FromSums(Sums(found[0], 0), None, squares.shape), (None, None), shape, before)
    if len(shape) != 2:
        return Preconditioned(of_factors, None, (None, None), shape)
    rows, columns = (
        Sums(squares, axis, is_factor=False) if factor is None else Sums(factor, axis)
        for axis, factor in enumerate(found)
    )
    return Preconditioned(of_factors, FromSums(rows, columns, squares.shape), (found[0], found[1]), shape, before)


def _shampoo(state: Mapping[str, Any], group: Mapping[str, Any], prefix: str, location: str) -> Preconditioned:
    """Read Shampoo: sums that begin at a multiple of the identity.

    Some versions compute the second factor from gradients that the first has preconditioned already. The traces of the
    two then differ, while both are the sum of all squares otherwise.
    """
    if group.get("momentum"):
        raise UnsupportedStateError(
            f"factors must be those of the gradients, but Shampoo with momentum {group['momentum']} mixes "
            f"preconditioned ones into them ({location}); {_CURE}"
        )
    count = sum(key.startswith(prefix) for key in state)
    found = [square_matrix(state.get(f"{prefix}{axis}"), location) for axis in range(count)]
    shape = tuple(len(factor) for factor in found)
    initial = float(group.get("matrix_eps", group.get("epsilon", 0.0)))
    coupled = not group.get("weight_decouple", False) and bool(group.get("weight_decay"))
    moment = Moment(f"{prefix}0", "sum", None, "Shampoo", decoupled=not coupled, coupled_decay=coupled)
    size = torch.Size(shape)
    if len(shape) == 1:
        return Preconditioned(moment, FromSums(Sums(found[0], 0, initial=initial), None, size), (None, None), shape)
    if len(shape) != 2:
        return Preconditioned(moment, None, (None, None), shape)
    traces = [float(factor.diagonal().sum(dtype=torch.float64)) - initial * len(factor) for factor in found]
    if abs(traces[0] - traces[1]) > _TRACES * max(map(abs, traces)):
        raise UnsupportedStateError(
            f"both factors of Shampoo must be of the same gradients, but their traces are {traces[0]:.3g} and "
            f"{traces[1]:.3g} ({location}): this version preconditions the gradient between the two; {_CURE}"
        )
    rows, columns = (Sums(factor, axis, initial=initial) for axis, factor in enumerate(found))
    return Preconditioned(moment, FromSums(rows, columns, size), (found[0], found[1]), shape, initial=initial)
