"""Comparison of the EWC penalty with Eq. 14 in float64, and its use in a training loop."""

import copy
import io

import pytest
import torch
from torch import nn

from squisher_mergekit import estimate_fisher, load_fisher, save_squisher
from squisher_mergekit.applications.ewc.penalty import EWCPenalty, identity
from squisher_mergekit.errors import ConfigError
from squisher_mergekit.training import GradientSquares
from tests.applications.ewc.tasks import (
    EMA,
    NAMES,
    as_fisher,
    assert_close,
    eq14,
    gradients_of,
    moved,
    random_fisher,
    small_model,
)


def test_by_hand():
    """Lambda 6, F (2, 0, 5) and a move from (1, 1, 1) to (4, 9, 0) give the value 69 and the gradient (36, 0, -30)."""
    model = nn.Linear(3, 1, bias=False)
    penalty = EWCPenalty(6.0)
    nn.init.ones_(model.weight)
    penalty.add(model, {"weight": torch.tensor([[2.0, 0.0, 5.0]])})
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 9.0, 0.0]]))
    value = penalty(model)
    value.backward()
    assert value.item() == 69.0
    assert model.weight.grad.tolist() == [[36.0, 0.0, -30.0]]
    penalty.add_gradient(model)  # adds to the existing gradient
    assert model.weight.grad.tolist() == [[72.0, 0.0, -60.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_separate_penalties_are_summed(dtype, count):
    """Value and gradients equal the sum of one float64 penalty per task, although only one quadratic is kept."""
    model = small_model(dtype=dtype)
    penalty, tasks = EWCPenalty(0.7), []
    for seed in range(count):
        anchor = moved(model, seed)
        tasks.append((anchor, random_fisher(model, 10 + seed)))
        penalty.add(*tasks[-1])
    value, gradients = eq14(model, tasks, 0.7)
    torch.testing.assert_close(penalty(model).double(), value, rtol=1e-6, atol=0.0)
    assert_close(gradients_of(model, penalty), gradients)
    model.zero_grad()
    penalty(model).backward()
    assert_close({name: p.grad for name, p in model.named_parameters()}, gradients)
    assert penalty.tasks == count


def test_the_online_form_is_the_recursion():
    """The online form computes F <- F_new + gamma F_old about the last anchor. A tensor without a new Fisher decays."""
    model, penalty = small_model(), EWCPenalty(3.0, mode="online", gamma=0.6)
    anchors = [moved(model, seed) for seed in range(3)]
    fishers = [random_fisher(model, 20 + seed) for seed in range(3)]
    del fishers[2]["2.bias"]
    for anchor, fisher in zip(anchors, fishers, strict=True):
        penalty.add(anchor, fisher)
    expected = {name: 0.6**2 * fishers[0][name].double() + 0.6 * fishers[1][name] for name in NAMES}
    expected = {name: tensor + fishers[2].get(name, 0.0) for name, tensor in expected.items()}
    value, gradients = eq14(model, [(anchors[2], expected)], 3.0)
    torch.testing.assert_close(penalty(model).double(), value, rtol=1e-6, atol=0.0)
    assert_close(gradients_of(model, penalty), gradients)


@pytest.mark.parametrize(
    ("scale", "given", "config", "factor"),
    [
        ("batch", {}, {"estimator": "squisher", "examples_per_step": 6, **EMA}, 8.0),
        ("batch", {"examples_per_step": 3}, {"estimator": "ema_empirical", **EMA}, 4.0),
        ("batch", {}, {"estimator": "exact", "statistic": "mean", "num_examples": 7}, 1.0),
        ("batch", {}, {"estimator": "empirical", "statistic": "sum", "num_examples": 4}, 0.25),
        ("batch", {}, {"estimator": "empirical", **EMA}, 4 / 3),
        ("dataset", {"num_examples": 9}, {"estimator": "squisher", "examples_per_step": 6, **EMA}, 12.0),
        ("dataset", {"num_examples": 9}, {"estimator": "exact", "statistic": "mean", "num_examples": 7}, 1.0),
        (30, {}, {"estimator": "squisher", **EMA}, 40.0),
        (30.0, {}, {"estimator": "exact", "statistic": "mean"}, 30.0),
        ("batch", {}, None, 1.0),
        ("dataset", {}, None, 1.0),
        (5.0, {}, None, 5.0),
    ],
)
def test_the_scale_of_a_fisher(scale, given, config, factor):
    """The scale multiplies a batch statistic by B, by N or by a number, after debiasing.

    Means and mappings stay as they are.
    """
    model, far = small_model(), moved(small_model(), 3)
    tensors = random_fisher(model, 1)
    penalty = EWCPenalty(2.0, scale=scale)
    penalty.add(model, tensors if config is None else as_fisher(tensors, **config), **given)
    value, _ = eq14(far, [(model, tensors)], 2.0)
    torch.testing.assert_close(penalty(far).double(), factor * value, rtol=1e-6, atol=0.0)


def test_batch_scale_makes_squisher_and_fisher_comparable():
    """For independent examples, B times the mean squared batch gradient equals the mean squared example gradient."""
    torch.manual_seed(2)
    model = nn.Linear(13, 3)
    x = torch.randn(20_000, 13)
    y = torch.distributions.Categorical(logits=model(x).detach()).sample()
    squares = GradientSquares(model, beta=0.9999)
    for images, labels in zip(x.split(20), y.split(20), strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        squares.update()
    alike = []
    for fisher, given in ((squares.fisher(), {"examples_per_step": 20}), (estimate_fisher(model, [(x, y)]), {})):
        penalty = EWCPenalty(1.0)
        penalty.add(model, fisher, **given)
        alike.append(penalty(moved(model, 4)).item())
    assert alike[0] == pytest.approx(alike[1], rel=0.05)


def test_l2_and_none():
    """The identity gives lambda / 2 of the squared distance. Lambda 0 or no task gives 0 and no gradient."""
    model, far = small_model(), moved(small_model(), 3)
    penalty = EWCPenalty(5.0)
    assert penalty(model).item() == 0.0
    assert gradients_of(model, penalty) == {}
    penalty.add(model, identity(model))
    squared = sum(((a - b) ** 2).sum() for a, b in zip(far.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(penalty(far), 2.5 * squared)
    none = EWCPenalty(0.0)
    none.add(model, identity(model))
    assert none(far).item() == 0.0
    assert gradients_of(far, none) == {}


def test_in_a_loop_the_two_ways_give_the_same_weights():
    """Ten Adam steps agree to 1e-6 if the penalty is in the loss or its gradient is added after the backward pass."""
    weights = []
    for analytic in (False, True):
        model, penalty = small_model(), EWCPenalty(2.0)
        penalty.add(moved(model, 5), random_fisher(model, 6))
        optimizer, generator = torch.optim.Adam(model.parameters(), lr=0.01), torch.Generator().manual_seed(1)
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(torch.randn(11, 3, generator=generator)).square().mean()
            (loss if analytic else loss + penalty(model)).backward()
            if analytic:
                penalty.add_gradient(model)
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-6)


def test_the_anchor_and_the_fisher_are_copies():
    """The penalty does not change when weights or Fisher tensors change after a task was added."""
    model, tensors = small_model(), random_fisher(small_model(), 1)
    penalty, start, before = EWCPenalty(1.0), copy.deepcopy(model), copy.deepcopy(tensors)
    penalty.add(model, tensors)
    with torch.no_grad():
        for tensor in (*model.parameters(), *tensors.values()):
            tensor.mul_(3.0)
    torch.testing.assert_close(penalty(model).double(), eq14(model, [(start, before)], 1.0)[0], rtol=1e-6, atol=0.0)


def test_a_squisher_from_a_file_and_from_the_separate_average(tmp_path):
    """The saved optimizer state and a separate average of equal decay give the same penalty."""
    model = small_model()
    optimizer, squares = torch.optim.Adam(model.parameters()), GradientSquares(model, 0.999)
    for seed in range(5):
        optimizer.zero_grad()
        model(torch.randn(11, 3, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        squares.update()
        optimizer.step()
    own, separate, far = EWCPenalty(1.0), EWCPenalty(1.0), moved(model, 2)
    save_squisher(model, optimizer, tmp_path, examples_per_step=11)
    own.add(model, load_fisher(tmp_path))
    separate.add(model, squares.fisher(), examples_per_step=11)
    assert own(far).item() == pytest.approx(separate(far).item(), rel=1e-6)


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_the_penalty_resumes_from_its_state(mode):
    """A penalty restored with weights_only=True has the same value to the bit, also after another task."""
    model = small_model()
    first = EWCPenalty(2.0, mode=mode, gamma=0.5)
    for seed in range(2):
        first.add(moved(model, seed), random_fisher(model, seed))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = EWCPenalty(2.0, mode=mode, gamma=0.5)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert (second.tasks, second(model).item()) == (2, first(model).item())
    for penalty in (first, second):
        penalty.add(moved(model, 7), random_fisher(model, 8))
    assert second(model).item() == first(model).item()
    with pytest.raises(ConfigError, match=r"gamma 0\.9, found 0\.5"):
        EWCPenalty(2.0, mode=mode, gamma=0.9).load_state_dict(first.state_dict())
