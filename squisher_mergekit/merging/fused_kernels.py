# Triton compiles this file: it has types of its own, and knows no starred expressions.
# mypy: ignore-errors
# ruff: noqa: RUF005, SIM300
"""Triton kernels of the fused merge; :mod:`.fused` launches them.

A program works on ``LOOPS`` tiles of ``TILE`` entries. All pointers are to flat contiguous tensors of one size, each
of its own dtype; ``WORK`` is the dtype of the arithmetic. A tuple holds one element a model. A kernel compiles anew for
another number of models, another dtype or another option, and for nothing else: weights, scales and the power are
numbers that come with the launch, the prior is read on the device.

Numerics: the Fishers of an entry are multiplied by the power of two that brings the largest of them to between 1 and
2. This is exact, where a division by the largest would round, and a common factor cancels in every formula.
"""

import torch
import triton
import triton.language as tl

from squisher_mergekit.merging.fused_options import agreeing, raised, root, undecided

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def merge(
    thetas,
    fishers,
    watched,
    masks,
    origins,
    base,
    base_fisher,
    prior,
    out,
    sums,
    invalid,
    weights,
    coefficients,
    power,
    size,
    SLOTS: tl.constexpr,
    MATCHED: tl.constexpr,
    ELECTED: tl.constexpr,
    POWERED: tl.constexpr,
    WORK: tl.constexpr,
    TILE: tl.constexpr,
    LOOPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Merge one tensor: ``squisher``, or ``ubgm_squisher`` if ``MATCHED``.

    Writes ``out`` and one column of ``sums``: each model's coefficients, summed and divided by ``size``, then the
    number of entries without information, then that of NaN and infinite results. Adds to ``invalid`` the NaN, infinite
    and negative entries of each Fisher.

    Args:
        thetas: Pointers to the models' weights.
        fishers: Pointers to their Fishers.
        watched: Pointers to Fishers that do not enter, but whose invalid entries count.
        masks: Pointers to uint8 masks of the entries that are kept; ``SLOTS[i]`` is model i's place, or -1 for none.
        origins: Pointers to the tensors that stand where a mask is 0.
        base: Pointer to theta_0, or None.
        base_fisher: Pointer to F_0, or None for 0.
        prior: Pointer to d (one float64), or None for 0.
        out: Pointer to the result.
        sums: Pointer to a float64 matrix of models + 2 rows and one column a program.
        invalid: Pointer to an int64 matrix of Fishers (``fishers``, ``watched``, then F_0) times 3, all 0.
        weights: w_i of each model.
        coefficients: w_i times the factor of F_i; if ``MATCHED`` that factor alone, and F_0's last.
        power: Exponent of the Fishers, used if ``POWERED``.
        size: Number of entries.
        SLOTS: One integer a model.
        MATCHED: Gradient matching.
        ELECTED: Only models that agree with the elected sign vote.
        POWERED: Whether the Fishers are raised to ``power``.
        WORK: float32 or float64.
        TILE: Entries of a tile.
        LOOPS: Tiles of a program.
        ROWS: Number of partial sums that a program keeps of each model, one a thread.
    """
    program = tl.program_id(0).to(tl.int64)
    first = program * (TILE * LOOPS)
    lanes = tl.arange(0, TILE)
    worst = tl.zeros((TILE,), _word(WORK))
    blanks = tl.zeros((ROWS,), tl.int32)
    broken = tl.zeros((ROWS,), tl.int32)
    shares = ()
    for _ in tl.static_range(len(thetas)):
        shares = shares + (tl.zeros((ROWS,), WORK),)
    for step in range(LOOPS):
        start = first + step * TILE
        inside = start + lanes < size
        loaded = _loaded(fishers, start, lanes, inside, WORK)
        others = _loaded(watched, start, lanes, inside, WORK)
        if MATCHED:
            value, entered, blank, bits = _matched(
                thetas,
                masks,
                origins,
                base,
                base_fisher,
                prior,
                weights,
                coefficients,
                power,
                loaded,
                start,
                lanes,
                inside,
                SLOTS,
                POWERED,
                WORK,
            )
        else:
            value, entered, blank, bits = _averaged(
                thetas,
                masks,
                origins,
                base,
                weights,
                coefficients,
                power,
                loaded,
                start,
                lanes,
                inside,
                SLOTS,
                ELECTED,
                POWERED,
                WORK,
            )
        if out.dtype.element_ty == tl.bfloat16:
            value = value.to(tl.float32)  # Triton's interpreter has no way from float64 to bfloat16
        rounded = value.to(out.dtype.element_ty)
        tl.store(out + start + lanes, rounded, mask=inside)
        wide = rounded.to(WORK) if out.dtype.element_ty != tl.bfloat16 else rounded.to(tl.float32)
        broken += _folded((inside & ~(tl.abs(wide) < float("inf"))).to(tl.int32), ROWS)
        worst = tl.maximum(worst, bits)
        for i in tl.static_range(len(watched)):
            worst = tl.maximum(worst, _bits(others[i]))
        blanks += _folded((blank & inside).to(tl.int32), ROWS)
        added = ()
        for i in tl.static_range(len(thetas)):
            added = added + (shares[i] + _folded(entered[i], ROWS),)
        shares = added
    column = sums + program
    for i in tl.static_range(len(thetas)):
        tl.store(column, tl.sum(shares[i], 0).to(tl.float64) / size)
        column += tl.num_programs(0)
    tl.store(column, tl.sum(blanks, 0).to(tl.float64))
    tl.store(column + tl.num_programs(0), tl.sum(broken, 0).to(tl.float64))
    if tl.max(worst, 0) >= _infinity(WORK):
        for i in tl.static_range(len(fishers)):
            _count(fishers[i], invalid + 3 * i, first, size, TILE, LOOPS, WORK)
        for i in tl.static_range(len(watched)):
            _count(watched[i], invalid + 3 * (len(fishers) + i), first, size, TILE, LOOPS, WORK)
        if base_fisher is not None:
            _count(base_fisher, invalid + 3 * (len(fishers) + len(watched)), first, size, TILE, LOOPS, WORK)


@triton.jit
def _averaged(
    thetas, masks, origins, base, weights, coefficients, power, loaded, start, lanes, inside,
    SLOTS: tl.constexpr, ELECTED: tl.constexpr, POWERED: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """Return a tile of ``squisher``: values, each model's coefficients, where there is no information, largest bits."""
    values = _kept(thetas, masks, origins, start, lanes, inside, SLOTS, WORK)
    bits = _largest(loaded)
    blank = bits == 0
    if ELECTED:
        origin = _load(base + start, lanes, inside, WORK)
        loaded = undecided(loaded, values, origin)
        unit = _unit(_largest(loaded), WORK)
    else:
        unit = _unit(bits, WORK)
    parts = ()
    for i in tl.static_range(len(loaded)):
        part = raised(loaded[i], unit, power, POWERED) * _number(coefficients, i, WORK)
        parts = parts + (tl.where(blank, _number(weights, i, WORK), part),)
    if ELECTED:
        parts = agreeing(parts, values, origin)
    total = parts[0]
    for i in tl.static_range(1, len(parts)):
        total += parts[i]
    voted = inside
    if ELECTED:
        voted = inside & (total > 0)
    inverse = tl.where(voted, 1.0 / total, 0.0)
    entered = ()
    for i in tl.static_range(len(parts)):
        entered = entered + (parts[i] * inverse,)
    value = entered[0] * values[0]
    low = values[0]
    high = values[0]
    for i in tl.static_range(1, len(parts)):
        value += entered[i] * values[i]
        low = tl.minimum(low, values[i])
        high = tl.maximum(high, values[i])
    # Comparisons let a NaN among the weights through, which a minimum would hide.
    value = tl.where(value < low, low, tl.where(value > high, high, value))
    if ELECTED:
        value = tl.where(voted, value, origin)
    return value, entered, blank, bits


@triton.jit
def _matched(
    thetas, masks, origins, base, base_fisher, prior, weights, scales, power, loaded, start, lanes, inside,
    SLOTS: tl.constexpr, POWERED: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """Return a tile of ``ubgm_squisher``, as :func:`_averaged` does of ``squisher``."""
    values = _kept(thetas, masks, origins, start, lanes, inside, SLOTS, WORK)
    origin = _load(base + start, lanes, inside, WORK)
    bits = _largest(loaded)
    if base_fisher is not None:
        own = _load(base_fisher + start, lanes, inside, WORK) + 0.0
        bits = tl.maximum(bits, _bits(own))
    blank = bits == 0
    common = tl.zeros_like(origin)
    if prior is not None:
        # The Fisher that the prior amounts to; in units of it where it is larger than every F of the entry.
        extra = root(tl.load(prior), power, POWERED).to(WORK) + tl.zeros_like(origin)
        unit = _unit(tl.maximum(bits, _bits(extra)), WORK)
        common += raised(extra, unit, power, POWERED)
    else:
        unit = _unit(bits, WORK)
    if base_fisher is not None:
        common += raised(own, unit, power, POWERED) * _number(scales, len(loaded), WORK)
    total = common
    parts = ()
    for i in tl.static_range(len(loaded)):
        part = raised(loaded[i], unit, power, POWERED) * _number(scales, i, WORK)
        total += part * _number(weights, i, WORK)
        parts = parts + (part,)
    inverse = tl.where(inside & (bits != 0), 1.0 / tl.maximum(total, 1e-37), 0.0)
    value = origin
    entered = ()
    for i in tl.static_range(len(parts)):
        share = (parts[i] + common) * inverse * _number(weights, i, WORK)
        value += share * (values[i] - origin)
        entered = entered + (share,)
    return value, entered, blank, bits


@triton.jit
def weighted_sum(
    fishers, partial, factors, power, size,
    POWERED: tl.constexpr, TILE: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    """Write one number a program into ``partial`` (float64): its share of ``sum over i and entries of factor_i F_i``.

    Programs take the entries from the last to the first: the first ones are then in the L2 cache for the merge that
    follows, which reads them first.

    Args:
        fishers: Pointers to the Fishers.
        partial: Pointer to as many numbers as there are programs.
        factors: One number a Fisher.
        power: Exponent of the Fishers, used if ``POWERED``.
        size: Number of entries.
        POWERED: Whether the Fishers are raised to ``power``.
        TILE: Entries of a tile.
        LOOPS: Tiles of a program.
    """
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    lanes = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float64)
    for step in range(LOOPS):
        start = program * (TILE * LOOPS) + step * TILE
        inside = start + lanes < size
        loaded = _loaded(fishers, start, lanes, inside, tl.float64)
        for i in tl.static_range(len(fishers)):
            total += raised(loaded[i], tl.full((TILE,), 1.0, tl.float64), power, POWERED) * _number(
                factors, i, tl.float64
            )
    tl.store(partial + program, tl.sum(total, 0))


# ---- tiles


@triton.jit
def _load(pointer, lanes, inside, WORK: tl.constexpr):
    return tl.load(pointer + lanes, mask=inside, other=0).to(WORK)


@triton.jit
def _loaded(pointers, start, lanes, inside, WORK: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(pointers)):
        # Adding 0 makes +0 of -0, whose bits would come last.
        tiles = tiles + (_load(pointers[i] + start, lanes, inside, WORK) + 0.0,)
    return tiles


@triton.jit
def _kept(thetas, masks, origins, start, lanes, inside, SLOTS: tl.constexpr, WORK: tl.constexpr):
    """Return a tile of each model's weights, those of the origin where its mask is 0."""
    tiles = ()
    for i in tl.static_range(len(thetas)):
        tile = _load(thetas[i] + start, lanes, inside, WORK)
        if SLOTS[i] >= 0:
            kept = tl.load(masks[SLOTS[i]] + start + lanes, mask=inside, other=0)
            tile = tl.where(kept != 0, tile, _load(origins[SLOTS[i]] + start, lanes, inside, WORK))
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _folded(tile, ROWS: tl.constexpr):
    """Return sums of neighbours, which lie in one thread."""
    return tl.sum(tl.reshape(tile, (ROWS, tile.shape[0] // ROWS)), 1)


# ---- numbers


@triton.constexpr_function
def _word(work):
    return tl.uint64 if work == tl.float64 else tl.uint32


@triton.constexpr_function
def _infinity(work):
    return 0x7FF0000000000000 if work == tl.float64 else 0x7F800000


@triton.jit
def _number(numbers, i: tl.constexpr, WORK: tl.constexpr):
    """Return a number that came with the launch: one float32, or the sum of two."""
    if WORK == tl.float64:
        number = tl.full((), numbers[2 * i], WORK) + tl.full((), numbers[2 * i + 1], WORK)
    else:
        number = numbers[i]
    return number


@triton.jit
def _bits(tile):
    """Return bit patterns, which order as the numbers do; those of infinite, NaN and negative numbers come last."""
    return tile.to(_word(tile.dtype), bitcast=True)


@triton.jit
def _largest(tiles):
    largest = _bits(tiles[0])
    for i in tl.static_range(1, len(tiles)):
        largest = tl.maximum(largest, _bits(tiles[i]))
    return largest


@triton.jit
def _unit(bits, WORK: tl.constexpr):
    """Return 2^-k for a number of at least 2^k and less than 2^(k+1), given by its bits."""
    if WORK == tl.float64:
        exponent = (bits & 0x7FF0000000000000).to(tl.int64)
        unit = tl.maximum(0x7FE0000000000000 - exponent, 0x0008000000000000)
    else:
        exponent = (bits & 0x7F800000).to(tl.int32)
        unit = tl.maximum(0x7F000000 - exponent, 0x00400000)
    return unit.to(WORK, bitcast=True)


@triton.jit
def _count(fisher, counts, first, size, TILE: tl.constexpr, LOOPS: tl.constexpr, WORK: tl.constexpr):
    """Add the NaN, infinite and negative entries of a program's part of a Fisher to three counts."""
    lanes = tl.arange(0, TILE)
    # Three counts of 20 bits in one number: one reduction instead of three.
    found = tl.zeros((TILE,), tl.int64)
    for step in range(LOOPS):
        start = first + step * TILE
        tile = tl.load(fisher + start + lanes, mask=start + lanes < size, other=0).to(WORK)
        found += (tile != tile).to(tl.int64)
        found += (tl.abs(tile) == float("inf")).to(tl.int64) << 20
        found += (tile < 0).to(tl.int64) << 40
    total = tl.sum(found, 0)
    for kind in tl.static_range(3):
        tl.atomic_add(counts + kind, (total >> (20 * kind)) & 0xFFFFF)
