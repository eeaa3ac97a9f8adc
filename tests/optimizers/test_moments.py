"""Which tensor of each optimizer's state is the second moment: every optimizer really steps, and is held to float64."""

from pathlib import Path

import pytest
import torch
import transformers

from squisher_mergekit.errors import CorruptFileError, UnsupportedStateError
from squisher_mergekit.optimizers.state import parse
from squisher_mergekit.optimizers.torch_file import content
from squisher_mergekit.optimizers.values import read

FILE = Path("optimizer.pt")
STEPS, SHAPE = 3, (5, 7)


def _gradients():
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(SHAPE, generator=generator) for _ in range(STEPS)]


def _stepped(make):
    """Return the state_dict of an optimizer that has made three steps on one matrix with known gradients."""
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
    """Key, statistic, decay, class, way of weight decay, amsgrad and start are those of the optimizer that stepped."""
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
    """The tensor found is the recurrence v = b v + (1-b) g^2 (or the sum) of the true gradients, in float64."""
    make, _ = KEPT[name]
    (slot,) = parse(content(_stepped(make), FILE)).slots
    moment = slot.moment
    expected = _sum(moment.start) if moment.statistic == "sum" else _ema(moment.decay)
    torch.testing.assert_close(slot.tensor.double(), expected, rtol=1e-5, atol=0)


ADAFACTORS = {
    "torch.optim.Adafactor": lambda p: torch.optim.Adafactor(p),
    "transformers.optimization.Adafactor": lambda p: transformers.Adafactor(p, lr=1e-3, relative_step=False),
}


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 5)])
@pytest.mark.parametrize("name", ADAFACTORS)
def test_adafactor_is_the_outer_product_of_its_means(name, shape):
    """Row and column means follow v = b_t v + (1 - b_t) g^2 with 1 - b_t = t^-0.8, and need no bias correction."""
    parameter = torch.nn.Parameter(torch.ones(shape))
    optimizer = ADAFACTORS[name]([parameter])
    generator = torch.Generator().manual_seed(3)
    mean = torch.zeros(shape, dtype=torch.float64)
    for step in range(1, 5):
        parameter.grad = torch.randn(shape, generator=generator)
        optimizer.step()
        mean += (parameter.grad.double() ** 2 - mean) * step**-0.8
    (slot,) = parse(content(optimizer.state_dict(), FILE)).slots
    if len(shape) > 1:
        rows, columns = mean.mean(-1), mean.mean(-2)
        mean = rows[..., None] * columns[..., None, :] / rows.mean(-1)[..., None, None]
    assert slot.tensor.shape == shape
    torch.testing.assert_close(read(slot.tensor).double(), mean, rtol=1e-5, atol=0)
    assert (slot.moment.class_, slot.moment.decay, slot.moment.corrected, slot.steps) == (name, None, True, 4)


def test_row_and_column_means_must_belong_together():
    """Means of different leading shapes are refused as damaged."""
    parameter = torch.nn.Parameter(torch.ones(5, 3))
    optimizer = torch.optim.Adafactor([parameter])
    parameter.grad = torch.ones(5, 3)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["col_var"] = torch.ones(2, 1, 3)
    with pytest.raises(CorruptFileError, match="must belong together"):
        parse(content(state, FILE))


def _bitsandbytes(wrapped, **changes):
    """State of a 17 x 31 parameter as bitsandbytes writes it, and its second moment entry by entry."""
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 256, (17, 31), generator=generator, dtype=torch.uint8)
    levels, scales = torch.rand(256, generator=generator), torch.rand(3, generator=generator)
    inner = {"state1": codes, "state2": codes, "qmap1": levels, "qmap2": levels, "absmax1": scales, "absmax2": scales}
    inner = {key: value for key, value in {**inner, **changes}.items() if value is not None}
    state = {"step": 3, "__bnb_optimizer_quant_state__": inner} if wrapped else {"step": 3, **inner}
    expected = [levels[int(code)] * scales[i // 256] for i, code in enumerate(codes.flatten())]
    groups = [{"params": [0], "betas": (0.9, 0.99)}]
    return {"state": {0: state}, "param_groups": groups}, torch.stack(expected).reshape(17, 31)


@pytest.mark.parametrize("wrapped", [False, True])
def test_eight_bits_are_levels_times_the_scale_of_their_block(wrapped):
    """Both generations of bitsandbytes' files give level times scale, the last block being short."""
    state, expected = _bitsandbytes(wrapped)
    (slot,) = parse(content(state, FILE)).slots
    assert torch.equal(read(slot.tensor), expected)
    assert (slot.tensor.shape, slot.moment.decay, slot.steps) == ((17, 31), 0.99, 3)


@pytest.mark.parametrize(
    "changes",
    [{"absmax2": torch.ones(2)}, {"qmap2": torch.ones(255)}, {"absmax2": None}, {"state2": torch.ones(17, 31)}],
)
def test_eight_bits_whose_parts_do_not_fit_are_refused(changes):
    """Too few scales, too few levels, none at all, or codes that are none."""
    state, _ = _bitsandbytes(True, **changes)
    with pytest.raises(CorruptFileError, match="do not belong together"):
        parse(content(state, FILE))


def test_one_moment_of_bitsandbytes_is_refused():
    """With state1 alone it can be Lion's momentum as well as RMSprop's mean square: no guess is made."""
    state, _ = _bitsandbytes(True, state2=None, qmap2=None, absmax2=None)
    with pytest.raises(UnsupportedStateError, match="can be Lion's or SGD's momentum"):
        parse(content(state, FILE))


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_weight_decay_that_was_squared_is_noticed(make):
    """Weight decay added to the gradient, not decoupled from it, is marked: it is in the square."""
    (slot,) = parse(content(_stepped(lambda p: make(p, weight_decay=0.1)), FILE)).slots
    assert slot.moment.coupled_decay
    (slot,) = parse(content(_stepped(lambda p: torch.optim.AdamW(p, weight_decay=0.1)), FILE)).slots
    assert not slot.moment.coupled_decay


def test_groups_may_differ_in_decay():
    """Each slot takes the decay of its own group."""
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [first], "betas": (0.9, 0.9)}, {"params": [second]}], betas=(0.9, 0.99))
    first.grad = second.grad = torch.ones(3)
    optimizer.step()
    assert [slot.moment.decay for slot in parse(content(optimizer.state_dict(), FILE)).slots] == [0.9, 0.99]


def test_a_parameter_never_stepped_has_no_moment():
    """A parameter without a gradient keeps its place among the slots, without a tensor."""
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
    """Sign of a blend of momentum and gradient; keeps the momentum alone."""

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
    """What keeps no second moment is refused, named where it can be, with the place and the cure."""
    make, words = REFUSED[name]
    with pytest.raises(UnsupportedStateError) as caught:
        parse(content(_stepped(make), FILE))
    message = str(caught.value)
    assert words in message
    assert "optimizer.pt" in message
    assert "AdamW" in message
    assert "\n" not in message


def test_unknown_keys_beside_a_known_name_are_refused():
    """A tensor called exp_avg_sq next to keys no known Adam has may mean anything, and is not taken."""
    state = _stepped(lambda p: torch.optim.AdamW(p))
    state["state"][0]["rotation"] = torch.eye(5)
    with pytest.raises(UnsupportedStateError, match=r"rotation.*no optimizer known here"):
        parse(content(state, FILE))
