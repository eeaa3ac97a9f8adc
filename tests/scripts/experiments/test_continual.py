"""Contexts, scenarios and reported numbers, compared with values computed by hand."""

import pytest
import torch

from scripts.experiments import continual
from squisher_mergekit.errors import ConfigError

CONTEXTS = [(3, 0), (4, 1), (2, 5)]
# Accuracy after each context (rows) on each context (columns).
MATRIX = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.8, 0.3], [0.7, 0.6, 1.0]], dtype=torch.float64)


def test_the_seed_divides_the_classes():
    """Every class is in one context, and contexts have equal sizes. The seed determines the draw."""
    found = [continual.split_classes(10, 5, seed) for seed in range(20)]
    for contexts in found:
        assert [len(classes) for classes in contexts] == [2] * 5
        assert sorted(label for classes in contexts for label in classes) == list(range(10))
    assert found[3] == continual.split_classes(10, 5, 3)
    assert len({tuple(contexts) for contexts in found}) == 20


def test_rows_are_those_of_the_classes():
    """The rows are the indices of all examples of the classes, in order."""
    assert continual.rows_of(torch.tensor([4, 0, 1, 4, 2]), [4, 1]).tolist() == [0, 2, 3]


def test_permutations_differ_and_have_all_features():
    """Each permutation has all features, and no two are equal."""
    orders = continual.permutations(31, 3, seed=5)
    assert all(order.sort().values.tolist() == list(range(31)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3


@pytest.mark.parametrize(
    ("scenario", "outputs", "expected"),
    [("task", 6, [1, 4]), ("domain", 2, [0, 1]), ("class", 6, [0, 1, 3, 4])],
)
def test_the_outputs_that_compete(scenario, outputs, expected):
    """The second of three contexts competes with its own classes, the shared outputs, or all classes seen so far."""
    mask = continual.active(outputs, CONTEXTS, 1, scenario)
    assert mask.nonzero().squeeze(1).tolist() == expected


def test_classes_seen_later_compete_too():
    """In the class scenario, an early context is tested among all classes trained so far."""
    mask = continual.active(7, CONTEXTS, 0, "class", seen=2)
    assert mask.tolist() == [True] * 6 + [False]
    assert continual.active(7, CONTEXTS, 0, "task", seen=2).nonzero().squeeze(1).tolist() == [0, 3]


@pytest.mark.parametrize(("scenario", "expected"), [("task", [5, 2, 5]), ("domain", [1, 0, 1]), ("class", [5, 2, 5])])
def test_the_right_outputs(scenario, expected):
    """A label is the class, or its index within the context."""
    assert continual.targets(torch.tensor([5, 2, 5]), CONTEXTS, 2, scenario).tolist() == expected


def test_a_masked_output_has_no_gradient():
    """The loss includes the competing outputs alone, and the other outputs have no gradient."""
    logits = torch.tensor([[1.0, 5.0, 2.0], [3.0, 9.0, 0.0]], dtype=torch.float64, requires_grad=True)
    right, mask = torch.tensor([2, 2]), torch.tensor([True, False, True])
    assert continual.accuracy(logits, right, mask) == 0.5
    assert continual.accuracy(logits, right) == 0.0
    loss = torch.nn.functional.cross_entropy(continual.masked(logits, mask), right)
    loss.backward()
    two = torch.nn.functional.cross_entropy(logits.detach()[:, [0, 2]], torch.tensor([1, 1]))
    torch.testing.assert_close(loss.detach(), two)
    assert logits.grad[:, 1].tolist() == [0.0, 0.0]
    assert (logits.grad[:, [0, 2]] != 0).all()


def test_the_reported_numbers():
    """The numbers are means over the seen contexts. Entries above the diagonal do not count."""
    assert continual.average_so_far(MATRIX).tolist() == pytest.approx([0.9, 0.65, 2.3 / 3])
    assert continual.backward_transfer(MATRIX) == pytest.approx(-0.2)
    assert continual.forgetting(MATRIX) == pytest.approx(0.2)
    nan = MATRIX.masked_fill(torch.ones(3, 3).triu(1).bool(), float("nan"))
    assert continual.average_so_far(nan).tolist() == continual.average_so_far(MATRIX).tolist()
    assert continual.forgetting(nan) == continual.forgetting(MATRIX)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: continual.split_classes(10, 3, 0), "found 10 classes and 3 contexts"),
        (lambda: continual.active(5, CONTEXTS, 2, "task"), "at least 6.*found 5"),
        (lambda: continual.active(9, CONTEXTS, 2, "tasks"), "found 'tasks'"),
        (lambda: continual.targets(torch.tensor([5, 4]), CONTEXTS, 2, "domain"), r"\[2, 5\] of context 2"),
        (lambda: continual.backward_transfer(MATRIX[:1, :1]), "found 1"),
        (lambda: continual.forgetting(MATRIX[:1, :1]), "found 1"),
    ],
)
def test_a_mismatch_is_refused(call, message):
    """A mismatch is refused in one line with the wrong value."""
    with pytest.raises(ConfigError, match=message):
        call()
