"""Verification before and during an estimate."""

import logging

import pytest
import torch
from torch import nn

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.estimators.accumulator import FisherAccumulator
from squisher_mergekit.estimators.estimate import estimate_fisher
from squisher_mergekit.estimators.per_example.verify import TapedModel, mixing_parameters, verify
from tests.estimators import oracle
from tests.estimators.models import assert_close, batch_of, make


class _Experts(nn.Module):
    """Network that routes each token to one of several layers by its data."""

    def __init__(self, experts=3):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(experts))
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        flat = x.reshape(-1, 5)
        way = (flat[:, 0] * 2).round().long() % len(self.experts)
        found = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (way == number).nonzero()[:, 0]
            if len(rows):
                found = found.index_add(0, rows, expert(flat[rows]))
        return self.out(found.reshape(x.shape).tanh().sum(1))


def _routed(size, ways):
    """Return a batch whose tokens go to the given experts."""
    x = torch.randn(size, len(ways), 5, generator=torch.Generator().manual_seed(size))
    x[..., 0] = torch.tensor(ways) / 2
    return x, torch.arange(size) % 3


def test_experts_that_are_given_parts_of_the_examples_are_run_whole():
    """Experts that get tokens of several examples in one call are differentiated by their parent."""
    torch.manual_seed(0)
    model = _Experts()
    batches = [(torch.randn(n, 4, 5), torch.arange(n) % 3) for n in (5, 3, 4)]
    fisher = estimate_fisher(model, batches, statistic="sum", task="classification")
    assert_close(fisher, oracle.fisher(model, batches, oracle.classes("true"), "example"))


def test_parameters_of_later_batches_are_verified_then():
    """An expert that only tokens of the third batch choose has the right gradient."""
    torch.manual_seed(0)
    model = _Experts(4)
    last = _routed(4, [0, 1, 0, 3])
    last[0][1:3, 3, 0] = 1.0
    batches = [_routed(4, [0, 1, 0]), _routed(3, [1, 0, 1]), last]
    fisher = estimate_fisher(model, batches, statistic="sum", task="classification")
    assert float(fisher["experts.2.weight"].max()) > 0
    assert_close(fisher, oracle.fisher(model, batches, oracle.classes("true"), "example"))


def test_other_parts_in_later_batches_raise_an_error():
    """Rows that look like examples in the first batch but not in the second raise an error there."""
    torch.manual_seed(0)
    model = _Experts(2)
    accumulator = FisherAccumulator(model, task="classification")
    accumulator.add(_routed(4, [0, 1, 0]))
    shifted = _routed(4, [0, 1, 0])
    shifted[0][0, :, 0], shifted[0][1, :, 0] = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.0, 0.0])
    shifted[0][2, :, 0] = torch.tensor([0.5, 0.0, 0.0])
    with pytest.raises(UnsupportedStateError, match="must have a gradient for each example, but in batch 2"):
        accumulator.add(shifted)


def test_a_layer_along_the_wrong_axis_is_found():
    """A layer along the wrong axis is found, because its gradient is not 0 for a masked example."""

    class _Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(self.a(x.transpose(0, 1)).transpose(0, 1).tanh().sum(1))

    model = _Turned()
    names = {p: name for name, p in model.named_parameters()}
    taped_model, batch = TapedModel(model, "classification", None), (torch.randn(4, 4, 5), torch.arange(4) % 3)
    with taped_model.run(batch, {}, ()) as (tape, outputs):
        assert {names[p] for p in mixing_parameters(tape, outputs, names, retain_graph=False)} == {"a.weight", "a.bias"}


def test_only_values_shared_by_all_examples_are_broadcast():
    """BERT broadcasts its position table. A model that rejects an expanded output broadcasts nothing."""
    found = verify(TapedModel(make("bert").eval(), "classification", None), batch_of("classification"))
    assert [module.num_embeddings for module in found.broadcast_modules] == [17]
    assert not found.owner_of

    class _Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.out = nn.Parameter(torch.randn(1, 5)), nn.Linear(5, 3)

        def forward(self, x):
            return self.out(x * self.out(self.query).sum())

    torch.manual_seed(0)
    model, batch = _Single(), (torch.randn(4, 5), torch.arange(4) % 3)
    fisher = estimate_fisher(model, [batch], statistic="sum", task="classification")
    assert_close(fisher, oracle.fisher(model, [batch], oracle.classes("true"), "example"))


def test_a_slow_fallback_is_logged(caplog):
    """A warning names the parameters that need one run of the whole model per example."""

    class _Across(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(self.a(x.T[None].transpose(1, 2)[0]).tanh()) + self.b.weight.sum()

    model, batch = _Across(), (torch.randn(4, 5), torch.arange(4) % 3)
    with caplog.at_level(logging.WARNING):
        fisher = estimate_fisher(model, [batch], statistic="sum", task="classification")
    assert "as slow as a loop" in caplog.text
    assert_close(fisher, oracle.fisher(model, [batch], oracle.classes("true"), "example"))


def test_running_out_of_memory_raises_its_own_error(monkeypatch):
    """Running out of memory raises its own error, and every parameter keeps its owner."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    batch = (torch.randn(4, 5), torch.arange(4) % 3)
    for place in ("accumulate.add_squares", "tape.torch.autograd.grad"):
        with monkeypatch.context() as patch:
            patch.setattr(f"squisher_mergekit.estimators.per_example.{place}", full)
            with pytest.raises(torch.OutOfMemoryError):
                estimate_fisher(nn.Linear(5, 3), [batch])
