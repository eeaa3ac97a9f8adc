"""Clipping in a run of the Trainer, and gradients at a loss scale."""

from types import SimpleNamespace

import pytest
import torch

from squisher_mergekit import SquisherCallback
from squisher_mergekit.training.clipping import ClippingMonitor, clip_limit


def _layer(*gradients):
    layer = torch.nn.Linear(2, 1, bias=False)
    for gradient in gradients:
        layer.weight.grad = torch.tensor([gradient])
        yield layer


@pytest.mark.parametrize(("given", "limit"), [(None, 0.0), (0, 0.0), (-1.0, 0.0), (0.5, 0.5)])
def test_a_trainer_clips_at_positive_norms_alone(given, limit):
    """max_grad_norm=-1 switches clipping off, as 0 does: no step counts as clipped."""
    assert clip_limit(SimpleNamespace(max_grad_norm=given)) == limit
    clipping = ClippingMonitor(clip_limit(SimpleNamespace(max_grad_norm=given)))
    for layer in _layer([0.03, 0.04]):
        clipping.watch(layer)
    assert clipping.share == 0.0


def test_a_norm_that_overflows_is_no_clipped_step():
    """A step with an infinite norm counts neither as clipped nor as seen; the share stays within 0 and 1."""
    clipping = ClippingMonitor(1.0)
    for layer in _layer([1e30, 1e30], [0.6, 0.8], [0.03, 0.04]):
        clipping.watch(layer)
    assert clipping.share == 0.5


def _recorded(tmp_path, scale, clipped):
    """Return average and factors of one step of a run whose optimizer has a GradScaler, and the weights after it."""
    torch.manual_seed(3)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
    wrapped = SimpleNamespace(optimizer=optimizer, scaler=scaler)
    args = SimpleNamespace(max_grad_norm=0.0, output_dir=str(tmp_path))
    state = SimpleNamespace(is_hyper_param_search=False, global_step=0)
    callback = SquisherCallback(beta=0.5, factors="rows", every=1)
    callback.on_train_begin(args, state, None, model=model, optimizer=wrapped)
    scaler.scale(model(torch.ones(2, 5)).square().sum()).backward()
    if clipped:
        scaler.unscale_(optimizer)
    callback.on_pre_optimizer_step(args, state, None, model=model, optimizer=wrapped)
    scaler.step(optimizer)
    scaler.update()
    return (
        callback.squares.squares["weight"],
        callback.gradient_factors.moments["rows"]["weight"],
        model.weight.detach(),
    )


@pytest.mark.parametrize("clipped", [False, True])
def test_the_average_has_no_loss_scale(tmp_path, clipped):
    """Average, factors and step are those without a loss scale, whether clipping has unscaled the gradients or not."""
    for found, expected in zip(_recorded(tmp_path, 1024.0, clipped), _recorded(tmp_path, 1.0, False), strict=True):
        assert torch.equal(found, expected)
