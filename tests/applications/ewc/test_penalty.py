"""The penalty of EWC, held against Eq. 14 written out in float64, and its uses in a loop."""

import copy
import io
import logging
import subprocess
import sys

import peft
import pytest
import torch
from torch import nn

from squisher_mergekit import Fisher, FisherConfig, estimate_fisher, load_fisher, save_squisher
from squisher_mergekit.applications.ewc.penalty import EWCPenalty, identity
from squisher_mergekit.applications.ewc.quadratics import Quadratic, add_quadratics
from squisher_mergekit.errors import ConfigError, MismatchError, ValuesError
from squisher_mergekit.tensors.safetensors import MemoryStore
from squisher_mergekit.training import GradientSquares
from tests.training.cases import make

LORA = peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True)
NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


def _model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5)).to(dtype)


def _moved(model, seed):
    """Return a copy with other weights."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return other


def _fisher(model, seed):
    """Return a positive Fisher over eight decades, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in model.named_parameters():
        decades = 8 * torch.rand(parameter.shape, generator=generator) - 6
        found[name] = 10**decades * (torch.rand(parameter.shape, generator=generator) > 0.2)
    return found


def _eq14(model, tasks, lam):
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


def _gradients(model, penalty):
    model.zero_grad()
    penalty.add_gradient(model)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _close(found, expected, rtol=1e-5):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=rtol, atol=1e-6 * float(tensor.abs().max()))


def test_by_hand():
    """Lambda 6, F = (2, 0, 5), theta from (1, 1, 1) to (4, 9, 0): 3 (2 x 9 + 5 x 1) = 69, gradient (36, 0, -30)."""
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
    penalty.add_gradient(model)  # to what is there already
    assert model.weight.grad.tolist() == [[72.0, 0.0, -60.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_separate_penalties_are_summed(dtype, count):
    """Value and both gradients are those of one penalty a task, in float64, though one quadratic alone is kept."""
    model = _model(dtype=dtype)
    penalty, tasks = EWCPenalty(0.7), []
    for seed in range(count):
        anchor = _moved(model, seed)
        tasks.append((anchor, _fisher(model, 10 + seed)))
        penalty.add(*tasks[-1])
    value, gradients = _eq14(model, tasks, 0.7)
    torch.testing.assert_close(penalty(model).double(), value, rtol=1e-6, atol=0.0)
    _close(_gradients(model, penalty), gradients)
    model.zero_grad()
    penalty(model).backward()
    _close({name: p.grad for name, p in model.named_parameters()}, gradients)
    assert penalty.tasks == count


def test_nothing_cancels_where_anchors_lie_close():
    """Weights of size 1000 and steps of 1e-3: the sum of two quadratics keeps float32's precision of the steps."""
    p = torch.full((11,), 1000.0, dtype=torch.float64)
    q, theta = p + 1e-3, p + 2e-3
    first, second = torch.full((11,), 3.0), torch.full((11,), 5.0)
    found = add_quadratics(Quadratic(first.double(), p), Quadratic(second.double(), q)).at(theta)
    expected = 11 * (3.0 * 2e-3**2 + 5.0 * 1e-3**2)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_the_online_form_is_the_recursion():
    """F <- F_new + gamma F_old about the last anchor; what has no new Fisher decays."""
    model, penalty = _model(), EWCPenalty(3.0, mode="online", gamma=0.6)
    anchors = [_moved(model, seed) for seed in range(3)]
    fishers = [_fisher(model, 20 + seed) for seed in range(3)]
    del fishers[2]["2.bias"]
    for anchor, fisher in zip(anchors, fishers, strict=True):
        penalty.add(anchor, fisher)
    expected = {name: 0.6**2 * fishers[0][name].double() + 0.6 * fishers[1][name] for name in NAMES}
    expected = {name: tensor + fishers[2].get(name, 0.0) for name, tensor in expected.items()}
    value, gradients = _eq14(model, [(anchors[2], expected)], 3.0)
    torch.testing.assert_close(penalty(model).double(), value, rtol=1e-6, atol=0.0)
    _close(_gradients(model, penalty), gradients)


def _as_fisher(tensors, **config):
    return Fisher(MemoryStore(dict(tensors)), FisherConfig(**config))


EMA = {"statistic": "ema", "steps": 2, "optimizer": {"beta2": 0.5}}  # debiased: / 0.75


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
    """B v of what squares batches, N v, a number; debiased always; a computed mean and a mapping as they are."""
    model, far = _model(), _moved(_model(), 3)
    tensors = _fisher(model, 1)
    penalty = EWCPenalty(2.0, scale=scale)
    penalty.add(model, tensors if config is None else _as_fisher(tensors, **config), **given)
    value, _ = _eq14(far, [(model, tensors)], 2.0)
    torch.testing.assert_close(penalty(far).double(), factor * value, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("scale", "needed"), [("batch", "examples_per_step"), ("dataset", "num_examples")])
def test_a_number_that_is_not_known_is_asked_for(scale, needed):
    """The error names it and says how to give it; nothing is added."""
    model, penalty = _model(), EWCPenalty(1.0, scale=scale)
    fisher = _as_fisher(_fisher(model, 1), estimator="squisher", **EMA)
    with pytest.raises(ConfigError, match=rf"scale {scale} needs {needed}.*add\(..., {needed}=N\)"):
        penalty.add(model, fisher)
    with pytest.raises(ConfigError, match=f"{needed} must be a positive number, found -1"):
        penalty.add(model, fisher, **{needed: -1})
    assert penalty.tasks == 0


def test_batch_scale_makes_squisher_and_fisher_alike():
    """Of independent examples, B times the mean squared batch gradient is the mean squared example's gradient."""
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
        alike.append(penalty(_moved(model, 4)).item())
    assert alike[0] == pytest.approx(alike[1], rel=0.05)


def test_l2_and_none():
    """The identity gives lambda / 2 of the squared distance; lambda 0, and no task yet, give 0 and no gradient."""
    model, far = _model(), _moved(_model(), 3)
    penalty = EWCPenalty(5.0)
    assert penalty(model).item() == 0.0
    assert _gradients(model, penalty) == {}
    penalty.add(model, identity(model))
    squared = sum(((a - b) ** 2).sum() for a, b in zip(far.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(penalty(far), 2.5 * squared)
    none = EWCPenalty(0.0)
    none.add(model, identity(model))
    assert none(far).item() == 0.0
    assert _gradients(far, none) == {}


def test_in_a_loop_the_two_ways_give_the_same_weights():
    """With the scalar in the loss, or the gradient after the backward pass, ten Adam steps agree to 1e-6."""
    weights = []
    for analytic in (False, True):
        model, penalty = _model(), EWCPenalty(2.0)
        penalty.add(_moved(model, 5), _fisher(model, 6))
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
    """What training does to the weights, or to a living average, after a task was added does not reach the penalty."""
    model, tensors = _model(), _fisher(_model(), 1)
    penalty, start, before = EWCPenalty(1.0), copy.deepcopy(model), copy.deepcopy(tensors)
    penalty.add(model, tensors)
    with torch.no_grad():
        for tensor in (*model.parameters(), *tensors.values()):
            tensor.mul_(3.0)
    torch.testing.assert_close(penalty(model).double(), _eq14(model, [(start, before)], 1.0)[0], rtol=1e-6, atol=0.0)


def test_a_squisher_from_a_file_and_from_the_separate_average(tmp_path):
    """The optimizer's own, saved and loaded, and an average with its decay give the same penalty before any other."""
    model = _model()
    optimizer, squares = torch.optim.Adam(model.parameters()), GradientSquares(model, 0.999)
    for seed in range(5):
        optimizer.zero_grad()
        model(torch.randn(11, 3, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        squares.update()
        optimizer.step()
    own, separate, far = EWCPenalty(1.0), EWCPenalty(1.0), _moved(model, 2)
    save_squisher(model, optimizer, tmp_path, examples_per_step=11)
    own.add(model, load_fisher(tmp_path))
    separate.add(model, squares.fisher(), examples_per_step=11)
    assert own(far).item() == pytest.approx(separate(far).item(), rel=1e-6)


def test_what_has_no_fisher_is_free_and_listed_once(caplog):
    """A new head trains without a penalty; the log names it once, the attribute as long as it is so."""
    model, penalty = _model(), EWCPenalty(1.0)
    trunk = {name: tensor for name, tensor in _fisher(model, 1).items() if name.startswith("0.")}
    for _ in range(2):
        penalty.add(model, trunk)
    assert penalty.unpenalised == ("2.weight", "2.bias")
    assert [record.getMessage() for record in caplog.records] == [
        "EWC leaves 2 trainable parameters free, having no Fisher of them: 2.weight, 2.bias"
    ]
    assert set(_gradients(_moved(model, 1), penalty)) == {"0.weight", "0.bias"}
    penalty.add(model, _fisher(model, 1))
    assert penalty.unpenalised == ()


def test_frozen_parameters_are_left_out_while_they_are_frozen():
    """They get no gradient and add nothing to the value; thawed, they are held again."""
    model, penalty = _model(), EWCPenalty(1.0)
    fisher = _fisher(model, 1)
    penalty.add(model, fisher)
    far = _moved(model, 2)
    far[0].requires_grad_(False)
    head = {name: tensor for name, tensor in fisher.items() if name.startswith("2.")}
    torch.testing.assert_close(penalty(far).double(), _eq14(far, [(model, head)], 1.0)[0], rtol=1e-6, atol=0.0)
    assert set(_gradients(far, penalty)) == {"2.weight", "2.bias"}
    far[0].requires_grad_(True)
    torch.testing.assert_close(penalty(far).double(), _eq14(far, [(model, fisher)], 1.0)[0], rtol=1e-6, atol=0.0)


def test_a_parameter_that_is_gone_or_has_grown_is_refused_until_dropped():
    """By name, with the cure; after it the rest is penalised as before."""
    model, penalty = _model(), EWCPenalty(1.0)
    fisher = _fisher(model, 1)
    penalty.add(model, fisher)
    grown = copy.deepcopy(model)
    grown[2] = nn.Linear(7, 11)
    with pytest.raises(MismatchError, match=r"2.weight in the shape \[5, 7\] .* \[11, 7\].*penalty.drop\('2.weight'\)"):
        penalty.add_gradient(grown)
    assert all(p.grad is None for p in grown.parameters())
    gone = nn.Sequential(model[0])
    with pytest.raises(MismatchError, match=r"has no 2\.weight"):
        penalty(gone)
    penalty.drop("2.weight", "2.bias")
    assert set(_gradients(grown, penalty)) == {"0.weight", "0.bias"}
    assert penalty(gone).item() == 0.0
    with pytest.raises(MismatchError, match=r"'2\.bias' is not"):
        penalty.drop("2.bias")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lam": -1.0}, "lambda must be finite and not negative, found -1.0"),
        ({"lam": float("nan")}, "found nan"),
        ({"lam": float("inf")}, "found inf"),
        ({"lam": 1.0, "mode": "offline"}, "found 'offline'"),
        ({"lam": 1.0, "gamma": 1.5}, "gamma must be from 0 to 1, found 1.5"),
        ({"lam": 1.0, "gamma": float("nan")}, "found nan"),
        ({"lam": 1.0, "scale": "data"}, "found 'data'"),
        ({"lam": 1.0, "scale": 0.0}, "found 0.0"),
        ({"lam": 1.0, "scale": float("nan")}, "found nan"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    """In one line, as a ValueError."""
    with pytest.raises(ValueError, match=message) as caught:
        EWCPenalty(**arguments)
    assert "\n" not in str(caught.value)


def test_an_overflow_is_refused_and_nothing_changes():
    """1e30 times 1e9 leaves float32, at once or by the second task; the penalty stays that of the first."""
    model, penalty = _model(), EWCPenalty(1e30)
    small, large = ({"0.bias": torch.full((7,), value)} for value in (2e8, 1e9))
    with pytest.raises(ConfigError, match=r"lambda is 1e\+30 and the largest entry of 0.bias 1e\+09; give a smaller"):
        penalty.add(model, large)
    assert (penalty.tasks, penalty(model).item()) == (0, 0.0)
    penalty.add(model, small)
    with pytest.raises(ConfigError, match=r"0.bias 4e\+08"):
        penalty.add(model, small)
    assert penalty.tasks == 1
    with pytest.raises(ConfigError, match="smaller lambda"):
        EWCPenalty(1e35).load_state_dict(penalty.state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-9])
def test_a_bad_fisher_is_refused(value):
    """NaN, infinite and negative entries, and nothing is added."""
    model, penalty = _model(), EWCPenalty(1.0)
    fisher = _fisher(model, 1)
    fisher["2.bias"][3] = value
    with pytest.raises(ValuesError, match=r"2\.bias in memory has 1 \w+ of 5 entries"):
        penalty.add(model, fisher)
    assert penalty.tasks == 0


@pytest.mark.parametrize(
    ("fisher", "message"),
    [
        ({}, "at least one parameter"),
        ({"strange": torch.ones(3)}, "strange in memory is none of"),
        ({"0.weight": torch.ones(3, 7)}, r"0.weight must have the weight's shape \[7, 3\]"),
    ],
)
def test_a_fisher_of_another_model_is_refused(fisher, message):
    """By the first name or shape that does not fit."""
    with pytest.raises(MismatchError, match=message):
        EWCPenalty(1.0).add(_model(), fisher)


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_it_goes_on_from_its_state(mode):
    """Through a file that torch loads without running code: the same value to the bit, and so after another task."""
    model = _model()
    first = EWCPenalty(2.0, mode=mode, gamma=0.5)
    for seed in range(2):
        first.add(_moved(model, seed), _fisher(model, seed))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = EWCPenalty(2.0, mode=mode, gamma=0.5)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert (second.tasks, second(model).item()) == (2, first(model).item())
    for penalty in (first, second):
        penalty.add(_moved(model, 7), _fisher(model, 8))
    assert second(model).item() == first(model).item()
    with pytest.raises(ConfigError, match=r"gamma 0\.9, found 0\.5"):
        EWCPenalty(2.0, mode=mode, gamma=0.9).load_state_dict(first.state_dict())


def test_the_ratio_is_that_of_squared_norms(caplog):
    """Two steps, summed, over the penalised parameters: (p_1^2 + p_2^2) / (t_1^2 + t_2^2)."""
    model, penalty = nn.Linear(2, 1), EWCPenalty(1.0)
    nn.init.zeros_(model.weight)
    penalty.add(model, {"weight": torch.tensor([[1.0, 2.0]])})
    assert penalty.ratio() is None
    nn.init.ones_(model.weight)
    for task in ([[3.0, 4.0]], [[0.0, 1.0]]):
        model.weight.grad, model.bias.grad = torch.tensor(task), torch.tensor([100.0])
        penalty.add_gradient(model)
    assert penalty.ratio() == pytest.approx((5 + 5) / (25 + 1))
    model.weight.grad = torch.tensor([[float("inf"), 0.0]])  # a step that overflowed
    penalty.add_gradient(model)
    assert penalty.ratio() == pytest.approx(10 / 26)
    assert "runs away" not in caplog.text


def test_a_penalty_that_runs_away_is_warned_of_once_a_task(caplog):
    """A ratio of 1e8 over 100 steps is one line; the next hundred say nothing, the next task does; 5e5 never."""
    model = nn.Linear(1, 1, bias=False)

    def steps(penalty, count):
        for _ in range(count):
            model.weight.grad = torch.tensor([[1e-4]])
            penalty.add_gradient(model)

    def said():
        return sum("runs away" in record.getMessage() for record in caplog.records)

    for lam, expected in ((1.0, [0, 1, 1, 2]), (0.007, [0, 0, 0, 0])):
        caplog.clear()
        penalty = EWCPenalty(lam)
        nn.init.zeros_(model.weight)
        penalty.add(model, identity(model))
        nn.init.ones_(model.weight)
        found = []
        for count in (99, 1, 150):
            steps(penalty, count)
            found.append(said())
        penalty.add(model, identity(model))
        nn.init.zeros_(model.weight)
        steps(penalty, 30)
        penalty.add(model, identity(model))
        assert [*found, said()] == expected
    assert caplog.records == [] or all(record.levelno == logging.WARNING for record in caplog.records)


def test_the_weights_of_half_precision_are_anchored_in_float32():
    """A bfloat16 model keeps a float32 Fisher and anchor, and gets a bfloat16 gradient."""
    model = _model(dtype=torch.bfloat16)
    far, fisher, penalty = _moved(model, 2), _fisher(model, 1), EWCPenalty(1.0)
    penalty.add(model, fisher)
    _, gradients = _eq14(far, [(model, fisher)], 1.0)
    found = _gradients(far, penalty)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    _close(found, gradients, rtol=2**-8)
    assert {term["anchor"].dtype for term in penalty.state_dict()["terms"].values()} == {torch.float32}


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_is_the_same(wrap):
    """Names are those without wrappers, so that one penalty serves the model wrapped and bare."""
    model, penalty = _model(), EWCPenalty(1.0)
    penalty.add(wrap(model), _fisher(model, 1))
    far = _moved(model, 2)
    assert penalty(wrap(far)).item() == penalty(far).item() > 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_models_of_transformers_and_adapters():
    """A Fisher by the names on disk finds packed experts and the weights of a LoRA; tied weights count once."""
    for model in (make("mixtral"), peft.get_peft_model(make("gpt2"), LORA)):
        ids = torch.arange(3, 14).unsqueeze(0)
        model(input_ids=ids, labels=ids).loss.backward()
        squares = GradientSquares(model, 0.5)
        squares.update()
        far = _moved(model, 1)
        penalty = EWCPenalty(1.0)
        penalty.add(model, squares.fisher(), examples_per_step=1)
        expected = sum(
            (p.grad.double() ** 2 * (q.detach().double() - p.detach().double()) ** 2).sum()
            for p, q in zip(model.parameters(), far.parameters(), strict=True)
            if p.grad is not None
        )
        torch.testing.assert_close(penalty(far).double(), 0.5 * expected, rtol=1e-5, atol=0.0)
        assert expected > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_give_what_one_gives(tmp_path, kind):
    """Under accelerate and DDP, or sharded by FSDP2: penalty, ratio and weights are those of one process."""
    found = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        line = [sys.executable, "-m", "tests.applications.ewc.ewc_worker", kind, str(folder)]
        runs = [subprocess.Popen([*line, str(rank), str(world)], stderr=subprocess.PIPE) for rank in range(world)]
        said = [run.communicate(timeout=240)[1].decode() for run in runs]
        assert not any(run.returncode for run in runs), said
        found[world] = torch.load(folder / "found.pt", weights_only=True)
    one, two = found[1], found[2]
    assert one["value"] > 0
    assert one["ratio"] > 0
    for key in ("value", "ratio"):
        assert two[key] == pytest.approx(one[key], rel=1e-4)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-5, atol=1e-5)
