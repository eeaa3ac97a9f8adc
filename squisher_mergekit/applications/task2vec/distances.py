"""Distances between the embeddings of tasks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from squisher_mergekit.applications.task2vec.embedding import Embedding
from squisher_mergekit.errors import ConfigError, MismatchError, ValuesError
from squisher_mergekit.fisher.values import check_values

Metric = Literal["cosine", "asymmetric", "plain_cosine", "normalized_cosine", "log_euclidean", "kl", "jensen_shannon"]
TaskNormalize = Literal["none", "mean", "l2"]

ALPHA = 0.15
SMALLEST = 1e-6  # smallest value, relative to the mean of a task, before a logarithm or a division

Task: TypeAlias = Embedding | Mapping[str, Tensor] | Tensor
"""Embedding, mapping from name to values, or a vector, which counts as one tensor."""


def unit_distance(a: Tensor, b: Tensor) -> float:
    """Return the cosine distance, ``1 - cos(a, b)``, as ``|a/|a| - b/|b||^2 / 2``: exactly 0 for equal vectors."""
    apart = a / a.norm() - b / b.norm()
    return float(apart.square().sum()) / 2


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the paper's symmetric distance, ``1 - cos(F_a / (F_a + F_b), F_b / (F_a + F_b))``, from 0 to 1.

    An entry counts by its shares in the two tasks, not by its size; entries that are 0 in both are omitted. A common
    factor does not change the distance, a factor on one task does.

    Source:
        Li et al. (2025), section 3.5; Achille et al. (2019), section 3.

    Example:
        >>> a, b = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([1.0, 3.0, 0.0])
        >>> round(cosine(a, b), 6), cosine(a, a)
        (0.4, 0.0)
    """
    both = a + b
    positive = both > 0
    return unit_distance(a[positive] / both[positive], b[positive] / both[positive])


def asymmetric(a: Tensor, b: Tensor, trivial_a: Tensor, alpha: float = ALPHA) -> float:
    """Return the distance from a source a to a target b, ``d(a, b) - alpha d(a, trivial)``, which may be negative.

    A complex source, far from its :func:`trivial` embedding, comes nearer.

    Source:
        Achille et al. (2019), section 3, with their alpha.
    """
    return cosine(a, b) - alpha * cosine(a, trivial_a)


def trivial(task: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the trivial embedding of a task: every filter of a tensor has the mean of the tensor.

    The original uses the prior, with one variance per layer. A Fisher has no prior; the means keep the scale of each
    layer, which belongs to the network, and drop the differences between filters, which belong to the task. The
    distance to the trivial embedding does not depend on the scale of F.

    Example:
        >>> trivial({"w": torch.tensor([1.0, 3.0])})
        {'w': tensor([2., 2.])}
    """
    return {name: tensor.mean().expand_as(tensor).clone() for name, tensor in task.items()}


def plain_cosine(a: Tensor, b: Tensor) -> float:
    """Return ``1 - cos(F_a, F_b)``: a few large entries dominate it; factors do not change it."""
    return unit_distance(a, b)


def normalized_cosine(a: Tensor, b: Tensor, trivial_a: Tensor, trivial_b: Tensor) -> float:
    """Return the cosine distance of the variances ``1 / F``, each in units of its layer's trivial one.

    The least informed filters dominate it. Small entries are raised, see :func:`distance`.
    """
    pairs = ((_clamped(a), _clamped(trivial_a)), (_clamped(b), _clamped(trivial_b)))
    return unit_distance(*(prior / value for value, prior in pairs))


def log_euclidean(a: Tensor, b: Tensor) -> float:
    """Return the root mean square of ``ln F_a - ln F_b``, in nats. Small entries are raised, see :func:`distance`."""
    a, b = _positive(a, b)
    return (a.log() - b.log()).square().mean().sqrt().item()


def kl(a: Tensor, b: Tensor) -> float:
    """Return the mean over entries of the larger divergence of ``N(0, 1/F_a)`` and ``N(0, 1/F_b)`` from each other."""
    a, b = _positive(a, b)
    forward = 0.5 * (b / a - 1 + a.log() - b.log())
    backward = 0.5 * (a / b - 1 + b.log() - a.log())
    return torch.maximum(forward, backward).mean().item()


def jensen_shannon(a: Tensor, b: Tensor) -> float:
    """Return the mean divergence of both normals from the one with the mean of their variances ``1 / F``.

    The divergence is ``ln(arithmetic / geometric mean of the variances) / 2``; the original uses this normal
    in place of the mixture.
    """
    a, b = _positive(a, b)
    between = (a.reciprocal() + b.reciprocal()).div(2).log()
    return (0.5 * (between + 0.5 * (a.log() + b.log()))).mean().item()


def _positive(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries that are positive in a or b, small ones raised."""
    positive = (a > 0) | (b > 0)
    return _clamped(a)[positive], _clamped(b)[positive]


def _clamped(values: Tensor) -> Tensor:
    """Return the values, small ones raised to :data:`SMALLEST` of their mean."""
    return values.clamp_min(SMALLEST * values.mean().item())


_SYMMETRIC: dict[str, Callable[[Tensor, Tensor], float]] = {
    "cosine": cosine,
    "plain_cosine": plain_cosine,
    "log_euclidean": log_euclidean,
    "kl": kl,
    "jensen_shannon": jensen_shannon,
}


def distance(
    a: Task, b: Task, metric: Metric = "cosine", normalize: TaskNormalize = "mean", alpha: float = ALPHA
) -> float:
    """Return the distance of two tasks; an asymmetric metric measures from a, the source, to b, the target.

    Args:
        a: A task.
        b: Another task, with the same tensors.
        metric: ``cosine``, the paper's (:func:`cosine`); :func:`asymmetric`; or one of the alternatives
            :func:`plain_cosine`, :func:`normalized_cosine`, :func:`log_euclidean`, :func:`kl`, :func:`jensen_shannon`.
            Metrics with a logarithm or a variance raise every value to at least 1e-6 of the task's mean.
        normalize: Divisor of each task: 1 (``none``), its ``mean`` over all values, or its L2 norm (``l2``). Batch
            size, clipping and loss reduction scale F, and a factor on one task changes the distance. Mean and norm
            remove such factors; a few large values dominate the norm.
        alpha: Weight of the trivial distance in ``asymmetric``.

    Returns:
        The distance, computed in float64.

    Raises:
        MismatchError: The tasks differ in tensors, lengths, granularity or scaling.
        ValuesError: A value is NaN, infinite or negative, or all are 0.
        ConfigError: An argument is out of range.

    Example:
        >>> a, b = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 3.0])
        >>> [round(distance(a, k * b, normalize="none"), 3) for k in (1, 7)], round(distance(a, 7 * b), 3)
        ([0.4, 0.295], 0.4)
    """
    return distance_matrix({"a": a, "b": b}, metric, normalize, alpha)[0, 1].item()


def distance_matrix(
    tasks: Mapping[str, Task],
    metric: Metric = "cosine",
    normalize: TaskNormalize = "mean",
    alpha: float = ALPHA,
    progress: Iterable[str] | None = None,
) -> Tensor:
    """Return all distances between tasks.

    Args:
        tasks: Name -> task; at least two.
        metric: As for :func:`distance`.
        normalize: As for :func:`distance`.
        alpha: As for :func:`distance`.
        progress: The names, wrapped in a progress bar.

    Returns:
        float64, ``[n, n]``: the distance from the task of the row to that of the column.

    Raises:
        RefusedError: As for :func:`distance`, or for fewer than two tasks.
    """
    if normalize == "norm":  # type: ignore[comparison-overlap]
        warnings.warn("normalize='norm' is deprecated; use 'l2'", DeprecationWarning, stacklevel=2)
        normalize = "l2"
    _check_arguments(metric, normalize, alpha, len(tasks))
    _check_fit(tasks)
    reference = _as_mapping(next(iter(tasks.values())))
    flat = {name: _flat(_as_mapping(task), list(reference), normalize, name) for name, task in tasks.items()}
    if metric == "asymmetric" and all(tensor.numel() == 1 for tensor in reference.values()):
        raise ConfigError(
            "the asymmetric distance needs several values a tensor, but these embeddings have one each; embed per row"
        )
    needed = metric in ("asymmetric", "normalized_cosine")
    sizes = [tensor.numel() for tensor in reference.values()]
    priors = {name: _flat_trivial(values, sizes) for name, values in flat.items()} if needed else {}
    result = torch.zeros(len(tasks), len(tasks), dtype=torch.float64, device="cpu")
    names = list(tasks)
    for i, source in enumerate(progress or names):
        for j, target in enumerate(names):
            if metric == "asymmetric":
                result[i, j] = asymmetric(flat[source], flat[target], priors[source], alpha)
            elif j > i:
                a, b = flat[source], flat[target]
                if metric == "normalized_cosine":
                    result[i, j] = normalized_cosine(a, b, priors[source], priors[target])
                else:
                    result[i, j] = _SYMMETRIC[metric](a, b)
                result[j, i] = result[i, j]
    return result


def clustered(matrix: Tensor) -> tuple[list[int], Tensor]:
    """Return an order of tasks with near tasks together, and the tree of the order.

    The tree is that of average linkage, with leaves ordered so that neighbours are near. Asymmetric distances are
    averaged over both directions. Negative distances are shifted to be at least 0.

    Args:
        matrix: Distances, ``[n, n]``, n at least 2.

    Returns:
        The order, and scipy's linkage matrix, float64, ``[n - 1, 4]``: two clusters, their height, and their size.

    Example:
        >>> clustered(torch.tensor([[0.0, 5.0, 1.0], [5.0, 0.0, 6.0], [1.0, 6.0, 0.0]]))[0]
        [1, 0, 2]
    """
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    mean = (matrix + matrix.T).double() / 2
    condensed = squareform(mean.fill_diagonal_(0).numpy(), checks=False)
    tree = hierarchy.linkage(condensed - min(condensed.min(), 0), method="average", optimal_ordering=True)
    return hierarchy.leaves_list(tree).tolist(), torch.from_numpy(tree)


def _check_arguments(metric: str, normalize: str, alpha: float, count: int) -> None:
    for what, value, known in (("metric", metric, get_args(Metric)), ("normalize", normalize, get_args(TaskNormalize))):
        if value not in known:
            raise ConfigError(f"{what} must be one of {', '.join(known)}, found {value!r}")
    if not 0 <= alpha < float("inf"):
        raise ConfigError(f"alpha must be a number of at least 0, found {alpha}")
    if count < 2:
        raise ConfigError(f"distances need at least two tasks, found {count}; give more")


def _as_mapping(task: Task) -> Mapping[str, Tensor]:
    if isinstance(task, Embedding):
        return task.tensors
    return {"vector": task} if isinstance(task, Tensor) else task


def _check_fit(tasks: Mapping[str, Task]) -> None:
    """Raise if a task differs from the first one in tensors, lengths, granularity or scaling."""
    (first, first_task), *others = tasks.items()
    reference = _as_mapping(first_task)
    for name, task in others:
        if isinstance(first_task, Embedding) and isinstance(task, Embedding):
            for key in ("per", "scaling"):
                a, b = getattr(first_task.info, key), getattr(task.info, key)
                if a != b:
                    raise MismatchError(
                        f"embeddings must be made with the same {key}, but {first} has {a} and {name} {b}; embed both "
                        f"again with one --{key}"
                    )
        tensors = _as_mapping(task)
        for key in (*reference, *tensors):
            if key not in tensors or key not in reference:
                having, lacking = (first, name) if key in reference else (name, first)
                raise MismatchError(
                    f"embeddings must be of one architecture, but {having} has {key} and {lacking} lacks it; take "
                    "Fishers of one network, or embed them again and leave it out with --exclude"
                )
            if tensors[key].numel() != reference[key].numel():
                raise MismatchError(
                    f"embeddings must be of one architecture, but {key} has {reference[key].numel()} values in {first} "
                    f"and {tensors[key].numel()} in {name}; take Fishers of one network"
                )


def _flat(task: Mapping[str, Tensor], names: list[str], normalize: TaskNormalize, label: str) -> Tensor:
    """Return all values of a task as one normalised float64 vector."""
    for name in names:
        check_values(task[name], name, label)
    flat = torch.cat([task[name].reshape(-1).double().cpu() for name in names]) if names else torch.empty(0)
    if not bool((flat > 0).any()):
        raise ValuesError(f"an embedding must hold a value above 0, but {label} has {flat.numel()} values and none is")
    if normalize == "none":
        return flat
    return flat / (flat.mean() if normalize == "mean" else flat.norm())


def _flat_trivial(flat: Tensor, sizes: list[int]) -> Tensor:
    """Return :func:`trivial` of a vector that concatenates tensors of these sizes."""
    parts = {str(number): part for number, part in enumerate(torch.split(flat, sizes))}
    return torch.cat(list(trivial(parts).values()))
