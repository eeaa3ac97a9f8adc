"""Orders of sources and their quality, against all permutations."""

import json
import math
from itertools import pairwise, permutations

import pytest
import torch

from squisher_mergekit.applications.task2vec import ranking
from squisher_mergekit.applications.task2vec.distances import distance
from squisher_mergekit.errors import ConfigError, CorruptFileError, MismatchError, NotFoundError


def _plain(order, scores):
    """Return reciprocal rank, NDCG and position of the best source, for an order without ties."""
    best = max(scores.values())
    place = next(place for place, source in enumerate(order, 1) if scores[source] == best)
    low = min(scores.values())
    gains = [scores[source] - low for source in order]
    ideal = sorted(gains, reverse=True)
    found, most = (sum(g / math.log2(p + 1) for p, g in enumerate(each, 1)) for each in (gains, ideal))
    return 1 / place, found / most if most else 1.0, place


def _expected(keys, scores):
    """Return the mean of these measures over all orders with descending keys."""
    orders = [o for o in permutations(keys) if all(keys[a] <= keys[b] for a, b in pairwise(o))]
    rows = [_plain(order, scores) for order in orders]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(
    ("keys", "scores"),
    [
        ((1, 2, 3, 4, 5), (0.3, 0.9, 0.5, 0.1, 0.2)),
        ((5, 4, 3, 2, 1), (0.3, 0.9, 0.5, 0.1, 0.2)),
        ((1, 1, 1, 1, 1), (0.3, 0.9, 0.5, 0.1, 0.2)),
        ((1, 1, 1, 1, 1), (0.9, 0.9, 0.5, 0.9, 0.2)),
        ((1, 2, 2, 2, 3), (0.1, 0.9, 0.9, 0.5, 0.9)),
        ((2, 2, 1, 1, 3), (70, 80, 60, 50, 80)),
        ((1, 2, 3, 4, 5), (-0.3, -0.9, -0.5, -0.1, -0.2)),
        ((1, 2, 2, 4, 5), (0.5, 0.5, 0.5, 0.5, 0.5)),
    ],
)
def test_measures_are_expectations_over_ties(keys, scores):
    """The measures are those of the order without ties, and means over all orders of tied sources."""
    keys, scores = (dict(zip("abcde", values, strict=True)) for values in (keys, scores))
    found = ranking.quality(keys, scores)
    wanted = _expected(keys, scores)
    assert [found.reciprocal_rank, found.ndcg, found.best_rank] == pytest.approx(wanted, rel=1e-12)


def test_ndcg_by_hand():
    """Gains 0, 0.4, 0.2 at positions 1, 2, 3 give the NDCG by hand. A shift or factor of the scores changes nothing."""
    keys = {"a": 1, "b": 2, "c": 3}
    wanted = (0.4 / math.log2(3) + 0.2 / 2) / (0.4 + 0.2 / math.log2(3))
    for scores in ((0.5, 0.9, 0.7), (50, 90, 70), (-0.5, -0.1, -0.3)):
        assert ranking.ndcg(keys, dict(zip("abc", scores, strict=True))) == pytest.approx(wanted, rel=1e-12)


def test_mrr_is_the_mean_over_targets():
    """The positions 1 and 4 give an MRR of 0.625."""
    keys = {"t": {"a": 1, "b": 2, "c": 3, "d": 4}, "u": {"a": 1, "b": 2, "c": 3, "d": 4}}
    scores = {"t": {"a": 9, "b": 1, "c": 1, "d": 1}, "u": {"a": 1, "b": 1, "c": 1, "d": 9}}
    assert ranking.mrr(keys, scores) == 0.625


def test_assess():
    """The results are means over the targets.

    The order by size starts with the largest; the random order has the harmonic mean.
    """
    distances = {"t": {"a": 0.1, "b": 0.2, "c": 0.3}, "u": {"a": 0.3, "b": 0.2, "c": 0.1}}
    transfer = {"t": {"a": 1.0, "b": 0.0, "c": 0.0}, "u": {"a": 0.0, "b": 1.0, "c": 0.0}}
    found = ranking.assess(distances, transfer, {"a": 5, "b": 50, "c": 500, "t": 1, "u": 1})
    assert {order: rows["mean"].reciprocal_rank for order, rows in found.items()} == {
        "distance": pytest.approx((1 + 1 / 2) / 2),
        "size": pytest.approx((1 / 3 + 1 / 2) / 2),
        "random": pytest.approx((1 + 1 / 2 + 1 / 3) / 3),
    }
    assert found["size"]["t"].best_rank == 3
    assert list(ranking.assess(distances, transfer)) == ["distance", "random"]


def test_rank_orders_sources():
    """Sources are ordered by their distance to the target, the nearest first."""
    generator = torch.Generator().manual_seed(0)
    target, *others = ({"w": torch.rand(17, generator=generator)} for _ in range(6))
    sources = dict(zip("abcde", others, strict=True))
    for metric in ("cosine", "asymmetric"):
        found = ranking.rank(target, sources, metric)
        assert found == sorted(found, key=lambda pair: pair[1])
        assert dict(found) == {
            name: pytest.approx(distance(source, target, metric)) for name, source in sources.items()
        }


TABLE = [
    ("a", "b", 0.9),
    ("a", "c", 0.4),
    ("b", "a", 0.3),
    ("b", "c", 0.2),
    ("c", "a", 1),
    ("c", "b", 2),
    ("a", "a", 5),
]


def _csv(rows, head="target,source,score"):
    return "\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n"


def test_three_forms_of_the_table_are_one(tmp_path):
    """CSV, JSON rows and a JSON mapping give the same table. A task has no score from itself."""
    nested = {t: {s: score for u, s, score in TABLE if u == t} for t in "abc"}
    rows = [{"target": t, "source": s, "score": score} for t, s, score in TABLE]
    for name, text in (("x.csv", _csv(TABLE)), ("x.json", json.dumps(nested)), ("y.json", json.dumps(rows))):
        (tmp_path / name).write_text(text)
        assert ranking.read_transfer(tmp_path / name, list("abc"), ["a", "c"]) == {
            "a": {"b": 0.9, "c": 0.4},
            "c": {"a": 1, "b": 2},
        }


@pytest.mark.parametrize(
    ("name", "text", "error", "words"),
    [
        ("x.csv", _csv([*TABLE, ("a", "d", 1)]), MismatchError, "found 'd'"),
        ("x.csv", _csv([*TABLE, ("a", "b", 1)]), MismatchError, "two for a from b"),
        ("x.csv", _csv(TABLE[1:]), MismatchError, "a from b is missing"),
        ("x.csv", _csv(TABLE, "target,source,accuracy"), ConfigError, "finite score"),
        ("x.csv", _csv([("a", "b", "nan")]), ConfigError, "finite score"),
        ("x.csv", _csv([("", "b", "1")]), CorruptFileError, "a target in every row"),
        ("x.json", "{", CorruptFileError, "table in JSON"),
        ("x.json", "3", CorruptFileError, "found int"),
        ("x.json", "[3]", CorruptFileError, "list of rows"),
        ("x.json", '{"a": 3}', CorruptFileError, "like"),
    ],
)
def test_bad_tables_are_refused(tmp_path, name, text, error, words):
    """A table with unknown tasks, duplicates or gaps is refused, and so is a file that is no table."""
    (tmp_path / name).write_text(text)
    with pytest.raises(error) as caught:
        ranking.read_transfer(tmp_path / name, list("abc"), list("abc"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes(tmp_path):
    """Sizes come from CSV or JSON and must cover exactly the tasks."""
    for name, text in (("x.csv", _csv([("a", 5), ("b", 7)], "task,size")), ("x.json", '{"b": 7, "a": 5}')):
        (tmp_path / name).write_text(text)
        assert ranking.read_sizes(tmp_path / name, ["a", "b"]) == {"a": 5, "b": 7}
        for names, words in ((["a"], "names, beside those, b"), (["a", "b", "c"], "lacks c")):
            with pytest.raises(MismatchError, match=words):
                ranking.read_sizes(tmp_path / name, names)
    with pytest.raises(NotFoundError, match="nowhere"):
        ranking.read_sizes(tmp_path / "nowhere.csv", ["a"])
