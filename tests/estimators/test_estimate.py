"""Fishers of plain networks against the oracle."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from squisher_mergekit.errors import ConfigError, UnsupportedStateError
from squisher_mergekit.estimators.estimate import estimate_fisher
from tests.estimators import oracle
from tests.estimators.models import assert_close, batch_of, make


class _Twice(nn.Module):
    """Network that calls one linear layer twice and registers a scale itself."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(7, 7)
        self.scale = nn.Parameter(torch.rand(7) + 0.5)
        self.out = nn.Linear(7, 3)

    def forward(self, x):
        return self.out(self.inside(torch.tanh(self.inside(x))) * self.scale)


def _cnn(**last):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, groups=8, padding="valid"), nn.GroupNorm(4, 8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 1), nn.PReLU(12), nn.Conv2d(12, 6, 2, dilation=2, padding="same", padding_mode="circular"),
        nn.Flatten(), nn.Linear(6 * 9, 4, **last),
    )  # fmt: skip


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3)), (7,), 3),
    "cnn": (_cnn, (3, 7, 7), 4),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 5, 3, bias=False), nn.Flatten(), nn.Linear(25, 3)), (3, 7), 3),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.Flatten(), nn.Linear(24, 3)), (2, 3, 3, 3), 3),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(3, 5, 3), nn.Flatten(), nn.Linear(45, 3)), (3, 7), 3),
    "twice": (_Twice, (7,), 3),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.ReLU(), nn.Flatten(), nn.Linear(15, 3)),
        (3, 7),
        3,
    ),
}


@pytest.mark.parametrize("labels", ["true", "exact", "predicted"])
@pytest.mark.parametrize("name", NETS)
def test_nets_of_every_layer_match_the_oracle(name, labels):
    """Convolutions, norms, shared layers and container parameters are within 1e-5 of the largest entry."""
    torch.manual_seed(2)
    make, shape, classes = NETS[name]
    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    batches = [(torch.randn(n, *shape).double(), torch.randint(classes, (n,))) for n in (5, 3)]
    fisher = estimate_fisher(model, batches, labels, statistic="sum")
    assert_close(fisher, oracle.fisher(model, batches, oracle.classes(labels), "example"))


@pytest.mark.parametrize("name", ["mlp", "cnn", "twice"])
def test_a_joint_fisher_squares_the_sum_of_each_batch(name):
    """The joint form sums over batches the square of the summed gradient of a batch."""
    torch.manual_seed(3)
    make, shape, classes = NETS[name]
    model = make().double()
    batches = [(torch.randn(n, *shape).double(), torch.randint(classes, (n,))) for n in (5, 3)]
    fisher = estimate_fisher(model, batches, "true", "batch", statistic="sum")
    assert_close(fisher, oracle.fisher(model, batches, oracle.classes("true"), "batch"))


def test_drawn_labels_give_the_exact_fisher_on_average():
    """The mean of 4000 draws is within five standard errors of the expectation in every entry."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batch = (torch.randn(5, 3).double(), torch.zeros(5, dtype=torch.int64))
    exact = estimate_fisher(model, [batch], "exact")
    runs = [estimate_fisher(model, [batch], "sampled", num_samples=100, seed=seed) for seed in range(40)]
    for name in exact:
        drawn = torch.stack([run[name] for run in runs])
        error = drawn.std(0) / 40**0.5
        assert ((drawn.mean(0) - exact[name]).abs() <= 5 * error + 1e-12).all(), name


@pytest.mark.parametrize("labels", ["true", "exact"])
def test_a_regression_has_the_fisher_of_a_gaussian(labels):
    """A regression squares gradients of the squared error over twice the noise variance, or takes their expectation."""
    torch.manual_seed(5)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    fisher = estimate_fisher(model, [(x, y)], labels, task="regression", noise=0.5)
    if labels == "exact":
        expected = (x.square().mean(0) / 0.25).expand(2, 3)
    else:
        residual = (model(x) - y).detach() / 0.25
        expected = (residual.square().unsqueeze(2) * x.square().unsqueeze(1)).mean(0)
    torch.testing.assert_close(fisher["weight"], expected)


def test_neither_mode_nor_gradients_are_touched():
    """An estimate does not change training mode, dropout, .grad or running statistics."""
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    model.train()
    model[1].eval()
    model[0].weight.grad = torch.full((5, 7), 3.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    estimate_fisher(model, [(torch.randn(5, 7), torch.randint(3, (5,)))])
    assert [module.training for module in model] == [True, False, True, True, True]
    assert model[3].inplace
    assert torch.equal(model[0].weight.grad, torch.full((5, 7), 3.0))
    assert model[4].weight.grad is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class _Mixing(nn.Module):
    """Network that subtracts the mean over the batch, so no example has its own gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x):
        hidden = self.a(x)
        return self.b(hidden - hidden.mean(0))


class _Elsewhere(nn.Module):
    """Network that uses a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(nn.functional.linear(x, self.a.weight))


def test_examples_that_mix_are_refused():
    """A model that mixes examples raises an error at the first two examples."""
    torch.manual_seed(6)
    batch = (torch.randn(5, 7), torch.randint(3, (5,)))
    with pytest.raises(UnsupportedStateError, match=r"a\.(weight|bias) must have .* mixes its examples"):
        estimate_fisher(_Mixing(), [batch])


def test_a_weight_used_without_its_layer_is_found():
    """A parameter that another module uses is differentiated in that module."""
    torch.manual_seed(6)
    model = _Elsewhere().double()
    batch = (torch.randn(5, 7).double(), torch.randint(3, (5,)))
    fisher = estimate_fisher(model, [batch], statistic="sum")
    assert_close(fisher, oracle.fisher(model, [batch], oracle.classes("true"), "example"))


def test_an_unverified_weight_without_its_layer_is_an_error():
    """Without verification such a weight raises an error with its name, instead of a value of 0."""
    with pytest.raises(
        UnsupportedStateError, match=r"a\.weight must be used by a call of the module that registers it"
    ):
        estimate_fisher(_Elsewhere(), [(torch.randn(5, 7), torch.randint(3, (5,)))], verify=False)


def test_frozen_parameters_are_left_out():
    """Only trainable parameters have a Fisher. It equals the one without frozen parameters."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batch = (torch.randn(5, 7).double(), torch.randint(3, (5,)))
    whole = estimate_fisher(model, [batch])
    model[0].requires_grad_(False)
    part = estimate_fisher(model, [batch])
    assert set(part) == {"2.weight", "2.bias"}
    assert all(torch.equal(part[name], whole[name]) for name in part)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft calls transformers this way
def test_only_the_adapter_of_a_lora_has_a_fisher():
    """A LoRA's names are those of adapter_model.safetensors, and the values of A and B are those of the oracle."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(10)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make("llama"), lora).double()
    batch = batch_of("causal-lm")
    fisher = estimate_fisher(model, [batch], task="causal-lm", statistic="sum")
    expected = oracle.fisher(model, [batch], oracle.tokens("causal-lm", "true"), "example")
    assert fisher.config.parameters == "adapter"
    assert_close(fisher, {name.replace(".default", ""): tensor for name, tensor in expected.items()})


def test_under_autocast_squares_are_still_float32():
    """Entries in bfloat16 are within its precision of the float32 entries, and no square underflows."""
    torch.manual_seed(11)
    model, batch = make("bert"), batch_of("classification")
    exact = estimate_fisher(model, [batch])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = estimate_fisher(model, [batch], verify=False)
    for name in (
        "bert.encoder.layer.0.output.dense.weight",
        "classifier.weight",
        "bert.encoder.layer.1.output.LayerNorm.weight",
    ):
        assert narrow[name].dtype == torch.float32
        relative = (narrow[name] - exact[name]).norm() / exact[name].norm()
        assert relative < 0.05, (name, relative)


class _Checkpointed(nn.Module):
    """Network that recomputes the activations of a block in the backward pass."""

    def __init__(self, forgets):
        super().__init__()
        self.forgets = forgets
        self.block = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 7))
        self.out = nn.Linear(7, 3)

    def forward(self, x):
        hidden = checkpoint(self.block, x, use_reentrant=False) if self.forgets else self.block(x)
        return self.out(hidden)


def test_gradient_checkpointing_changes_nothing():
    """Recomputed activations give the same entries, bit for bit."""
    torch.manual_seed(12)
    models = [_Checkpointed(True), _Checkpointed(False)]
    models[1].load_state_dict(models[0].state_dict())
    batch = (torch.randn(5, 7), torch.randint(3, (5,)))
    for labels in ("true", "exact"):
        again, whole = (estimate_fisher(model, [batch], labels) for model in models)
        assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"labels": "samples"}, "labels must be one of true, sampled.*did you mean sampled"),
        ({"grouping": "exmaple"}, "grouping must be one of.*did you mean example"),
        ({"task": "causal_lm"}, "task must be one of.*did you mean causal-lm"),
        ({"statistic": "median"}, "statistic must be one of mean, sum"),
        ({"datum": "tokens"}, "datum must be one of.*did you mean token"),
    ],
)
def test_an_unknown_name(arguments, words):
    """A misspelt choice is refused before anything runs, with the nearest one."""
    with pytest.raises(ConfigError, match=words):
        estimate_fisher(torch.nn.Linear(2, 1), [], **arguments)


class _Sum(nn.Module):
    """Linear map whose weight is a sum of two parameters, which get one tensor as their gradients."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Parameter(torch.rand(3, 5)), nn.Parameter(torch.rand(3, 5))

    def forward(self, x):
        return x @ (self.one + self.other).T


def test_parameters_with_one_gradient_are_squared_once_each():
    """The joint Fisher of both summands is the square of their common gradient."""
    torch.manual_seed(0)
    model, x, y = _Sum(), torch.randn(7, 5), torch.randn(7, 3)
    fisher = estimate_fisher(model, [(x, y)], grouping="batch", task="regression", statistic="sum")
    gradient = (model(x).detach() - y).T @ x
    for name in ("one", "other"):
        torch.testing.assert_close(fisher[name], gradient.square())


def test_offloaded_weights_are_refused():
    """A device map that leaves layers on the host or the disk has parameters without values."""
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2, device="meta"))
    with pytest.raises(UnsupportedStateError, match="in memory, but some are on the meta device"):
        estimate_fisher(model, [(torch.ones(2, 5), torch.zeros(2, 2))], task="regression")
