"""Scores of weights, as pure functions of tensors.

All tensors have the shape of the weight. Scores are float64: F spans so many decades that its product with a square
leaves the range of float32.
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
    """Return the second-order growth of the loss if a weight becomes 0: ``rho = theta^2 F / 2``.

    Source: section 3.3 of "Fishers for Free?" (Li et al., ICML 2025); Theis et al., 2018.

    Example:
        >>> saliency(torch.tensor([2.0, -1.0]), torch.tensor([3.0, 4.0]))
        tensor([6., 2.], dtype=torch.float64)
    """
    return theta.double().square().mul_(fisher).mul_(0.5)


def reset_loss(tuned: Tensor, base: Tensor, fisher: Tensor) -> Tensor:
    """Return the second-order growth of the loss if a weight is reset: ``(theta - theta_0)^2 F / 2``.

    Source: the expansion behind section 3.3 of "Fishers for Free?", about the pre-trained value theta_0 in place of 0.

    Example:
        >>> reset_loss(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([4.0]))
        tensor([2.], dtype=torch.float64)
    """
    return (tuned.double() - base).square_().mul_(fisher).mul_(0.5)


def movement(tuned: Tensor, base: Tensor) -> Tensor:
    """Return the distance of a weight from its pre-trained value: ``|theta - theta_0|``.

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

    With the mean gradient g this is the square of a mean, in which gradients of opposite sign cancel. The Fisher has
    the mean of the squares.

    Source: the score of a single weight in the pruning code behind Table 5 of "Fishers for Free?".

    Example:
        >>> taylor_squared(torch.tensor([2.0]), torch.tensor([-3.0]))
        tensor([36.], dtype=torch.float64)
    """
    return (theta.double() * gradient).square_()


def random_score(name: str, seed: int) -> Score:
    """Return a score function that draws uniformly from [0, 1); the baseline.

    The draws depend only on the name of the tensor and the seed. Call the function on the blocks of the tensor in
    order.

    Example:
        >>> first, again = (random_score("w", seed=0)(torch.zeros(3)) for _ in range(2))
        >>> torch.equal(first, again)
        True
    """
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    return lambda block: torch.rand(block.shape, generator=generator, device="cpu").double()


def sort_keys(score: Score, *tensors: Tensor, unit: float = 1.0) -> Tensor:
    """Return the sort keys of a score: integers in the order of ``score(*tensors) / unit``.

    The keys are those of the square root in float32 (:func:`~squisher_mergekit.tensors.topk.keys`), as the score
    itself can leave the range of float32. Scores that differ by less than 2.4e-7 of their value can have equal keys.

    Args:
        score: Function from blocks of the tensors to non-negative float64.
        tensors: The tensors, of one shape.
        unit: Divisor of the scores, such as their mean over a layer; 0 counts as 1.

    Returns:
        int32, of the shape of the tensors.

    Example:
        >>> tiny = torch.tensor([1e-30, 1e-25])
        >>> sort_keys(saliency, tiny, tiny).diff().item() > 0
        True
    """
    keys = torch.empty(tensors[0].shape, dtype=torch.int32, device="cpu")
    flat = keys.view(-1)
    for start, block in _blocks(score, tensors):
        roots = (block / unit if unit else block).sqrt_().to(torch.float32)
        flat[start : start + len(block)] = topk.keys(roots)
    return keys


def mean(score: Score, *tensors: Tensor) -> float:
    """Return the mean score over the entries of a tensor; 0 if there are none."""
    total = sum(block.sum().item() for _, block in _blocks(score, tensors))
    return total / max(tensors[0].numel(), 1)


def _blocks(score: Score, tensors: tuple[Tensor, ...]) -> Iterator[tuple[int, Tensor]]:
    """Yield the start and the scores of each block; the scores of a whole tensor are never in memory at once."""
    flat = [tensor.detach().cpu().reshape(-1) for tensor in tensors]
    for start in range(0, len(flat[0]), _BLOCK):
        yield start, score(*(tensor[start : start + _BLOCK] for tensor in flat))
