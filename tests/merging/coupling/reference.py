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


def fishers_of(kind: str, base: Tensor, thetas: Tensors, fishers: Tensors | None, weights, block: int, damping: float):
    """Return each model's F_i over all entries, row by row, as the dense matrix of the merge."""
    if kind == "columns":
        turned = None if fishers is None else [fisher.T for fisher in fishers]
        return fishers_of("rows", base.T, [theta.T for theta in thetas], turned, weights, block, damping)
    known = fishers or [torch.ones_like(base)] * len(thetas)
    tall, wide = base.shape
    found = []
    for i, theta in enumerate(thetas):
        step, fisher = theta - base, None if fishers is None else fishers[i]
        rates = torch.zeros(tall, dtype=torch.float64)
        left, height = torch.zeros(tall, tall, dtype=torch.float64), block if kind == "rows" else tall
        for low in range(0, tall, height):
            part = slice(low, low + height)
            traces = [w * float(each[part].sum()) for w, each in zip(weights, known, strict=True)]
            if fishers is None or sum(traces) == 0:
                traces = list(weights)
            rates[part] = traces[i] / sum(traces)
            if kind == "rows":
                left[part, part] = factor(step[part], None if fisher is None else fisher[part], block)
        right = torch.eye(wide, dtype=torch.float64)
        if kind == "kron":
            left, right = factor(step, fisher, block), factor(step.T, None if fisher is None else fisher.T, block)
        whole = torch.kron(left, right) + damping * torch.eye(base.numel(), dtype=torch.float64)
        found.append(torch.kron(torch.diag(rates), torch.eye(wide, dtype=torch.float64)) @ whole)
    return found


def step_report(kind: str, base: Tensor, merged: Tensor, thetas: Tensors, fishers, weights, block: int, damping: float):
    """Return the shares of the merged step and the conflict, from dense Fishers."""
    dense = fishers_of(kind, base, thetas, fishers, weights, block, damping)

    def flat(tensor: Tensor) -> Tensor:
        return (tensor.T if kind == "columns" else tensor).flatten()

    step, task_vectors = flat(merged - base), [flat(theta - base) for theta in thetas]
    pairs = list(zip(dense, task_vectors, strict=True))
    pulls = [float(step @ fisher @ task_vector) for fisher, task_vector in pairs]
    misfit = sum(float((step - task_vector) @ fisher @ (step - task_vector)) for fisher, task_vector in pairs)
    size = sum(float(task_vector @ fisher @ task_vector) for fisher, task_vector in pairs)
    return [pull / sum(pulls) for pull in pulls], misfit / size
