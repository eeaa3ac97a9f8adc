"""Gradients of the negative log-likelihood at a model's outputs, for each label that a Fisher sums over."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from squisher_mergekit.errors import ConfigError

Labels = Literal["true", "sampled", "exact", "predicted"]


def batch_seed(seed: int, number: int) -> int:
    """Return a 64-bit seed for the random draws of one batch.

    It depends on the two arguments alone, so that a batch draws the same in any process and after any interruption.

    Args:
        seed: Seed of the whole estimate.
        number: Number of the batch, from 0.

    Example:
        >>> batch_seed(0, 1) == batch_seed(0, 1), batch_seed(0, 1) == batch_seed(1, 0)
        (True, False)
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest(), "big")


def class_output_gradients(
    logits: Tensor, targets: Tensor | None, kind: Labels, num_samples: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Yield the gradients at the logits of a classifier or language model, one for each label.

    The Fisher is the sum of their squares, taken back to the parameters.

    With ``p = softmax(logits)``: ``true`` yields ``p - e_y``; ``predicted`` the same for the likeliest class;
    ``sampled`` yields ``(p - e_c) / sqrt(num_samples)`` for classes drawn from p; ``exact`` yields the columns of a
    factor L with ``L L^T = diag(p) - p p^T``, one fewer than there are classes.

    Args:
        logits: Shape ``(..., C)``; float32 or float64.
        targets: True classes, shape ``(...)``; negative ones are ignored, for every kind.
        kind: The labels of the Fisher.
        num_samples: Number of drawn labels, for ``sampled``.
        generator: Random generator of ``sampled``.

    Returns:
        Tensors shaped like ``logits``, 0 where a target is ignored.

    Raises:
        ConfigError: ``true`` without targets, ``exact`` for tokens, a single class, or targets that are no classes.

    Source: Li, Dangel, Tam and Raffel, "Fishers for Free? Approximating the Fisher Information Matrix by Recycling the
    Squared Gradient Accumulator", Eq. 4 (Fisher) and 7 (empirical Fisher).

    Example:
        >>> (gradient,) = class_output_gradients(torch.zeros(1, 2), torch.tensor([0]), "true", 1, None)
        >>> gradient
        tensor([[-0.5000,  0.5000]])
    """
    _check_classes(logits, targets)
    p = logits.softmax(-1)
    mask = None if targets is None else (targets >= 0).unsqueeze(-1)
    if kind == "exact":
        if logits.ndim > 2:
            raise ConfigError(
                f"labels exact needs one backward pass for each class and token, found {logits.shape[-1]} classes at "
                f"each of {logits.shape[1]} positions; take labels sampled, which is unbiased"
            )
        for column in factor_columns(p):
            yield column if mask is None else column * mask
        return
    for _ in range(num_samples if kind == "sampled" else 1):
        gradient = p.clone()
        chosen = _choose_labels(p, targets, kind, generator)
        gradient.scatter_add_(-1, chosen.unsqueeze(-1), torch.full_like(p[..., :1], -1.0))
        if mask is not None:
            gradient *= mask
        yield gradient / num_samples**0.5 if kind == "sampled" else gradient


def _check_classes(logits: Tensor, targets: Tensor | None) -> None:
    """Refuse a single class, whose probability is always 1, and targets that are no classes.

    Raises:
        ConfigError: There is one class, or a target of another kind.
    """
    if logits.shape[-1] < 2:
        raise ConfigError(
            f"a classifier must have outputs for two classes or more, found shape {list(logits.shape)}; take task "
            "regression, or return a logit for each class"
        )
    if targets is not None and (targets.is_floating_point() or targets.shape != logits.shape[:-1]):
        raise ConfigError(
            f"labels of a classifier must be whole numbers of shape {list(logits.shape[:-1])}, found {targets.dtype} "
            f"of shape {list(targets.shape)}; give classes, or take task regression"
        )


def _choose_labels(p: Tensor, targets: Tensor | None, kind: Labels, generator: torch.Generator | None) -> Tensor:
    """Return one class for each target: the true one, the likeliest, or a drawn one."""
    if kind == "true":
        if targets is None:
            raise ConfigError("labels true needs the labels in every batch; give them, or take labels sampled")
        return targets.clamp_min(0)
    if kind == "predicted":
        return p.argmax(-1)
    # Among exponential variables with rates p, variable c is the smallest with probability p_c. torch.multinomial draws
    # in the same way, but makes the host wait for the device.
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


def factor_columns(p: Tensor) -> Iterator[Tensor]:
    """Yield the columns of the Cholesky factor of ``diag(p) - p p^T``, in closed form.

    With ``q_j = sum_{i >= j} p_i``: ``L_jj = sqrt(p_j q_{j+1} / q_j)`` and ``L_ij = -p_i sqrt(p_j / (q_j q_{j+1}))``
    for ``i > j``; the last column is 0.

    Args:
        p: Probabilities, shape ``(N, C)``.

    Returns:
        C - 1 tensors of shape ``(N, C)``.

    Example:
        >>> p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
        >>> L = torch.stack(list(factor_columns(p)), -1)[0]
        >>> torch.allclose(L @ L.T, torch.diag(p[0]) - p[0][:, None] * p[0])
        True
    """
    tails = p.flip(-1).cumsum(-1).flip(-1)
    tiny = torch.finfo(p.dtype).tiny
    for j in range(p.shape[-1] - 1):
        head, tail = tails[:, j].clamp_min(tiny), tails[:, j + 1]
        column = torch.zeros_like(p)
        column[:, j] = (p[:, j] / head * tail).sqrt()
        # p_i / sqrt(tail) is bounded by sqrt(p_i), as p_i <= tail.
        share = (p[:, j] / head).sqrt().unsqueeze(-1)
        column[:, j + 1 :] = -p[:, j + 1 :] / tail.clamp_min(tiny).sqrt().unsqueeze(-1) * share
        yield column


def regression_output_gradients(
    outputs: Tensor,
    targets: Tensor | None,
    kind: Labels,
    num_samples: int,
    noise: float,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """Yield the gradients at the outputs of a regression, one for each target.

    The likelihood is a Gaussian around the outputs with standard deviation ``noise``.

    ``true`` yields ``(f - y) / noise^2``; ``sampled`` yields ``z / noise / sqrt(num_samples)`` with z standard normal;
    ``exact`` yields ``e_d / noise`` for each of D outputs. ``predicted`` would be 0 and is refused.

    Args:
        outputs: Shape ``(N, D)``.
        targets: True values, shape ``(N, D)``.
        kind: The labels of the Fisher.
        num_samples: Number of drawn labels, for ``sampled``.
        noise: Standard deviation of the targets.
        generator: Random generator of ``sampled``.

    Returns:
        Tensors shaped like ``outputs``.

    Raises:
        ConfigError: ``true`` without targets, or ``predicted``.

    Example:
        >>> (gradient,) = regression_output_gradients(torch.ones(1, 1), torch.zeros(1, 1), "true", 1, 0.5, None)
        >>> gradient
        tensor([[4.]])
    """
    if kind == "true":
        if targets is None:
            raise ConfigError("labels true needs the targets in every batch; give them, or take labels sampled")
        yield (outputs - targets) / noise**2
    elif kind == "predicted":
        raise ConfigError(
            "labels must not be predicted for a regression, whose likeliest target is its output; take labels sampled"
        )
    elif kind == "sampled":
        for _ in range(num_samples):
            drawn = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
            yield drawn / (noise * num_samples**0.5)
    else:
        for d in range(outputs.shape[-1]):
            gradient = torch.zeros_like(outputs)
            gradient[:, d] = 1 / noise
            yield gradient
