"""Linear layers, embedding tables and tied weights against float64 loops over examples."""

import pytest
import torch
from torch import nn

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.estimators.per_example import linear_embedding
from squisher_mergekit.estimators.per_example.tape import Call


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("large", [1 << 30, 1])
def test_a_matrix_is_the_sum_of_squared_products(tokens, large, monkeypatch):
    """The accumulator adds sum_n (B_n^T A_n)^2, for one matrix or several at a time."""
    monkeypatch.setattr(linear_embedding, "_LARGE", {"cpu": large, "cuda": 0})
    monkeypatch.setattr(linear_embedding, "CHUNK", {"cpu": 3 * 7 * 11, "cuda": 0})
    torch.manual_seed(0)
    b, a = torch.randn(7, tokens, 11).double(), torch.randn(7, tokens, 7).double()
    total = torch.ones(11, 7).double()
    linear_embedding.matrix_squares(total, b, a)
    expected = 1 + sum((b[n].T @ a[n]).square() for n in range(7))
    torch.testing.assert_close(total, expected)


def test_equal_tokens_are_added_before_they_are_squared():
    """Three lookups of one row by an example add up to one gradient, which is then squared."""
    torch.manual_seed(0)
    ids, b = torch.tensor([[2, 2, 0, 2, 4], [4, 0, 0, 1, 2]]), torch.randn(2, 5, 3).double()
    total, expected = torch.zeros(5, 3).double(), torch.zeros(5, 3).double()
    linear_embedding.row_squares(total, ids, b)
    for n in range(2):
        expected += torch.zeros(5, 3).double().index_add_(0, ids[n], b[n]).square()
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("padding", [None, 2])
def test_a_tied_table_adds_both_uses_before_squaring(padding):
    """The squared gradient of a tied table is (e + h)^2.

    The part e has the rows of the example's tokens, and h all rows.
    """
    torch.manual_seed(0)
    table, head = nn.Embedding(5, 3, padding_idx=padding), nn.Linear(3, 5, bias=False)
    ids = torch.tensor([[2, 2, 0], [4, 1, 1]])
    at_rows, at_head, a = torch.randn(2, 3, 3).double(), torch.randn(2, 3, 5).double(), torch.randn(2, 3, 3).double()
    uses = [
        ("weight", Call(table, (ids,), {}, torch.float64, at_rows)),
        ("weight", Call(head, (a,), {}, torch.float64, at_head)),
    ]
    total, expected = torch.zeros(5, 3).double(), torch.zeros(5, 3).double()
    linear_embedding.add_tied(total, uses, 2)
    for n in range(2):
        live = at_rows[n] * (ids[n] != padding)[:, None] if padding is not None else at_rows[n]
        e = torch.zeros(5, 3).double().index_add_(0, ids[n], live)
        expected += (e + at_head[n].T @ a[n]).square()
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_tables_that_depend_on_the_whole_batch_are_refused(options):
    """Tables with max_norm or scale_grad_by_freq depend on other examples and raise an error."""
    call = Call(nn.Embedding(5, 3, **options), (torch.zeros(2, 3, dtype=torch.int64),), {}, torch.float32)
    with pytest.raises(UnsupportedStateError, match="set neither"):
        linear_embedding.lookups(call, 2)


@pytest.mark.parametrize("module", [nn.Linear(3, 2), nn.Embedding(5, 2)], ids=["matrix", "rows"])
def test_inputs_are_taken_on_the_device_of_the_gradient(module):
    """A hook sees the inputs before ``accelerate`` moves them to the layer, here from the CPU."""
    given = torch.ones(5, 1, dtype=torch.int64) if isinstance(module, nn.Embedding) else torch.ones(5, 1, 3)
    call = Call(module, (given,), {}, torch.float32, torch.empty(5, 1, 2, device="meta"))
    take = linear_embedding.lookups if isinstance(module, nn.Embedding) else linear_embedding.factors
    assert [tensor.device.type for tensor in take(call, 5)] == ["meta", "meta"]
