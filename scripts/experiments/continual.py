"""Continual learning: division of a set into contexts, competing outputs, and reported numbers.

Three scenarios differ in the knowledge when the model is used. ``task``: the context is known, so only the outputs of
its classes compete. ``domain``: the context is neither known nor predicted. All contexts share the outputs, and a label
is the index of the class within its context. ``class``: the context is predicted as well, so all seen classes compete.

Source: van de Ven, Tuytelaars and Tolias, "Three types of incremental learning", 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from squisher_mergekit.errors import ConfigError

Scenario = Literal["task", "domain", "class"]
Contexts = Sequence[Sequence[int]]


def split_classes(classes: int, contexts: int, seed: int) -> list[tuple[int, ...]]:
    """Return the classes of each context, drawn by the seed: all classes, in contexts of equal size.

    Args:
        classes: Number of classes, which are numbered from 0.
        contexts: Number of contexts.
        seed: Seed of the draw.

    Raises:
        ConfigError: The number of classes is not a multiple of the number of contexts.

    Example:
        >>> sorted(sum(split_classes(10, 5, seed=0), ()))
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    if contexts < 1 or classes < 1 or classes % contexts:
        raise ConfigError(f"classes must be a multiple of contexts, found {classes} classes and {contexts} contexts")
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed)).tolist()
    each = classes // contexts
    return [tuple(order[start : start + each]) for start in range(0, classes, each)]


def rows_of(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Return the indices of the examples of the given classes, in order.

    Example:
        >>> rows_of(torch.tensor([3, 1, 3, 2]), [3, 2])
        tensor([0, 2, 3])
    """
    wanted = torch.tensor(list(classes), dtype=labels.dtype, device=labels.device)
    return torch.isin(labels, wanted).nonzero().squeeze(1)


def permutations(features: int, contexts: int, seed: int) -> list[Tensor]:
    """Return an order of the features for each context, the first included: ``images[:, order]`` is permuted.

    Example:
        >>> [order.sort().values.tolist() for order in permutations(3, 2, seed=0)]
        [[0, 1, 2], [0, 1, 2]]
    """
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(features, generator=generator) for _ in range(contexts)]


def targets(labels: Tensor, contexts: Contexts, context: int, scenario: Scenario) -> Tensor:
    """Return the right output for each example of a context.

    Args:
        labels: Classes, [n].
        contexts: Classes of each context.
        context: Number of the context of the examples.
        scenario: See the module.

    Raises:
        ConfigError: A label is not a class of the context.

    Example:
        >>> targets(torch.tensor([7, 2, 7]), [(0, 1), (2, 7)], 1, "domain")
        tensor([1, 0, 1])
    """
    classes = torch.tensor(list(contexts[context]), device=labels.device)
    same = labels[:, None] == classes
    if not bool(same.any(1).all()):
        raise ConfigError(
            f"labels must be among the classes {list(contexts[context])} of context {context}; pick rows_of"
        )
    return same.long().argmax(1) if _checked(scenario) == "domain" else labels


def active(outputs: int, contexts: Contexts, context: int, scenario: Scenario, seen: int | None = None) -> Tensor:
    """Return the mask of the competing outputs, [outputs].

    Args:
        outputs: Number of outputs of the model.
        contexts: Classes of each context.
        context: Number of the context of the examples.
        scenario: See the module.
        seen: Number of the latest trained context, for ``class``; by default ``context``.

    Raises:
        ConfigError: The model has too few outputs.

    Example:
        >>> active(4, [(3, 1), (0, 2)], 0, "task")
        tensor([False,  True, False,  True])
    """
    if _checked(scenario) == "task":
        wanted = list(contexts[context])
    elif scenario == "domain":
        wanted = list(range(len(contexts[context])))
    else:
        wanted = [label for classes in contexts[: (context if seen is None else seen) + 1] for label in classes]
    if max(wanted) >= outputs:
        raise ConfigError(f"outputs must be at least {max(wanted) + 1}, one for each class, found {outputs}")
    mask = torch.zeros(outputs, dtype=torch.bool)
    mask[wanted] = True
    return mask


def masked(logits: Tensor, mask: Tensor) -> Tensor:
    """Return logits [n, outputs] with minus infinity and no gradient at outputs that do not compete.

    Example:
        >>> masked(torch.tensor([[1.0, 2.0]]), torch.tensor([True, False]))
        tensor([[1., -inf]])
    """
    return logits.masked_fill(~mask.to(logits.device), float("-inf"))


def accuracy(logits: Tensor, right: Tensor, mask: Tensor | None = None) -> float:
    """Return the share of examples whose largest competing logit is the right one.

    Example:
        >>> logits, mask = torch.tensor([[1.0, 2.0, 9.0], [2.0, 1.0, 9.0]]), torch.tensor([True, True, False])
        >>> accuracy(logits, torch.tensor([1, 1]), mask)
        0.5
    """
    found = (logits if mask is None else masked(logits, mask)).argmax(1)
    return float((found == right).double().mean())


def average_so_far(matrix: Tensor) -> Tensor:
    """Return the mean accuracy over the seen contexts, after each context: ``A_i = mean_(j <= i) R_ij``.

    Args:
        matrix: ``R[i, j]``, the accuracy on context j after training on contexts 0 to i; unused above the diagonal.

    Example:
        >>> average_so_far(torch.tensor([[0.75, 0.0], [0.5, 1.0]]))
        tensor([0.7500, 0.7500])
    """
    return torch.stack([row[: number + 1].mean() for number, row in enumerate(matrix)])


def backward_transfer(matrix: Tensor) -> float:
    """Return the mean gain of earlier contexts after they were learnt: ``mean_(j < T) R_Tj - R_jj``.

    Args:
        matrix: See :func:`average_so_far`; at least two contexts.

    Raises:
        ConfigError: The matrix has only one context.

    Source: Lopez-Paz and Ranzato, "Gradient episodic memory", 2017, without its last term, which is 0.

    Example:
        >>> backward_transfer(torch.tensor([[0.75, 0.0], [0.5, 1.0]]))
        -0.25
    """
    if len(matrix) < 2:
        raise ConfigError(f"backward transfer needs at least two contexts, found {len(matrix)}")
    return float((matrix[-1, :-1] - matrix.diagonal()[:-1]).mean())


def forgetting(matrix: Tensor) -> float:
    """Return the mean loss since each context's best accuracy: ``mean_(j < T) max_(j <= i < T) R_ij - R_Tj``.

    Args:
        matrix: See :func:`average_so_far`; at least two contexts.

    Raises:
        ConfigError: The matrix has only one context.

    Source: Chaudhry et al., "Riemannian walk for incremental learning", 2018.

    Example:
        >>> forgetting(torch.tensor([[0.5, 0.0, 0.0], [0.75, 1.0, 0.0], [0.25, 0.5, 1.0]]))
        0.5
    """
    last = len(matrix) - 1
    if last < 1:
        raise ConfigError(f"forgetting needs at least two contexts, found {len(matrix)}")
    best = torch.stack([matrix[number:last, number].max() for number in range(last)])
    return float((best - matrix[last, :last]).mean())


def _checked(scenario: str) -> str:
    if scenario not in ("task", "domain", "class"):
        raise ConfigError(f"scenario must be task, domain or class, found {scenario!r}")
    return scenario
