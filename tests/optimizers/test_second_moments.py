"""Second moment in each optimizer's state, compared with float64 after real steps."""

from pathlib import Path

import pytest
import torch

from squisher_mergekit.errors import CorruptFileError, UnsupportedStateError
from squisher_mergekit.optimizers.checkpoints.torch_save import content
from squisher_mergekit.optimizers.second_moments import moment_of
from squisher_mergekit.optimizers.slots import parse

FILE = Path("optimizer.pt")
STEPS, SHAPE = 3, (5, 7)


def _gradients():
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(SHAPE, generator=generator) for _ in range(STEPS)]


def _stepped(make):
    """Return the state_dict of an optimizer after three steps on one matrix with known gradients."""
    parameter = torch.nn.Parameter(torch.ones(SHAPE))
    optimizer = make([parameter])
    for gradient in _gradients():
        parameter.grad = gradient.clone()
        optimizer.step()
    return optimizer.state_dict()


def _ema(decay):
    value = torch.zeros(SHAPE, dtype=torch.float64)
    for gradient in _gradients():
        value = decay * value + (1 - decay) * gradient.double() ** 2
    return value


def _sum(start):
    return start + sum(gradient.double() ** 2 for gradient in _gradients())


# name -> (optimizer, key, statistic, decay, class, decoupled, amsgrad, start)
KEPT = {
    "Adam": (
        lambda p: torch.optim.Adam(p, betas=(0.9, 0.97)),
        ("exp_avg_sq", "ema", 0.97, "torch.optim.Adam", False, False, 0.0),
    ),
    "AdamW": (
        lambda p: torch.optim.AdamW(p, betas=(0.8, 0.95)),
        ("exp_avg_sq", "ema", 0.95, "torch.optim.AdamW", True, False, 0.0),
    ),
    "AdamW fused": (
        lambda p: torch.optim.AdamW(p, fused=True),
        ("exp_avg_sq", "ema", 0.999, "torch.optim.AdamW", True, False, 0.0),
    ),
    "AMSGrad": (
        lambda p: torch.optim.AdamW(p, betas=(0.9, 0.5), amsgrad=True),
        ("exp_avg_sq", "ema", 0.5, "torch.optim.AdamW", True, True, 0.0),
    ),
    "NAdam": (
        lambda p: torch.optim.NAdam(p, betas=(0.9, 0.98)),
        ("exp_avg_sq", "ema", 0.98, "torch.optim.NAdam", False, None, 0.0),
    ),
    "RAdam": (
        lambda p: torch.optim.RAdam(p, betas=(0.9, 0.96)),
        ("exp_avg_sq", "ema", 0.96, "torch.optim.RAdam", False, None, 0.0),
    ),
    "RMSprop": (
        lambda p: torch.optim.RMSprop(p, alpha=0.93, momentum=0.5),
        ("square_avg", "ema", 0.93, "torch.optim.RMSprop", False, None, 0.0),
    ),
    "RMSprop centered": (
        lambda p: torch.optim.RMSprop(p, alpha=0.93, centered=True),
        ("square_avg", "ema", 0.93, "torch.optim.RMSprop", False, None, 0.0),
    ),
    "Adadelta": (
        lambda p: torch.optim.Adadelta(p, rho=0.91),
        ("square_avg", "ema", 0.91, "torch.optim.Adadelta", False, None, 0.0),
    ),
    "Adagrad": (
        lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.25),
        ("sum", "sum", None, "torch.optim.Adagrad", False, None, 0.25),
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_the_second_moment_and_its_kind(name):
    """Key, statistic, decay, class, kind of weight decay, amsgrad and start are those of the optimizer."""
    make, expected = KEPT[name]
    (slot,) = parse(content(_stepped(make), FILE)).slots
    moment = slot.moment
    assert (
        moment.key,
        moment.statistic,
        moment.decay,
        moment.class_,
        moment.decoupled,
        moment.amsgrad,
        moment.start,
    ) == expected
    assert slot.steps == STEPS
    assert slot.name is None
    assert not moment.coupled_decay


@pytest.mark.parametrize("name", KEPT)
def test_the_tensor_is_the_mean_square_of_the_gradients(name):
    """The tensor equals the recurrence v = b v + (1-b) g^2, or the sum, of the gradients in float64."""
    make, _ = KEPT[name]
    (slot,) = parse(content(_stepped(make), FILE)).slots
    moment = slot.moment
    expected = _sum(moment.start) if moment.statistic == "sum" else _ema(moment.decay)
    torch.testing.assert_close(slot.tensor.double(), expected, rtol=1e-5, atol=0)


def test_one_moment_of_bitsandbytes_is_refused():
    """state1 alone is refused, because it can be Lion's momentum or RMSprop's mean square."""
    inner = {"state1": torch.zeros(17, 31, dtype=torch.uint8), "qmap1": torch.rand(256), "absmax1": torch.rand(3)}
    state = {0: {"step": 3, "__bnb_optimizer_quant_state__": inner}}
    with pytest.raises(UnsupportedStateError, match="can be Lion's or SGD's momentum"):
        parse(content({"state": state, "param_groups": [{**_BETAS, "params": [0]}]}, FILE))


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_squared_weight_decay_is_marked(make):
    """Weight decay that is added to the gradient, and so squared, is marked."""
    (slot,) = parse(content(_stepped(lambda p: make(p, weight_decay=0.1)), FILE)).slots
    assert slot.moment.coupled_decay
    (slot,) = parse(content(_stepped(lambda p: torch.optim.AdamW(p, weight_decay=0.1)), FILE)).slots
    assert not slot.moment.coupled_decay


def test_groups_may_differ_in_decay():
    """Each slot has the decay of its own group."""
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [first], "betas": (0.9, 0.9)}, {"params": [second]}], betas=(0.9, 0.99))
    first.grad = second.grad = torch.ones(3)
    optimizer.step()
    assert [slot.moment.decay for slot in parse(content(optimizer.state_dict(), FILE)).slots] == [0.9, 0.99]


def test_a_parameter_never_stepped_has_no_moment():
    """A parameter without a gradient keeps its slot, without a tensor."""
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([unused, used])
    used.grad = torch.ones(3)
    optimizer.step()
    slots = list(parse(content(optimizer.state_dict(), FILE)).slots)
    assert [(slot.index, slot.moment is None, slot.tensor is None) for slot in slots] == [
        (0, True, True),
        (1, False, False),
    ]


class Lion(torch.optim.Optimizer):
    """Optimizer by the sign of a blend of momentum and gradient, whose state is the momentum."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.sub_(group["lr"] * momentum.lerp(parameter.grad, 0.1).sign())
                momentum.lerp_(parameter.grad, 0.01)


REFUSED = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "SGD keeps none"),
    "Muon": (lambda p: torch.optim.Muon(p), "Muon keeps none"),
    "Lion": (Lion, "Lion keeps momentum alone"),
    "Adamax": (lambda p: torch.optim.Adamax(p), "Adamax keeps a running maximum"),
    "Rprop": (lambda p: torch.optim.Rprop(p), "the keys prev, step, step_size"),
    "ASGD": (lambda p: torch.optim.ASGD(p), "which are of no optimizer known here"),
    "SGD without momentum": (lambda p: torch.optim.SGD(p, lr=0.1), "plain SGD keeps nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_second_moment_is_refused_by_name(name):
    """An optimizer without a second moment is refused by name, with the place and the cure."""
    make, words = REFUSED[name]
    with pytest.raises(UnsupportedStateError) as caught:
        parse(content(_stepped(make), FILE))
    message = str(caught.value)
    assert words in message
    assert "optimizer.pt" in message
    assert "AdamW" in message
    assert "\n" not in message


def test_unknown_keys_next_to_a_known_name_are_refused():
    """A tensor called exp_avg_sq next to keys of no known Adam is refused, because its meaning is unknown."""
    state = _stepped(lambda p: torch.optim.AdamW(p))
    state["state"][0]["rotation"] = torch.eye(5)
    with pytest.raises(UnsupportedStateError, match=r"rotation.*no optimizer known here"):
        parse(content(state, FILE))


_V = torch.rand(SHAPE)
_M = torch.rand(SHAPE)
_BETAS = {"betas": (0.9, 0.97)}
# State keys of further optimizers, by the source of the named version: state, group -> class, corrected, steps
RELATIVES = {
    "pytorch_optimizer 4.1 AdEMAMix": (
        {"exp_avg": _M, "exp_avg_sq": _V, "exp_avg_slow": _M},
        {"betas": (0.9, 0.97, 0.9999), "alpha": 5.0, "step": 3},
        ("AdEMAMix", False, 3),
    ),
    "torch_optimizer 0.3 Lamb": (
        {"step": 3, "exp_avg": _M, "exp_avg_sq": _V, "weight_norm": _M[0, 0], "adam_norm": 1.0, "trust_ratio": 1.0},
        _BETAS,
        ("LAMB", False, 3),
    ),
    "timm 1.0 Lamb": (
        {"exp_avg": _M, "exp_avg_sq": _V},
        {**_BETAS, "trust_clip": False, "always_adapt": False, "step": 3},
        ("LAMB", False, 3),
    ),
    "torch_optimizer 0.3 AdamP": (
        {"step": 3, "exp_avg": _M, "exp_avg_sq": _V},
        {**_BETAS, "delta": 0.1, "wd_ratio": 0.1, "nesterov": False},
        ("AdamP", False, 3),
    ),
    "qhoptim 1.1 QHAdam": (
        {"beta1_weight": 2.7, "beta2_weight": 2.9, "exp_avg": _M, "exp_avg_sq": _V},
        {**_BETAS, "nus": (0.7, 1.0)},
        ("QHAdam", True, None),
    ),
    "schedulefree 1.4.1 AdamWScheduleFree": (
        {"z": _M, "exp_avg_sq": _V},
        {**_BETAS, "k": 3, "train_mode": False, "weight_sum": 1.0, "r": 0.0},
        ("schedulefree.AdamWScheduleFree", False, 3),
    ),
    "torch-optimi 0.3.3 StableAdamW": (
        {"exp_avg": _M, "exp_avg_sq": _V, "eps_sq": _M[0, 0], "kahan_comp": None, "mean_square": _M[0, :1]},
        {"beta1": 0.9, "beta2": 0.97, "step": torch.tensor(3)},
        ("StableAdamW", True, 3),
    ),
    "torch-optimi 0.3.3 Adam": (
        {"exp_avg": _M, "exp_avg_sq": _V, "kahan_comp": None},
        {"beta1": 0.9, "beta2": 0.97, "step": torch.tensor(3)},
        (None, True, 3),
    ),
    "pytorch_optimizer 4.1 StableAdamW": (
        {"exp_avg": _M, "exp_avg_sq": _V, "kahan_comp": None},
        {**_BETAS, "step": 3, "kahan_sum": True, "weight_decouple": True},
        ("StableAdamW", True, 3),
    ),
    "bitsandbytes 0.50 AdEMAMix in 32 bits": (
        {"step": 3, "state1": torch.stack([_M, _M]), "state2": _V},
        {"betas": (0.9, 0.97, 0.9999), "alpha": 5.0},
        ("AdEMAMix", False, 3),
    ),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_of_adam_are_known_by_their_keys(name):
    """Class, decay, steps and bias correction follow from the keys of the state."""
    state, group, expected = RELATIVES[name]
    (slot,) = parse(content({"state": {0: state}, "param_groups": [{**group, "params": [0]}]}, FILE)).slots
    assert slot.tensor is _V
    assert slot.moment.decay == 0.97
    assert (slot.moment.class_, slot.moment.corrected, slot.steps) == expected


def test_weights_of_a_schedule_free_training_mode_are_warned_of():
    """The group of a schedule-free optimizer shows training mode, where the weights are not the final ones."""
    state, group, _ = RELATIVES["schedulefree 1.4.1 AdamWScheduleFree"]
    group = {**group, "train_mode": True, "params": [0]}
    (slot,) = parse(content({"state": {0: state}, "param_groups": [group]}, FILE)).slots
    assert "optimizer.eval()" in slot.moment.caution


def test_rows_that_sparse_adam_skipped_are_warned_of():
    """SparseAdam counts steps for all rows, but averages only the touched ones, so a warning is given."""
    embedding = torch.nn.Embedding(5, 7, sparse=True)
    optimizer = torch.optim.SparseAdam(embedding.parameters())
    embedding(torch.tensor([1, 3])).sum().backward()
    optimizer.step()
    (slot,) = parse(content(optimizer.state_dict(), FILE)).slots
    assert slot.moment.class_ == "torch.optim.SparseAdam"
    assert "rare ones are low" in slot.moment.caution
    assert (slot.tensor != 0).any(1).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("state", "group", "words"),
    [
        ({"exp_avg": _M, "exp_avg_sq": _V, "step": 3}, {**_BETAS, "clip_lambda": None}, "no optimizer known here"),
        ({"exp_avg": _M, "exp_avg_sq": _V, "step": 3}, {**_BETAS, "clip_exp": 0.333}, "no optimizer known here"),
        ({"exp_avg": _M, "exp_avg_sq": _V, "step": 3}, {**_BETAS, "decouple": False}, "no optimizer known here"),
        ({"exp_avg": _M, "exp_avg_var": _V, "step": 3}, _BETAS, "no optimizer known here"),
        ({"exp_avg": _M, "exp_avg_sq": _V, "projector": 0, "step": 3}, _BETAS, "GaLore"),
        ({}, {"lr": 1e-3}, "layer-wise"),
        ({}, {"lr": 1e-3, "clip_grad_norm": None, "eps": 1e-8}, "AdaLomo"),
    ],
    ids=["ADOPT", "ADOPT of timm", "ADOPT of its authors", "AdaBelief", "GaLore", "layer-wise dummy", "LOMO"],
)
def test_similar_and_empty_states_are_refused(state, group, words):
    """Accumulators with another start, another meaning, or values outside of the file are refused."""
    with pytest.raises(UnsupportedStateError, match=words):
        parse(content({"state": {0: state} if state else {}, "param_groups": [{**group, "params": [0]}]}, FILE))


@pytest.mark.parametrize("step", [float("nan"), 2.5, -1, torch.ones(2), "three", "3", True])
def test_a_step_that_is_no_count_is_refused(step):
    """A step that is no whole number is refused as damaged, because the bias correction depends on it."""
    state = {"exp_avg": _M, "exp_avg_sq": _V, "step": step}
    with pytest.raises(CorruptFileError, match="must be a whole number"):
        parse(content({"state": {0: state}, "param_groups": [{**_BETAS, "params": [0]}]}, FILE))


def test_betas_can_be_tensors():
    """Torch's Adam takes tensors as betas, and keeps them in its groups."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], betas=(torch.tensor(0.875), torch.tensor(0.9375)), foreach=False)
    parameter.grad = torch.ones(3)
    optimizer.step()
    state = optimizer.state_dict()
    moment = moment_of(state["state"][0], state["param_groups"][0], "optimizer.pt")
    assert (moment.key, moment.decay, moment.class_) == ("exp_avg_sq", 0.9375, "torch.optim.AdamW")
