# Triton compiles this file: it has types of its own, and knows no starred expressions.
# mypy: ignore-errors
# ruff: noqa: RUF005
"""Options of the fused merge, for tiles of entries: the power of the Fishers, and the election of signs."""

import triton
import triton.language as tl


@triton.jit
def raised(fisher, unit, power, POWERED: tl.constexpr):
    """Return ``(fisher * unit)^power``, through logarithms where the product is too small for float32; 0^0 is 1."""
    ratio = fisher * unit
    if POWERED:
        some = fisher > 0
        near = ratio > 1e-30
        # A GPU's logarithm takes numbers below 1.2e-38 for 0. Where this one counts, both products are finite.
        lifted = 1099511627776.0  # 2^40
        small = tl.log2(tl.where(some, fisher * lifted, 1.0)) + tl.log2(unit * lifted) - 80
        logarithm = tl.where(near, tl.log2(tl.where(near, ratio, 1.0)), small)
        ratio = tl.where(some, tl.exp2(power * logarithm), tl.where(power == 0, 1.0, 0.0))
    return ratio


@triton.jit
def root(prior, power, POWERED: tl.constexpr):
    """Return ``prior^(1 / power)`` in float64."""
    if POWERED:
        prior = tl.exp2(tl.log2(prior) / power)
    return prior


@triton.jit
def undecided(fishers, values, origin):
    """Return the Fishers, 0 where a model's weight is the base's: it can neither elect nor vote."""
    tiles = ()
    for i in tl.static_range(len(fishers)):
        tiles = tiles + (tl.where(values[i] == origin, 0.0, fishers[i]),)
    return tiles


@triton.jit
def agreeing(parts, values, origin):
    """Return the parts, 0 where a model does not move the way that ``sign(sum_i part_i (theta_i - theta_0))`` says."""
    elected = tl.zeros_like(origin)
    for i in tl.static_range(len(parts)):
        elected += parts[i] * (values[i] - origin)
    tiles = ()
    for i in tl.static_range(len(parts)):
        agrees = ((elected > 0) & (values[i] > origin)) | ((elected < 0) & (values[i] < origin))
        tiles = tiles + (tl.where(agrees, parts[i], 0.0),)
    return tiles
