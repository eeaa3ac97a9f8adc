"""How much each weight matters: the scores by which weights are kept, as pure functions of tensors.

All tensors are shaped like the weight. Scores are float64: F spans so many decades that its product with a square
leaves float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from squisher_mergekit.tensors import topk

Score = Callable[..., Tensor]
_BLOCK = 1 << 20


def saliency(theta: Tensor, fisher: Tensor) -> Tensor:
    """Return by how much the loss grows if a weight becomes 0, to second order: ``rho = theta^2 F / 2``.

    Source: section 3.3 of "Fishers for Free?" (Li et al., ICML 2025); Theis et al., 2018.

    Example:
        >>> saliency(torch.tensor([2.0, -1.0]), torch.tensor([3.0, 4.0]))
        tensor([6., 2.], dtype=torch.float64)
    """
    return theta.double().square().mul_(fisher).mul_(0.5)


def reset_loss(tuned: Tensor, base: Tensor, fisher: Tensor) -> Tensor:
    """Return by how much the loss grows if a weight goes back to the base's: ``(theta - theta_0)^2 F / 2``.

    Source: the second-order expansion behind section 3.3, about the pre-trained value in place of 0.

    Example:
        >>> reset_loss(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([4.0]))
        tensor([2.], dtype=torch.float64)
    """
    return (tuned.double() - base).square_().mul_(fisher).mul_(0.5)


def movement(tuned: Tensor, base: Tensor) -> Tensor:
    """Return how far a weight went in training: ``|theta - theta_0|``.

    Example:
        >>> movement(torch.tensor([-2.0]), torch.tensor([1.0]))
        tensor([3.], dtype=torch.float64)
    """
    return (tuned.double() - base).abs_()


def magnitude(theta: Tensor) -> Tensor:
    """Return ``|theta|``.

    Example:
        >>> magnitude(torch.tensor([-2.0]))
        tensor([2.], dtype=torch.float64)
    """
    return theta.double().abs()


def taylor_squared(theta: Tensor, gradient: Tensor) -> Tensor:
    """Return the square of the first-order change of the loss if a weight becomes 0: ``(theta g)^2``.

    With g the gradient averaged over many examples this is the square of a mean. It is not the Fisher's score, which
    has the mean of the squares: gradients of opposite sign cancel here.

    Source: what the pruning code behind Table 5 of "Fishers for Free?" calls its Fisher score, for a single weight.

    Example:
        >>> taylor_squared(torch.tensor([2.0]), torch.tensor([-3.0]))
        tensor([36.], dtype=torch.float64)
    """
    return (theta.double() * gradient).square_()


def chance(name: str, seed: int) -> Score:
    """Return a score that is drawn evenly from [0, 1), the baseline: of a tensor's blocks, given one after the other.

    The draws depend on the tensor's name and the seed alone.

    Example:
        >>> first, again = (chance("w", seed=0)(torch.zeros(3)) for _ in range(2))
        >>> torch.equal(first, again)
        True
    """
    mark = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mark, "little", signed=True))
    return lambda block: torch.rand(block.shape, generator=generator).double()


def ranked(score: Score, *tensors: Tensor, unit: float = 1.0) -> Tensor:
    """Return integers that order as ``score(*tensors) / unit`` does (see :func:`~.fisher.selection.keys`).

    They are those of the square root in float32, which holds where the score itself would not: scores that differ by
    less than 2.4e-7 of themselves can count as equal.

    Args:
        score: From blocks of the tensors to float64, not negative.
        tensors: Alike in shape.
        unit: What one is measured by, such as the mean of its layer; 0 counts as 1.

    Returns:
        int32, shaped like the tensors.

    Example:
        >>> tiny = torch.tensor([1e-30, 1e-25])
        >>> ranked(saliency, tiny, tiny).diff().item() > 0
        True
    """
    keys = torch.empty(tensors[0].shape, dtype=torch.int32)
    flat = keys.view(-1)
    for start, block in _blocks(score, tensors):
        roots = (block / unit if unit else block).sqrt_().to(torch.float32)
        flat[start : start + len(block)] = topk.keys(roots)
    return keys


def mean(score: Score, *tensors: Tensor) -> float:
    """Return the mean score of a tensor's entries; 0 if there are none."""
    total = sum(block.sum().item() for _, block in _blocks(score, tensors))
    return total / max(tensors[0].numel(), 1)


def _blocks(score: Score, tensors: tuple[Tensor, ...]) -> Iterator[tuple[int, Tensor]]:
    """Yield where a block begins, and its scores; they never exist of a whole tensor at once."""
    flat = [tensor.detach().cpu().reshape(-1) for tensor in tensors]
    for start in range(0, len(flat[0]), _BLOCK):
        yield start, score(*(tensor[start : start + _BLOCK] for tensor in flat))
