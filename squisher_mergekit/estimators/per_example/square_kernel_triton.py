"""Device code of :mod:`~squisher_mergekit.estimators.per_example.square_kernel`; importing it needs Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Triton reads annotations; all but those of constants are left out.

import triton
import triton.language as tl


@triton.jit
def load_tile(
    source,
    example,
    first_token,
    first_column,
    n_tokens,
    n_columns,
    example_stride,
    token_stride,
    column_stride,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN_TOKENS: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Load one example's ``(TOKENS, COLUMNS)`` tile; entries beyond the edges are 0.

    Args:
        source: Pointer to a tensor ``(examples, tokens, columns)``, or with ``TMA`` its descriptor.
        example: Index of the example.
        first_token: First token of the tile.
        first_column: First column of the tile.
        n_tokens: Tokens of the tensor.
        n_columns: Columns of the tensor.
        example_stride: Stride of the examples.
        token_stride: Stride of the tokens.
        column_stride: Stride of the columns.
        TOKENS: Rows of the tile.
        COLUMNS: Columns of the tile.
        EVEN_TOKENS: If True, no tile crosses the last token.
        EVEN_COLUMNS: If True, no tile crosses the last column.
        TMA: If True, the copy engine of Hopper loads the tile.
    """
    if TMA:
        tile = source.load([example, first_token, first_column]).reshape(TOKENS, COLUMNS)
    else:
        tokens = tl.arange(0, TOKENS)
        within = tl.arange(0, COLUMNS)
        columns = first_column + within
        # The start of the tile may lie beyond 2^31 entries; the offsets within it do not.
        start = source + example.to(tl.int64) * example_stride + first_token.to(tl.int64) * token_stride
        start += first_column.to(tl.int64) * column_stride
        places = start + (tokens[:, None] * token_stride + within[None, :] * column_stride)
        if EVEN_TOKENS and EVEN_COLUMNS:
            tile = tl.load(places)
        elif EVEN_COLUMNS:
            tile = tl.load(places, mask=(first_token + tokens < n_tokens)[:, None], other=0.0)
        else:
            inside = (first_token + tokens < n_tokens)[:, None] & (columns < n_columns)[None, :]
            tile = tl.load(places, mask=inside, other=0.0)
    return tile


@triton.jit
def tile_of(program, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the first row and column of a program's tile; eight rows of tiles run together to share the cache."""
    across = tl.cdiv(n_columns, COLUMNS)
    down = tl.cdiv(n_rows, ROWS)
    group = program // (8 * across)
    height = tl.minimum(down - group * 8, 8)
    within = program % (8 * across)
    return (group * 8 + within % height) * ROWS, within // height * COLUMNS


@triton.jit
def multiply(left, right, product, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Return ``product + left^T right`` in float32."""
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(tl.trans(left), right, product, input_precision=PRECISION)


@triton.jit
def add_squares(
    b,
    a,
    out,
    n_examples,
    n_tokens,
    n_rows,
    n_columns,
    b_example,
    b_token,
    b_column,
    a_example,
    a_token,
    a_column,
    out_split,
    out_row,
    splits,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
    TMA: tl.constexpr,
    ADD: tl.constexpr,
    WIDEN: tl.constexpr,
    EVEN_TOKENS: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
):
    """Sum ``(B_n^T A_n)^2`` over a range of examples, for one tile of ``(rows, columns)``.

    The grid is ``(tiles, splits)``. Each split takes its share of the examples and writes to its own part of ``out``.

    Args:
        b: Output gradients ``(examples, tokens, rows)``: pointer or descriptor.
        a: Inputs ``(examples, tokens, columns)``: pointer or descriptor.
        out: Pointer to float32 ``(splits, rows, columns)``.
        n_examples: Number of examples.
        n_tokens: Tokens of an example.
        n_rows: Rows of the parameter.
        n_columns: Columns of the parameter.
        b_example: Stride of ``b``, as the next two.
        b_token: Stride.
        b_column: Stride.
        a_example: Stride of ``a``, as the next two.
        a_token: Stride.
        a_column: Stride.
        out_split: Stride of ``out``; its columns are contiguous.
        out_row: Stride of ``out``.
        splits: Parts of the range of examples.
        ROWS: Rows of a tile.
        COLUMNS: Columns of a tile.
        TOKENS: Tokens that one product takes.
        PRECISION: Of float32 inputs; narrower ones ignore it.
        FLAT: If True, one loop runs over the pairs (example, tokens), so that loads stay ahead across examples.
        TMA: If True, ``b`` and ``a`` are descriptors.
        ADD: If True, add to ``out``; if False, overwrite it.
        WIDEN: If True, multiply in float32. The interpreter, which knows no products of bfloat16, needs it.
        EVEN_TOKENS: If True, ``TOKENS`` divides ``n_tokens``.
        EVEN_ROWS: If True, ``ROWS`` divides ``n_rows``.
        EVEN_COLUMNS: If True, ``COLUMNS`` divides ``n_columns``.
    """
    row, column = tile_of(tl.program_id(0), n_rows, n_columns, ROWS, COLUMNS)
    split = tl.program_id(1)
    first, last = split * n_examples // splits, (split + 1) * n_examples // splits
    steps = tl.cdiv(n_tokens, TOKENS)
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if FLAT:
        for step in range((last - first) * steps):
            n, t = first + step // steps, step % steps * TOKENS
            left = load_tile(
                b, n, t, row, n_tokens, n_rows, b_example, b_token, b_column,
                TOKENS, ROWS, EVEN_TOKENS, EVEN_ROWS, TMA,
            )  # fmt: skip
            right = load_tile(
                a, n, t, column, n_tokens, n_columns, a_example, a_token, a_column,
                TOKENS, COLUMNS, EVEN_TOKENS, EVEN_COLUMNS, TMA,
            )  # fmt: skip
            product = multiply(left, right, product, PRECISION, WIDEN)
            if t + TOKENS >= n_tokens:
                total += product * product
                product = tl.zeros((ROWS, COLUMNS), tl.float32)
    else:
        for example in range(last - first):
            n = first + example
            product = tl.zeros((ROWS, COLUMNS), tl.float32)
            for block in range(steps):
                t = first * 0 + block * TOKENS  # the interpreter's loop variables are Python's, without methods
                left = load_tile(
                    b, n, t, row, n_tokens, n_rows, b_example, b_token, b_column,
                    TOKENS, ROWS, EVEN_TOKENS, EVEN_ROWS, TMA,
                )  # fmt: skip
                right = load_tile(
                    a, n, t, column, n_tokens, n_columns, a_example, a_token, a_column,
                    TOKENS, COLUMNS, EVEN_TOKENS, EVEN_COLUMNS, TMA,
                )  # fmt: skip
                product = multiply(left, right, product, PRECISION, WIDEN)
            total += product * product
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    places = out + split.to(tl.int64) * out_split + (rows.to(tl.int64) * out_row)[:, None] + columns[None, :]
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    if ADD:
        total += tl.load(places, mask=inside, other=0.0)
    tl.store(places, total, mask=inside)
