"""Pruning of live models: masks of torch, several rounds, shared parameters, and refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from squisher_mergekit.applications.pruning.modules import choose_weights, prune
from squisher_mergekit.applications.pruning.recipe import schedule
from squisher_mergekit.errors import ConfigError, MismatchError, UnsupportedStateError
from squisher_mergekit.training.masked import MaskedTraining
from tests.applications.pruning.pruned import slow_masks, stored


def _network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(45, 7), nn.Linear(7, 3)
    )


def _fisher(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) ** 6 for name, p in model.named_parameters()}


def _effective(model):
    return {
        name: getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        for name in ("0.weight", "4.weight")
    }


def test_torchs_own_tools_work_on_the_masks():
    """The functions of torch recognise the masks and make them permanent.

    The parameters of the optimizer stay the same objects.
    """
    model = _network()
    parameters, before = list(model.parameters()), copy.deepcopy(model)
    report = prune(model, _fisher(model), 0.75)
    assert torch_prune.is_pruned(model)
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    assert set(dict(model.named_buffers())) >= {"0.weight_mask", "4.weight_mask"}
    for name in ("0", "4"):
        module = model.get_submodule(name)
        assert torch.equal(module.weight, before.get_submodule(name).weight * report.mask[f"{name}.weight"])
        torch_prune.remove(module, "weight")
        assert torch.equal(module.weight == 0, ~report.mask[f"{name}.weight"])
    assert not torch_prune.is_pruned(model)
    assert torch.equal(model[5].weight, before[5].weight)
    assert report.ignored == {
        "0.bias": "bias",
        "1.weight": "norm",
        "1.bias": "bias",
        "4.bias": "bias",
        "5.weight": "output",
        "5.bias": "bias",
    }


def test_the_forward_pass_is_that_of_zeroed_weights():
    """The forward pass is that of zeroed weights, and only kept weights have gradients."""
    model = _network().eval()
    report = prune(model, _fisher(model), 0.5)
    zeroed = _network().eval()
    for name in ("0.weight", "4.weight"):
        zeroed.get_parameter(name).data.mul_(report.mask[name])
    inputs = torch.randn(4, 2, 5, 5)
    assert torch.equal(model(inputs), zeroed(inputs))
    model(inputs).square().sum().backward()
    assert not model[0].weight_orig.grad[~report.mask["0.weight"]].any()


def test_rounds_continue_from_pruned_weights():
    """Pruned weights stay pruned and count in every round, also with random scores.

    Each round is exact after further training.
    """
    for score in ("fisher", "random"):
        model = _network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=0.1)
        gone = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in _effective(model).items()}
        for number, sparsity in enumerate(schedule(0.8, 3)):
            report = prune(model, _fisher(_network(), number), sparsity, score=score, seed=number)
            entries = 90 + 315
            assert sum(int((tensor == 0).sum()) for tensor in _effective(model).values()) == round(sparsity * entries)
            for name, tensor in _effective(model).items():
                assert not tensor[gone[name]].any()
                assert torch.equal(tensor != 0, report.mask[name])
                gone[name] = tensor == 0
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(8, 2, 5, 5)).square().sum().backward()
                optimizer.step()
                assert all(not tensor[gone[name]].any() for name, tensor in _effective(model).items())
        with pytest.raises(ConfigError, match="would come back"):
            prune(model, _fisher(_network()), 0.3)
        assert torch_prune.is_pruned(model)


def test_a_refused_round_leaves_the_masks():
    """A refused round changes neither parameters nor masks nor the order of hooks."""
    model = _network()
    prune(model, _fisher(model), 0.5)
    names, state = [name for name, _ in model.named_parameters()], copy.deepcopy(model.state_dict())
    with pytest.raises(MismatchError, match=r"lacks 4\.weight"):
        prune(model, {"0.weight": torch.ones(5, 2, 3, 3)}, 0.6)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    inputs = torch.randn(2, 2, 5, 5)
    model(inputs).sum().backward()


def test_a_shared_parameter_is_masked_in_every_module():
    """Tied weights are counted once, stay tied, and train as one."""
    model = nn.ModuleDict({"a": nn.Linear(5, 5), "b": nn.Linear(5, 5), "end": nn.Linear(5, 2)})
    model["b"].weight = model["a"].weight
    fisher = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    report = prune(model, fisher, 0.6)
    assert [layer.name for layer in report.layers] == ["a.weight"]
    assert model["a"].weight_orig is model["b"].weight_orig
    assert torch.equal(model["a"].weight, model["b"].weight)
    assert int((model["b"].weight == 0).sum()) == 15
    prune(model, fisher, 0.8)
    for key in "ab":
        assert int((model[key].weight == 0).sum()) == 20
        torch_prune.remove(model[key], "weight")
    assert model["a"].weight is model["b"].weight


def test_packed_experts_are_masked_in_place(tmp_path):
    """The packed experts of Mixtral, one parameter in memory and many on disk, run with the masks of the many."""
    model, fisher = stored(tmp_path, "mixtral")
    dense = copy.deepcopy(model)
    report = prune(model, fisher, 0.5, ignore=("self_attn", "gate.weight"))
    assert len(report.layers) == 2 * 3 * 3
    ids = torch.arange(3, 14)[None]
    experts = dense.model.layers[0].mlp.experts
    held = report.mask.by_parameter(dense)
    for name, parameter in dense.named_parameters():
        parameter.data.mul_(held[name])
    assert experts.down_proj.ndim == 3
    assert torch.equal(model(ids).logits, dense(ids).logits)
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, experts.down_proj)


def test_a_mapping_is_as_good_as_a_fisher():
    """A mapping by names in memory gives the masks of a slow sort."""
    model = _network(1)
    fisher = _fisher(model, 1)
    report = choose_weights(model, fisher, 0.7)
    scores = {
        name: model.get_parameter(name).detach().double() ** 2 * fisher[name] / 2 for name in ("0.weight", "4.weight")
    }
    for name, mask in slow_masks(scores, 405 - round(405 * 0.7), 0.1).items():
        assert torch.equal(report.mask[name], mask)
    assert not torch_prune.is_pruned(model)


def test_the_squared_mean_takes_a_gradient():
    """The score (theta g)^2 uses the gradient of a batch, and is refused without one."""
    model = _network()
    inputs = torch.randn(6, 2, 5, 5)
    gradients = torch.autograd.grad(model(inputs).square().mean(), list(model.parameters()))
    gradient = dict(zip(dict(model.named_parameters()), gradients, strict=True))
    report = choose_weights(model, None, 0.5, score="taylor_squared", normalize="none", min_keep=0, gradient=gradient)
    scores = {
        name: (model.get_parameter(name).detach().double() * gradient[name]) ** 2 for name in ("0.weight", "4.weight")
    }
    for name, mask in slow_masks(scores, 405 - round(405 * 0.5)).items():
        assert torch.equal(report.mask[name], mask)
    with pytest.raises(ConfigError, match="needs gradient=, a mean gradient"):
        choose_weights(model, None, 0.5, score="taylor_squared")


def test_wrapped_models_are_looked_through():
    """DataParallel and torch.compile do not change the names."""
    model, plain = _network(), _network()
    report = prune(nn.DataParallel(torch.compile(model, backend="eager")), _fisher(plain), 0.5)
    assert [layer.name for layer in report.layers] == ["0.weight", "4.weight"]
    assert torch_prune.is_pruned(model)


def test_weights_that_are_read_without_their_module_are_refused():
    """Attention reads its output projection itself, so a mask on it would have no effect.

    It is refused unless ignored.
    """
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2), "a": nn.Linear(6, 6), "end": nn.Linear(6, 2)})
    fisher = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    with pytest.raises(UnsupportedStateError, match=r"attention\.out_proj\.weight is read without that"):
        prune(model, fisher, 0.5)
    assert not torch_prune.is_pruned(model)
    report = prune(model, fisher, 0.5, ignore=("out_proj",))
    assert [layer.name for layer in report.layers] == ["a.weight", "attention.in_proj_weight"]


@pytest.mark.parametrize(
    ("fisher", "message"),
    [
        (None, "score fisher needs a Fisher"),
        ({"9.weight": torch.ones(2)}, "9.weight in memory is none of Sequential's"),
        ({"0.weight": torch.ones(2)}, r"must have the weight's shape \[5, 2, 3, 3\]"),
        ({"0.weight": torch.ones(5, 2, 3, 3)}, "lacks 4.weight"),
    ],
)
def test_a_foreign_fisher_is_refused(fisher, message):
    """A foreign Fisher is refused in one line, and the model stays unchanged."""
    model = _network()
    with pytest.raises((MismatchError, ConfigError), match=message) as error:
        prune(model, fisher, 0.5)
    assert "\n" not in str(error.value)
    assert not torch_prune.is_pruned(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=0.001, momentum=0.9, weight_decay=0.1),
    ],
    ids=["adamw", "sgd"],
)
@pytest.mark.parametrize("by_torch", [True, False])
def test_pruned_weights_stay_zero_in_training(make, by_torch):
    """Pruned weights stay 0 bit for bit under decay and old momenta, with masks of torch and with MaskedTraining."""
    model = _network()
    optimizer = make(model.parameters())
    _train(model, optimizer, 3)
    fisher = _fisher(model)
    if by_torch:
        report = prune(model, fisher, 0.75)
        _train(model, optimizer, 20)
    else:
        report = choose_weights(model, fisher, 0.75)
        for name in ("0.weight", "4.weight"):
            model.get_parameter(name).data.mul_(report.mask[name])
        with MaskedTraining(model, optimizer, report.mask):
            _train(model, optimizer, 20)
    for name, tensor in _effective(model).items():
        assert torch.equal(tensor != 0, report.mask[name])


def _train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 2, 5, 5)).square().mean().backward()
        optimizer.step()


def test_the_old_name_of_the_smallest_share_works_for_one_version():
    """``least`` still works as ``min_keep``, with one warning at the line of the caller."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.warns(DeprecationWarning, match="least is deprecated; use min_keep") as caught:
        report = prune(model, sparsity=0.5, score="random", least=0.125)
    assert report.recipe.min_keep == 0.125
    assert [warning.filename for warning in caught] == [__file__]
