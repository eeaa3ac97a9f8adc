"""Slow reference of the lifted Fisher, in Python's own float64, entry by entry."""

import math

import torch


def reference(a, b, v_a, v_b, scale):
    """Return F of ``W0 + scale B A``, shape ``[out, in]``, by the sums of the formula."""
    a, b = a.double().tolist(), b.double().tolist()
    ranks, inputs, outputs = range(len(a)), range(len(a[0])), range(len(b))
    rows, columns = [0.0 for _ in outputs], [0.0 for _ in inputs]
    a_norms = [sum(x * x for x in a[k]) for k in ranks]
    b_norms = [sum(b[o][k] ** 2 for o in outputs) for k in ranks]
    if v_b is not None:
        live = [k for k in ranks if a_norms[k]]
        for o in outputs:
            rows[o] = sum(v_b[o][k].item() / a_norms[k] for k in live) / (max(len(live), 1) * scale * scale)
    if v_a is not None:
        live = [k for k in ranks if b_norms[k]]
        for i in inputs:
            columns[i] = sum(v_a[k][i].item() / b_norms[k] for k in live) / (max(len(live), 1) * scale * scale)
    row_mean, column_mean = sum(rows) / len(rows), sum(columns) / len(columns)
    if not row_mean and not column_mean:
        return torch.zeros(len(b), len(a[0]), dtype=torch.float64)
    if not row_mean:
        rows, row_mean, level = [1.0 for _ in outputs], 1.0, column_mean
    elif not column_mean:
        columns, column_mean, level = [1.0 for _ in inputs], 1.0, row_mean
    else:
        level = math.sqrt(row_mean * column_mean)
    entries = [[level * (row / row_mean) * (column / column_mean) for column in columns] for row in rows]
    return torch.tensor(entries, dtype=torch.float64)
