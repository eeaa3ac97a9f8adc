"""``scripts.benchmarks.fisher``: a run on the small net, the reference of its errors, and its tables."""

import json
import math

import pytest
import torch
from torch import nn

from scripts.benchmarks.fisher_memory import memory_table, peak_of
from scripts.benchmarks.fisher_methods import ALL, METHODS, Comparison, Method, compare, kinds_of, offered, truth
from scripts.benchmarks.fisher_models import llama
from scripts.benchmarks.fisher_time import Entry, Row, slower_chunks, table
from tests.scripts.commands import run

ROW = {
    "kind": "empirical",
    "method": "ours",
    "ratio": 1.2,
    "error": 3e-7,
    "found": "error 3.0e-07",
    "problem": "",
    "checking": (),
}
REPORT = {"model": "mlp", "device": "cpu", "parameters": 10**6, "examples": 7, "plain_ms": 3.0, "rounds": 1}


def _classifier():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), (torch.randn(11, 5), torch.randint(3, (11,)))


def _language_model():
    torch.manual_seed(3)
    model, batch = llama(layers=1, hidden=64, vocab=61, tied=True)
    return model.eval(), {key: part[:3, :13] for key, part in batch.items()}


# ---- the reference, and the methods of this script


def test_exact_truth_is_the_sum_over_classes():
    """The reference of a linear layer is sum_n sum_c p_nc (p_n - e_c)^2 x_n^2."""
    torch.manual_seed(5)
    model, x = nn.Linear(5, 3), torch.randn(7, 5)
    p = (x.double() @ model.weight.detach().double().T + model.bias.detach().double()).softmax(-1)
    gradients = p[:, None] - torch.eye(3, dtype=torch.float64)  # axes: example, class, logit
    squares = torch.einsum("nc,ncl->nl", p, gradients.square())
    found = truth(model, (x, torch.zeros(7, dtype=torch.int64)), "exact")
    torch.testing.assert_close(found["weight"], squares.T @ x.double().square())
    torch.testing.assert_close(found["bias"], squares.sum(0))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap over attention warns
@pytest.mark.parametrize("make", [_classifier, _language_model])
def test_all_methods_agree_with_the_truth(make):
    """Every method agrees with the reference to 1e-5 for each of its kinds, also in chunks.

    Sampled uses the drawn labels.
    """
    model, batch = make()
    for kind in kinds_of(batch):
        expected = truth(model, batch, kind)
        for method in METHODS:
            if kind in method.kinds:
                found = method.prepare(model, batch, kind, method.chunk)()
                comparison = compare(found, expected)
                assert comparison.error < 1e-5, (kind, method, str(comparison))
                assert not comparison.missing


def test_sampled_labels_differ_from_the_true_ones():
    """The reference of sampled labels differs from that of the true labels."""
    model, batch = _classifier()
    assert compare(truth(model, batch, "empirical"), truth(model, batch, "sampled")).wrong == 4


# ---- errors


def test_an_error_is_a_share_of_its_tensors_largest_entry():
    """The error is that of the worst tensor, even if its entries are small."""
    expected = {"large": torch.tensor([1e6, 3.0]), "small": torch.tensor([2e-3, 1e-3])}
    found = {"large": expected["large"] + 1.0, "small": expected["small"] + 1e-3}
    comparison = compare(found, {name: tensor.double() for name, tensor in expected.items()})
    assert comparison.error == pytest.approx(0.5, rel=1e-3)
    assert (comparison.wrong, comparison.missing, comparison.count) == (1, 0, 2)


def test_a_vanishing_gradient_has_an_error_relative_to_the_model():
    """An error in a tensor that is 0 in the reference is relative to 1e-12 of the model's largest entry."""
    expected = {"weight": torch.ones(2).double(), "bias": torch.zeros(2).double()}
    found = {"weight": torch.ones(2), "bias": torch.full((2,), 1e-17)}
    assert compare(found, expected).error == pytest.approx(1e-5)


@pytest.mark.parametrize("bad", [torch.full((2,), math.nan), torch.ones(3), torch.full((2,), math.inf)])
def test_nan_and_another_shape_are_wrong(bad):
    """NaN, infinity and another shape are infinite errors."""
    comparison = compare({"weight": bad}, {"weight": torch.ones(2).double()})
    assert comparison == Comparison(math.inf, wrong=1, missing=0, count=1)


def test_a_comparison_counts_wrong_and_missing_tensors():
    """Missing parameters are counted and not taken for right ones."""
    expected = {name: torch.ones(2).double() for name in "abc"}
    assert str(compare({"a": torch.ones(2)}, expected)) == "error 0.0e+00, missing 2 of 3"
    assert str(compare({"a": torch.zeros(2)}, expected)) == "wrong: 1 of 3, error 1.0e+00, missing 2 of 3"
    assert str(compare({}, expected)) == "error inf, missing 3 of 3"


# ---- chunks


def test_one_chunk_that_holds_the_batch_is_offered():
    """Chunks larger than the smallest one that holds the batch are not offered."""
    methods = [Method("a", ALL, None, chunk) for chunk in (4, 16, 64)] + [Method("b", ("exact",), None)]
    assert [(method.name, method.chunk) for method in offered(methods, "empirical", 11)] == [("a", 4), ("a", 16)]
    assert [(method.name, method.chunk) for method in offered(methods, "exact", 4)] == [("a", 4), ("b", 0)]
    assert methods[1].title(11) == "a, chunks of 11"


def test_the_fastest_chunk_is_kept():
    """The fastest chunk of each method and kind stays."""
    times = {("a", 4): 3.0, ("a", 16): 1.0, ("a", 64): 2.0, ("b", 4): 5.0}
    entries = [Entry(Method(name, ALL, None, n), Row("exact", name), None, [t]) for (name, n), t in times.items()]
    assert [(entry.method.name, entry.method.chunk) for entry in slower_chunks(entries)] == [("a", 4), ("a", 64)]


# ---- tables


def test_the_table_has_a_verdict_on_each_goal():
    """Only our own rows have goals. A problem replaces the number."""
    rows = [ROW, ROW | {"ratio": 1.21}, ROW | {"method": "other"}, ROW | {"problem": "cannot"}]
    lines = table(REPORT | {"rows": rows})[2:]
    assert lines[0].endswith("1.20  error 3.0e-07; goal 1.2: met")
    assert lines[1].endswith("1.21  error 3.0e-07; goal 1.2: missed")
    assert lines[2].endswith("1.20  error 3.0e-07")
    assert lines[3].endswith("-  cannot")
    assert table(REPORT | {"rows": [ROW | {"checking": [3, 1.5]}]})[2].endswith("met; first calls 3.00, 1.50")


def test_a_model_without_goals_has_a_table():
    """The table of a model without goals has the ratio alone."""
    assert table(REPORT | {"model": "llama", "rows": [ROW]})[2].endswith("1.20  error 3.0e-07")


def test_the_memory_table_has_a_verdict_on_the_goal():
    """The larger of both numbers is compared with the goal, which only our own rows have."""
    sizes = {"first": 20 * 10**6, "later": 10**7, "bytes": 20 * 10**6}
    rows = [{"kind": "", "method": "plain", **sizes}, {"kind": "exact", "method": "ours", **sizes}]
    report = {"model": "mlp", "device": "cpu", "copy": 6 * 10**6, "goal": 20 * 10**6, "rows": rows}
    plain, ours = memory_table(report)[2:]
    assert plain.endswith("20      10")
    assert ours.endswith("20      10  goal 20: met")
    assert memory_table(report | {"goal": 20 * 10**6 - 1})[3].endswith("missed")


# ---- a real run


@pytest.mark.slow
def test_the_small_net_is_measured(tmp_path):
    """Every method without another package runs, and agrees with single examples in float64 to 1e-5."""
    report = tmp_path / "report.json"
    done = run("benchmarks.fisher", "--models", "mlp", "--repeat", "1", "--json", report)
    assert done.returncode == 0, done.stderr[-2000:]
    [found] = json.loads(report.read_text())["measured"]
    rows = {(row["kind"], row["method"].partition(",")[0]): row for row in found["rows"]}
    for key in [
        *((kind, "ours") for kind in ALL),
        ("empirical", "loop of single examples"),
        ("empirical", "vmap(grad)"),
    ]:
        assert rows[key]["error"] < 1e-5, rows[key]
        assert rows[key]["ratio"] > 0
        assert len(rows[key]["checking"]) == (2 if key[1] == "ours" else 0)
    assert "goal 1.2" in done.stdout


@pytest.mark.slow
def test_the_peak_of_memory_is_that_of_the_method():
    """A plain pass adds its gradients to the peak, and vmap those of 64 examples.

    A failed measurement has its reason.
    """
    copy = 4 * (784 * 400 + 400 + 400 * 400 + 400 + 400 * 10 + 10)
    assert peak_of("mlp", "", "plain", 0, "cpu")["bytes"] > copy
    assert peak_of("mlp", "empirical", "vmap(grad)", 64, "cpu")["bytes"] > 64 * copy
    assert "mlq" in peak_of("mlq", "", "plain", 0, "cpu")["problem"]
