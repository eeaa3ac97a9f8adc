"""Distances between tasks, against slow float64 references."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from squisher_mergekit.applications.task2vec import distances
from squisher_mergekit.applications.task2vec.distances import clustered, distance, distance_matrix, trivial
from squisher_mergekit.applications.task2vec.embedding import Embedding, EmbeddingInfo
from squisher_mergekit.errors import ConfigError, MismatchError, ValuesError

SIZES = {"conv.weight": 7, "fc.weight": 13}
METRICS = ["cosine", "asymmetric", "plain_cosine", "normalized_cosine", "log_euclidean", "kl", "jensen_shannon"]


def _task(seed, scale=1.0, zeros=True):
    generator = torch.Generator().manual_seed(seed)
    task = {name: scale * torch.rand(size, generator=generator).double() ** 4 for name, size in SIZES.items()}
    if zeros:
        task["conv.weight"][2] = 0  # zero in every task
        task["fc.weight"][seed % 13] = 0  # zero in this task only
    return task


def _cosine_distance(x, y):
    dot = sum(p * q for p, q in zip(x, y, strict=True))
    return 1 - dot / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))


def _symmetric(x, y):
    """Return the symmetric distance of the paper for two lists."""
    held = [(p, q) for p, q in zip(x, y, strict=True) if p + q > 0]
    return _cosine_distance([p / (p + q) for p, q in held], [q / (p + q) for p, q in held])


def _reference(metric, a, b):
    """Return all metrics over lists, per tensor where that matters, with each task divided by its mean first."""
    a, b = _normalised(a), _normalised(b)
    flat_a, flat_b = ([value for part in task for value in part] for task in (a, b))
    priors = [[sum(part) / len(part) for part in task for _ in part] for task in (a, b)]
    if metric == "cosine":
        return _symmetric(flat_a, flat_b)
    if metric == "asymmetric":
        return _symmetric(flat_a, flat_b) - 0.15 * _symmetric(flat_a, priors[0])
    if metric == "plain_cosine":
        return _cosine_distance(flat_a, flat_b)
    x, y = ([max(value, 1e-6 * sum(flat) / len(flat)) for value in flat] for flat in (flat_a, flat_b))
    if metric == "normalized_cosine":
        variances = [[p / v for p, v in zip(*pair, strict=True)] for pair in zip(priors, (x, y), strict=True)]
        return _cosine_distance(*variances)
    held = [(p, q) for p, q, m, n in zip(x, y, flat_a, flat_b, strict=True) if m > 0 or n > 0]
    if metric == "log_euclidean":
        return math.sqrt(sum(math.log(p / q) ** 2 for p, q in held) / len(held))

    def divergence(v, w):
        """Return the divergence of N(0, v) from N(0, w)."""
        return 0.5 * (v / w - 1 + math.log(w / v))

    if metric == "kl":
        return sum(max(divergence(1 / p, 1 / q), divergence(1 / q, 1 / p)) for p, q in held) / len(held)
    total = 0.0
    for p, q in held:
        between = (1 / p + 1 / q) / 2
        total += 0.5 * (divergence(1 / p, between) + divergence(1 / q, between))
    return total / len(held)


def _normalised(task):
    values = [part.tolist() for part in task.values()]
    count = sum(len(part) for part in values)
    mean = sum(sum(part) for part in values) / count
    return [[value / mean for value in part] for part in values]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1.0, 1e-14])
def test_formulas(metric, scale):
    """Each metric equals its formula computed by loops, also for F near 1e-14 and with zeros."""
    for seed in range(3):
        a, b = _task(seed, scale), _task(seed + 50, 3 * scale)
        assert distance(a, b, metric) == pytest.approx(_reference(metric, a, b), rel=1e-9, abs=1e-12)


def test_hand_computed():
    """Shares of 3:1 and 1:3 are 3/4 and 1/4, so the cosine is 6/10."""
    a, b = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([1.0, 3.0, 0.0])
    assert distance(a, b, normalize="none") == pytest.approx(0.4, abs=1e-12)
    assert distance(a, b, "plain_cosine") == pytest.approx(0.4, abs=1e-12)
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 5.0])
    assert distance(one, other) == pytest.approx(1, abs=1e-12)


@given(seed=st.integers(0, 999), power=st.integers(-12, 12))
def test_a_common_factor_changes_nothing_and_unequal_ones_do(seed, power):
    """Without normalisation the symmetric cosine is invariant to a common factor only.

    With mean or norm it is invariant to any.
    """
    a, b = _task(seed), _task(seed + 1)
    common = {normalize: distance(a, b, normalize=normalize) for normalize in ("none", "mean", "l2")}
    scaled = {name: 10.0**power * part for name, part in a.items()}, {n: 10.0**power * p for n, p in b.items()}
    for normalize, wanted in common.items():
        assert distance(*scaled, normalize=normalize) == pytest.approx(wanted, rel=1e-9)
    unequal = {name: 7 * part for name, part in b.items()}
    assert abs(distance(a, unequal, normalize="none") - common["none"]) > 1e-7
    for normalize in ("mean", "l2"):
        assert distance(a, unequal, normalize=normalize) == pytest.approx(common[normalize], rel=1e-9)


@given(seed=st.integers(0, 999), metric=st.sampled_from(METRICS))
def test_common_properties_of_all_distances(seed, metric):
    """The distance of a task to itself is 0, less alpha times its complexity. Symmetric distances are not negative."""
    a, b = _task(seed), _task(seed + 1)
    if metric == "asymmetric":
        assert distance(a, a, metric) == pytest.approx(-0.15 * distance(a, trivial(a), normalize="none"), rel=1e-9)
        assert distance(a, b, metric, alpha=0) == pytest.approx(distance(a, b), rel=1e-12)
    else:
        assert distance(a, a, metric) == pytest.approx(0, abs=1e-12)
        assert distance(a, b, metric) == pytest.approx(distance(b, a, metric), rel=1e-12)
        assert distance(a, b, metric) > 0


def test_a_factor_on_one_task_can_decide_an_order():
    """A factor of 7 on one task makes the less similar task look nearer, unless all are normalised."""
    target, near, far = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.5]), torch.tensor([1.0, 3.0])
    # The shares of the target are 3/4 and 1/4, then 3/(3 + 7) and 1/(1 + 21).
    wanted = _cosine_distance([3 / 10, 1 / 22], [7 / 10, 21 / 22])
    assert distance(target, far, normalize="none") == pytest.approx(0.4, abs=1e-12)
    assert distance(target, 7 * far, normalize="none") == pytest.approx(wanted, abs=1e-12)
    assert wanted < 0.3 < distance(target, near, normalize="none") < 0.4
    for normalize in ("mean", "l2"):
        assert distance(target, near, normalize=normalize) < distance(target, 7 * far, normalize=normalize)


def test_an_absolute_epsilon_would_make_it_the_plain_cosine():
    """Distances at F around 1e-14 equal those at F around 1. An added 1e-8 would give the distance of F itself."""
    a, b = _task(0), _task(1)
    small = [{name: 1e-14 * part for name, part in task.items()} for task in (a, b)]
    wanted = distance(a, b, normalize="none")
    assert distance(*small, normalize="none") == pytest.approx(wanted, rel=1e-9)
    one, other = (torch.cat(list(task.values())) for task in small)
    floored = distances.unit_distance(one / (one + other + 1e-8), other / (one + other + 1e-8))
    assert floored == pytest.approx(distance(a, b, "plain_cosine"), rel=1e-4)
    assert abs(floored - wanted) > 0.01


def test_the_trivial_task_is_flat_in_each_tensor():
    """The trivial task has the mean of each tensor, so a task that is flat within each tensor has complexity 0."""
    task = {"a": torch.tensor([1.0, 3.0, 5.0]), "b": torch.tensor([10.0, 30.0])}
    flat = trivial(task)
    assert {name: part.tolist() for name, part in flat.items()} == {"a": [3.0, 3.0, 3.0], "b": [20.0, 20.0]}
    assert distance(flat, task, "asymmetric", alpha=0.5) == distance(flat, task)
    assert distance(task, flat, "asymmetric", alpha=1.0) == pytest.approx(0, abs=1e-12)


def test_matrix():
    """Rows are sources, columns are targets, and the order of names is kept. Each entry is the distance of the pair."""
    tasks = {name: _task(seed) for seed, name in enumerate("abc")}
    for metric in METRICS:
        matrix = distance_matrix(tasks, metric)
        assert matrix.dtype == torch.float64
        for i, one in enumerate("abc"):
            for j, other in enumerate("abc"):
                if i != j or metric == "asymmetric":
                    assert matrix[i, j].item() == pytest.approx(distance(tasks[one], tasks[other], metric), rel=1e-12)
                else:
                    assert matrix[i, j] == 0
    directed = distance_matrix(tasks, "asymmetric")
    assert not torch.allclose(directed, directed.T, rtol=1e-3)


def test_order_of_tensors_does_not_matter():
    """Tensors are matched by name."""
    a, b = _task(0), _task(1)
    assert distance(a, dict(reversed(b.items()))) == distance(a, b)


def _embedding(tensors=None, **info):
    return Embedding(tensors or {"w": torch.tensor([1.0, 2.0])}, EmbeddingInfo(name="x", **info))


@pytest.mark.parametrize(
    ("tasks", "options", "error", "words"),
    [
        ({"x": _task(0)}, {}, ConfigError, "at least two tasks, found 1"),
        ({"x": _task(0), "y": {"conv.weight": torch.ones(7)}}, {}, MismatchError, "x has fc.weight and y lacks it"),
        (
            {"x": _task(0), "y": _task(1) | {"fc2.weight": torch.ones(3)}},
            {},
            MismatchError,
            "y has fc2.weight and x lacks it",
        ),
        (
            {"x": _task(0), "y": _task(1) | {"fc.weight": torch.ones(11)}},
            {},
            MismatchError,
            "fc.weight has 13 values in x and 11 in y",
        ),
        ({"x": torch.ones(3), "y": torch.tensor([1.0, float("nan"), 2.0])}, {}, ValuesError, "1 NaN"),
        ({"x": torch.ones(3), "y": torch.tensor([1.0, -1.0, 2.0])}, {}, ValuesError, "1 negative"),
        ({"x": torch.ones(3), "y": torch.zeros(3)}, {}, ValuesError, "y has 3 values and none is"),
        ({"x": {}, "y": {}}, {}, ValuesError, "x has 0 values"),
        ({"x": torch.ones(3), "y": torch.ones(3)}, {"metric": "cosin"}, ConfigError, "found 'cosin'"),
        ({"x": torch.ones(3), "y": torch.ones(3)}, {"normalize": "max"}, ConfigError, "none, mean, l2, found 'max'"),
        ({"x": torch.ones(3), "y": torch.ones(3)}, {"alpha": -0.1}, ConfigError, "found -0.1"),
        ({"x": torch.ones(3), "y": torch.ones(3)}, {"alpha": float("nan")}, ConfigError, "found nan"),
        ({"x": torch.ones(1), "y": torch.ones(1)}, {"metric": "asymmetric"}, ConfigError, "embed per row"),
        ({"x": _embedding(), "y": _embedding(per="entry")}, {}, MismatchError, "x has row and y entry"),
        ({"x": _embedding(), "y": _embedding(scaling="raw")}, {}, MismatchError, "one --scaling"),
    ],
)
def test_refusals(tasks, options, error, words):
    """A mismatch is refused with the first tensor that differs, the task and the value."""
    with pytest.raises(error) as caught:
        distance_matrix(tasks, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [2, 3, 7, 11])
def test_clusters_are_average_linkage(count):
    """The tree is average linkage, and the order keeps every cluster together."""
    generator = torch.Generator().manual_seed(count)
    matrix = torch.rand(count, count, generator=generator, dtype=torch.float64)
    order, tree = clustered(matrix)
    mean = ((matrix + matrix.T) / 2).fill_diagonal_(0)
    wanted = hierarchy.linkage(squareform(mean.numpy()), "average")
    assert tree[:, 2].tolist() == pytest.approx(wanted[:, 2].tolist())
    members = {number: [number] for number in range(count)}
    for number, (left, right, _, _) in enumerate(wanted):
        members[count + number] = members[int(left)] + members[int(right)]
    places = {leaf: place for place, leaf in enumerate(order)}
    for cluster in members.values():
        held = sorted(places[leaf] for leaf in cluster)
        assert held == list(range(held[0], held[0] + len(cluster)))


def test_clusters_of_negative_distances():
    """A shift of all distances does not change the order, so negative distances are ordered too."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.rand(7, 7, generator=generator, dtype=torch.float64)
    order, tree = clustered(matrix - 2)
    assert order == clustered(matrix)[0]
    assert (tree[:, 2] >= 0).all()


def test_the_old_name_of_the_l2_norm_works_for_one_version():
    """``norm`` gives the distance of ``l2``, with a warning."""
    a, b = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 3.0])
    with pytest.warns(DeprecationWarning, match="use 'l2'"):
        assert distance(a, 7 * b, normalize="norm") == distance(a, 7 * b, normalize="l2")


@pytest.mark.parametrize("metric", METRICS)
def test_another_default_device_changes_no_distance(metric):
    """A program may have called ``torch.set_default_device``."""
    tasks = {"a": _task(1), "b": _task(2)}
    wanted = distance_matrix(tasks, metric)
    with torch.device("meta"):
        found = distance_matrix(tasks, metric)
    assert torch.equal(found, wanted)
