"""Slow float64 references of the coupled merges: dense matrices, one block after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


def factor(step: Tensor, fisher: Tensor | None, block: int) -> Tensor:
    """Return the factor over all rows, coupled inside blocks, of mean eigenvalue 1."""
    size = step.shape[0]
    whole = torch.zeros(size, size, dtype=torch.float64)
    for low in range(0, size, block):
        rows = slice(low, min(low + block, size))
        power = step[rows].square() if fisher is None else fisher[rows]
        moved = step[rows] if fisher is None else step[rows] * fisher[rows].sqrt()
        gram = moved @ moved.T
        norms = gram.diagonal().sqrt()
        for i in range(gram.shape[0]):
            for j in range(gram.shape[0]):
                known = norms[i] > 0 and norms[j] > 0
                correlation = gram[i, j] / (norms[i] * norms[j]) if known else torch.tensor(0.0)
                gram[i, j] = (power[i].sum() * power[j].sum()).sqrt() * (1.0 if i == j else correlation)
        whole[rows, rows] = gram
    trace = whole.trace()
    return whole * size / trace if trace > 0 else whole


def rows(base: Tensor, thetas: Tensors, fishers: Tensors | None, weights: Sequence[float], block: int, damping: float):
    """Merge with coupled rows by a dense solve per block; the weighted mean where no model has a signal."""
    merged = base.clone()
    for low in range(0, base.shape[0], block):
        part = slice(low, min(low + block, base.shape[0]))
        traces = [w * (1.0 if fishers is None else float(fishers[i][part].sum())) for i, w in enumerate(weights)]
        if sum(traces) == 0:
            merged[part] = sum(w * t[part] for w, t in zip(weights, thetas, strict=True)) / sum(weights)
            continue
        size = part.stop - part.start
        left, right = torch.zeros(size, size, dtype=torch.float64), torch.zeros_like(base[part])
        for i, theta in enumerate(thetas):
            step = theta[part] - base[part]
            own = factor(step, None if fishers is None else fishers[i][part], size)
            own = traces[i] / sum(traces) * (own + damping * torch.eye(size, dtype=torch.float64))
            left, right = left + own, right + own @ step
        merged[part] = base[part] + torch.linalg.solve(left, right)
    return merged


def columns(base: Tensor, thetas: Tensors, fishers: Tensors | None, *settings):
    """Merge with coupled columns: the merge of the transposes."""
    turned = None if fishers is None else [fisher.T for fisher in fishers]
    return rows(base.T, [theta.T for theta in thetas], turned, *settings).T


def kron(base: Tensor, thetas: Tensors, fishers: Tensors | None, weights: Sequence[float], block: int, damping: float):
    """Merge with Kronecker factors by one dense solve over all entries."""
    traces = [w * (1.0 if fishers is None else float(fishers[i].sum())) for i, w in enumerate(weights)]
    if sum(traces) == 0:
        return sum(w * t for w, t in zip(weights, thetas, strict=True)) / sum(weights)
    size = base.numel()
    left, right = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for i, theta in enumerate(thetas):
        step, fisher = theta - base, None if fishers is None else fishers[i]
        over_rows, over_columns = (
            factor(step, fisher, block),
            factor(step.T, None if fisher is None else fisher.T, block),
        )
        own = torch.kron(over_rows, over_columns) + damping * torch.eye(size, dtype=torch.float64)
        left, right = left + traces[i] / sum(traces) * own, right + traces[i] / sum(traces) * own @ theta.flatten()
    return torch.linalg.solve(left, right).reshape(base.shape)


REFERENCES = {"rows": rows, "columns": columns, "kron": kron}
