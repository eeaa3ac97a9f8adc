"""Tiny networks, random Fishers of them, and a float64 reference of Eq. 14, for the tests of EWC."""

import copy

import torch
from torch import nn

from squisher_mergekit import Fisher, FisherConfig
from squisher_mergekit.tensors.safetensors import MemoryStore

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


def small_model(seed=0, dtype=torch.float32):
    """Return a network of two layers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5)).to(dtype)


def moved(model, seed):
    """Return a copy of a model with other weights."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return other


def random_fisher(model, seed):
    """Return a positive Fisher with zeros, spread over eight decades."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in model.named_parameters():
        decades = 8 * torch.rand(parameter.shape, generator=generator) - 6
        found[name] = 10**decades * (torch.rand(parameter.shape, generator=generator) > 0.2)
    return found


def eq14(model, tasks, lam):
    """Return lambda / 2 sum_t sum_i F_ti (theta_i - theta^_ti)^2 and its gradient, by autograd in float64."""
    theta = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    value = torch.zeros((), dtype=torch.float64)
    for anchor, fisher in tasks:
        for name, kept in anchor.named_parameters():
            if name in fisher:
                value = value + (fisher[name].double() * (theta[name] - kept.detach().double()) ** 2).sum()
    value = 0.5 * lam * value
    gradients = torch.autograd.grad(value, list(theta.values()), allow_unused=True)
    return value.detach(), dict(zip(theta, gradients, strict=True))


def gradients_of(model, penalty):
    """Return a mapping from names to gradients of the penalty alone."""
    model.zero_grad()
    penalty.add_gradient(model)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected, rtol=1e-5):
    """Compare gradients by name, relative to the largest entry of each tensor."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=rtol, atol=1e-6 * float(tensor.abs().max()))


def as_fisher(tensors, **config):
    """Return a Fisher in memory with some metadata."""
    return Fisher(MemoryStore(dict(tensors)), FisherConfig(**config))


EMA = {"statistic": "ema", "steps": 2, "optimizer": {"beta2": 0.5}}  # debiased: divided by 0.75
