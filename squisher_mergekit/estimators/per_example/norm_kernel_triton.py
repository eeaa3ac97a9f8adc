"""Device code of :mod:`~squisher_mergekit.estimators.per_example.norm_kernel`; importing it needs Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Triton reads annotations; all but those of constants are left out.

import triton
import triton.language as tl


@triton.jit
def sum_products(
    x,
    b,
    out,
    n_rows,
    n_columns,
    epsilon,
    x_example,
    x_row,
    b_example,
    b_row,
    chunks,
    COLUMNS: tl.constexpr,
    CENTERED: tl.constexpr,
):
    """Sum ``normalize(x) * b`` over a chunk of an example's rows.

    The grid is ``(examples, chunks)``.

    Args:
        x: Inputs of the norm ``(examples, rows, columns)``.
        b: Output gradients, of the same shape.
        out: Float32 sums ``(examples, chunks, columns)``, contiguous.
        n_rows: Rows of an example.
        n_columns: Columns, over which each row is normalized.
        epsilon: Added to the mean square.
        x_example: Stride of ``x``, whose columns are contiguous.
        x_row: Stride of ``x``.
        b_example: Stride of ``b``, whose columns are contiguous.
        b_row: Stride of ``b``.
        chunks: Parts of an example's rows.
        COLUMNS: Power of two, at least the number of columns.
        CENTERED: If True, subtract the mean first, as a layer norm does.
    """
    example, chunk = tl.program_id(0), tl.program_id(1)
    first, last = chunk * n_rows // chunks, (chunk + 1) * n_rows // chunks
    columns = tl.arange(0, COLUMNS)
    inside = columns < n_columns
    x += example.to(tl.int64) * x_example + first.to(tl.int64) * x_row
    b += example.to(tl.int64) * b_example + first.to(tl.int64) * b_row
    total = tl.zeros((COLUMNS,), tl.float32)
    for _ in range(last - first):
        values = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(b + columns, mask=inside, other=0.0).to(tl.float32)
        if CENTERED:
            values = tl.where(inside, values - tl.sum(values, 0) / n_columns, 0.0)
        total += values * gradient * (1.0 / tl.sqrt(tl.sum(values * values, 0) / n_columns + epsilon))
        x += x_row
        b += b_row
    tl.store(out + (example * chunks + chunk).to(tl.int64) * n_columns + columns, total, mask=inside)
