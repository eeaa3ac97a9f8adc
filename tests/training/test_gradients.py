"""Moving average of squared gradients, compared with float64 and with Adam's second moment."""

import pytest
import torch
from torch import nn

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import ConfigError, MismatchError
from squisher_mergekit.training import GradientSquares
from squisher_mergekit.training.gradients import gradient_norm
from tests.small_models import LENGTH
from tests.training.cases import make


def _model():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5))


def _backward(model, generator, scale=1.0):
    model.zero_grad()
    (scale * model(torch.randn(11, 3, generator=generator)).square().mean()).backward()


def _reference(beta, model, gradients):
    average = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for step in gradients:
        for name, gradient in step.items():
            average[name] = beta * average[name] + (1 - beta) * gradient.double() ** 2
    return average


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_average_is_that_of_a_float64_reference(dtype):
    """The average over 29 steps of gradients in any dtype equals a float64 average at float32's precision."""
    model = _model().to(dtype)
    squares, gradients, generator = GradientSquares(model, 0.9), [], torch.Generator().manual_seed(1)
    for _ in range(29):
        model.zero_grad()
        model(torch.randn(11, 3, generator=generator).to(dtype)).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        assert squares.update()
    for name, expected in _reference(0.9, model, gradients).items():
        torch.testing.assert_close(squares.squares[name].double(), expected, rtol=3e-6, atol=0.0)
        assert squares.squares[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert set(squares.steps.values()) == {29}


def test_with_adams_decay_it_is_adams_second_moment(tmp_path):
    """The average with beta = beta2, called before each step, equals exp_avg_sq.

    Debiased, both Fishers are the same.
    """
    model, generator = _model(), torch.Generator().manual_seed(1)
    optimizer, squares = torch.optim.AdamW(model.parameters(), foreach=False), GradientSquares(model, 0.999)
    for _ in range(5):
        _backward(model, generator)
        squares.update()
        optimizer.step()
    fisher = squares.save(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(fisher[name], optimizer.state[parameter]["exp_avg_sq"])
    assert (fisher.config.estimator, fisher.config.steps, fisher.config.optimizer.beta2) == ("ema_empirical", 5, 0.999)
    assert fisher.config.optimizer.class_ is None


def test_the_average_survives_the_optimizer():
    """A new optimizer does not change the average, while Adam's second moment starts again."""
    model, generator, gradients = _model(), torch.Generator().manual_seed(1), []
    squares = GradientSquares(model, 0.9)
    for _ in range(2):
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(3):
            _backward(model, generator)
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
            squares.update()
            optimizer.step()
    for name, expected in _reference(0.9, model, gradients).items():
        torch.testing.assert_close(squares.squares[name].double(), expected, rtol=1e-6, atol=0.0)
    assert set(squares.steps.values()) == {6}
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}


def test_a_penalty_added_after_the_update_does_not_enter():
    """An update between both backward passes averages the gradient of the task. Adam's state includes the penalty."""
    model = _model()
    squares, optimizer = GradientSquares(model, 0.5), torch.optim.AdamW(model.parameters(), betas=(0.9, 0.5))
    _backward(model, torch.Generator().manual_seed(1))
    task = {name: p.grad.clone() for name, p in model.named_parameters()}
    squares.update()
    (100 * sum((p - 1).square().sum() for p in model.parameters())).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(squares.squares[name], 0.5 * task[name] ** 2, rtol=1e-6, atol=0.0)
        assert (optimizer.state[parameter]["exp_avg_sq"] > squares.squares[name]).all()


def test_a_parameter_counts_its_own_steps():
    """A parameter without a gradient stays unchanged, as under Adam. One that never had a gradient has no Fisher."""
    model, generator = _model(), torch.Generator().manual_seed(1)
    model[2].bias.requires_grad_(False)
    squares = GradientSquares(model, 0.9)
    for step in range(4):
        _backward(model, generator)
        if step % 2:
            model[0].bias.grad = None
        squares.update()
    fisher = squares.fisher()
    assert {name: fisher.config.steps_of(name) for name in fisher} == {"0.weight": 4, "0.bias": 2, "2.weight": 4}
    assert "2.bias" in fisher.config.coverage.without


def test_an_overflow_is_skipped():
    """Infinite, NaN and missing gradients change nothing, and the step is not counted."""
    model, generator = _model(), torch.Generator().manual_seed(1)
    squares = GradientSquares(model, 0.9)
    assert not squares.update()
    _backward(model, generator)
    squares.update()
    before = {name: tensor.clone() for name, tensor in squares.squares.items()}
    for value in (float("inf"), float("nan")):
        model[0].bias.grad[1] = value
        assert not squares.update()
    assert all(torch.equal(squares.squares[name], before[name]) for name in before)
    assert set(squares.steps.values()) == {1}


def test_the_average_resumes_from_its_state():
    """Six steps in two parts, with state_dict between them, give the bits of six at once."""
    results = []
    for parts in ((6,), (2, 4)):
        model, generator, state = _model(), torch.Generator().manual_seed(1), None
        for steps in parts:
            squares = GradientSquares(model, 0.9)
            if state is not None:
                squares.load_state_dict(state)
            for _ in range(steps):
                _backward(model, generator)
                squares.update()
            state = squares.state_dict()
        results.append(state)
    assert results[0]["steps"] == results[1]["steps"]
    assert all(torch.equal(results[0]["squares"][name], tensor) for name, tensor in results[1]["squares"].items())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"beta": 0.5}, ConfigError),
        ({"squares": {"0.weight": torch.zeros(3, 7)}}, MismatchError),
        ({"squares": {"strange": torch.zeros(3)}}, MismatchError),
    ],
    ids=["decay", "shape", "name"],
)
def test_a_foreign_state_is_refused(change, error):
    """A state with another decay, shape or name is refused, and nothing is loaded."""
    squares = GradientSquares(_model(), 0.9)
    with pytest.raises(error):
        squares.load_state_dict({"beta": 0.9, "steps": {}, "squares": {}} | change)
    assert not squares.squares


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral"])
def test_the_average_resumes_from_the_file(tmp_path, name):
    """Renamed, tied and packed parameters are restored from their names on disk."""
    model = make(name)
    squares = GradientSquares(model, 0.9)
    ids = torch.randint(3, 53, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids[:, 0] % 5 if name == "bert" else ids).loss.backward()
    squares.update()
    squares.save(tmp_path)
    again = GradientSquares(model, 0.9)
    again.load_fisher(load_fisher(tmp_path))
    assert again.steps == squares.steps
    assert again.squares.keys() == squares.squares.keys()
    assert all(torch.equal(again.squares[key], tensor) for key, tensor in squares.squares.items())


def test_a_decay_out_of_range_is_refused():
    """A decay must be between 0 and 1."""
    for beta in (0.0, 1.0, float("nan")):
        with pytest.raises(ConfigError):
            GradientSquares(_model(), beta)


def test_saving_before_the_first_update_is_refused(tmp_path):
    """A Fisher cannot be saved before the first update."""
    with pytest.raises(MismatchError, match="update"):
        GradientSquares(_model(), 0.9).save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_norm_is_that_of_one_long_vector():
    """The norm is that of all entries over tensors of any shape and dtype, in float64."""
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (7,), ())]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    parameters.append(nn.Parameter(torch.randn(2)))  # has no gradient
    expected = torch.cat([p.grad.double().reshape(-1) for p in parameters[:3]]).norm()
    assert gradient_norm(parameters).item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradient_norm([]).item() == 0.0


def test_a_loaded_state_replaces_the_present_one():
    """An average that loads a state has that state alone: what a parameter without gradient in it had is gone."""
    model = nn.ModuleDict({"a": nn.Linear(2, 1, bias=False), "b": nn.Linear(3, 1, bias=False)})
    squares = GradientSquares(model, 0.5)
    model["a"].weight.grad = torch.ones(1, 2)
    squares.update()
    state = squares.state_dict()
    state["squares"] = {name: tensor.clone() for name, tensor in state["squares"].items()}
    model["b"].weight.grad = torch.ones(1, 3)
    squares.update()
    squares.load_state_dict(state)
    assert squares.steps == {"a.weight": 1}
    assert {name: tensor.tolist() for name, tensor in squares.squares.items()} == {"a.weight": [[0.5, 0.5]]}
