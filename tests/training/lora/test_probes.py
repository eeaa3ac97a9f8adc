"""Probes of wrapped layers: shared and unused layers, outputs that change in place, graphs that are kept."""

import peft
import pytest
import torch
from torch import nn

from squisher_mergekit.training import LoraRecorder
from tests.training.lora.reference import Reference

BETA = 0.75


class Net(nn.Module):
    """Network that uses its layers in one of several ways."""

    def __init__(self, use):
        super().__init__()
        self.use = use
        self.first, self.second, self.third = nn.Linear(5, 5), nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x):
        hidden = self.first(x)
        if self.use == "shared":
            hidden = self.first(torch.tanh(hidden)) + self.first(hidden)
        if self.use == "in place":
            hidden += 1
            hidden.relu_()
        hidden = torch.tanh(hidden)
        out = self.second(hidden)
        return out.sum(1, keepdim=True).expand_as(out) if self.use == "expanded" else out


def _made(use):
    torch.manual_seed(2)
    model = peft.get_peft_model(Net(use), peft.LoraConfig(r=2, target_modules=["first", "second", "third"]))
    recorder = LoraRecorder(model, BETA)
    return model, recorder, Reference(recorder)


def _losses(model, steps):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, target = torch.randn(3, 2, 5, generator=generator), torch.randn(3, 2, 4, generator=generator)
        model.zero_grad()
        yield (model(x) - target).square().sum()


def _reference(reference):
    """Add the gradients of the layers that were used."""
    unused = {name: weight for name, weight in reference.weights.items() if weight.grad is None}
    assert set(unused) == {"third.weight"}
    for name in unused:
        reference.weights[name].grad = torch.zeros_like(reference.weights[name])
    reference.add()
    for side in (reference.rows, reference.columns):
        side.pop("third.weight")


@pytest.mark.parametrize("use", ["plain", "shared", "in place", "expanded"])
def test_a_layer_counts_each_of_its_calls(use):
    """The sum over the calls is squared; a layer that was never called has no Fisher."""
    model, recorder, reference = _made(use)
    for loss in _losses(model, 3):
        loss.backward()
        _reference(reference)
        assert recorder.update()
    fisher = recorder.fisher()
    reference.check(fisher, 1e-4)
    assert fisher.config.coverage.without == {"third.weight": "no gradient was recorded"}


def test_a_graph_that_is_kept_counts_twice():
    """Two backward passes through one graph add, as their gradients do."""
    model, recorder, reference = _made("plain")
    for loss in _losses(model, 2):
        loss.backward(retain_graph=True)
        loss.backward()
        _reference(reference)
        recorder.update()
    reference.check(recorder.fisher(), 1e-4)


def test_a_model_in_float64_has_averages_in_float64():
    """The squares of small gradients keep their digits."""
    model = peft.get_peft_model(Net("plain").double(), peft.LoraConfig(r=2, target_modules=["first"]))
    model.double()
    recorder = LoraRecorder(model, BETA)
    reference = Reference(recorder)
    (1e-30 * model(torch.randn(3, 5).double()).sum()).backward()
    reference.add()
    recorder.update()
    expected = torch.tensor(reference.rows["first.weight"], dtype=torch.float64)
    assert torch.allclose(recorder.state_dict()["averages"]["first.weight.rows"], expected, rtol=1e-12, atol=0)
