"""Content of files of torch.save, and contradictions in it."""

import copy
from pathlib import Path

import pytest
import torch

from squisher_mergekit.errors import CorruptFileError, UnsupportedStateError
from squisher_mergekit.optimizers.checkpoints.torch_save import content
from squisher_mergekit.optimizers.slots import parameters_of, parse, unwrapped

FILE = Path("optimizer.pt")


def _model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))


def _stepped(model, make=torch.optim.AdamW, parameters=None):
    optimizer = make(parameters or model.parameters())
    model(torch.randn(7, 3)).square().sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state, model: state,
        lambda state, model: {"model": model.state_dict(), "optimizer": state, "epoch": 3},
        lambda state, model: {"model_state_dict": model.state_dict(), "optimizer_state_dict": state},
        lambda state, model: {"optimizer_states": [state], "state_dict": model.state_dict()},
        lambda state, model: {"optimizers": {"main": state}},
        lambda state, model: [state],
    ],
)
def test_the_state_is_found_in_any_bundle(wrap):
    """A state_dict alone, in a dict, or in a list or dict within it, gives the same state."""
    model = _model()
    state = _stepped(model)
    found = parse(content(wrap(state, model), FILE))
    assert [slot.index for slot in found.slots] == list(range(6))
    assert all(slot.tensor is state["state"][slot.index]["exp_avg_sq"] for slot in found.slots)
    assert {slot.steps for slot in found.slots} == {1}


def test_a_saved_model_gives_the_order():
    """The parameters of a saved model come in its order, without buffers and second names of tied tensors."""
    model = _model()
    state = _stepped(model)
    model.register_module("tied", torch.nn.Linear(3, 5))
    model.tied.weight = model[0].weight
    found = parse(content({"weights": model.state_dict(), "optimizer": state}, FILE))
    assert found.raw.model is not None
    names = list(parameters_of(found.raw.model))
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "tied.bias"]


def test_the_model_with_the_usual_name_is_used():
    """The model with the usual name is used, not an average. Of two models with unusual names neither is used."""
    model, average = _model(), copy.deepcopy(_model())
    state = _stepped(model)
    found = parse(content({"ema": average.state_dict(), "model": model.state_dict(), "optimizer": state}, FILE))
    assert found.raw.model is not None
    assert found.raw.model["0.weight"] is not average.state_dict()["0.weight"]
    assert torch.equal(found.raw.model["0.weight"], model[0].weight)
    several = {"ema": average.state_dict(), "net": model.state_dict(), "optimizer": state}
    assert content(several, FILE).model is None


def test_states_of_random_generators_are_no_model():
    """A mapping of whole numbers is no model, alone or beside one of another name."""
    model = _model()
    bundle = {"optimizer": _stepped(model), "rng": {"cpu": torch.get_rng_state()}}
    assert content(bundle, FILE).model is None
    assert set(content(bundle | {"net": model.state_dict()}, FILE).model or ()) == set(model.state_dict())


@pytest.mark.parametrize(
    "name",
    [
        "module._orig_mod.layer.weight",
        "_orig_mod.module.layer.weight",
        "_orig_mod._fsdp_wrapped_module.layer._checkpoint_wrapped_module.weight",
        "module.module.layer.weight",
        "layer.weight",
    ],
)
def test_wrappers_leave_names_in_any_order(name):
    """Prefixes of DDP, compile, FSDP and checkpointing are removed from names."""
    assert unwrapped(name) == "layer.weight"


def test_a_part_of_a_model_may_be_called_module():
    """Only a leading ``module.`` is DDP's."""
    assert unwrapped("encoder.module.weight") == "encoder.module.weight"


def test_named_parameters_name_their_slots():
    """Slots have the names that torch wrote next to the numbers, without wrappers."""
    model = torch.nn.ModuleDict({"module": _model()})
    state = _stepped(model["module"], parameters=list(model.named_parameters()))
    found = parse(content(state, FILE))
    assert found.named
    assert [slot.name for slot in found.slots] == [name for name, _ in model["module"].named_parameters()]


def test_keys_that_are_names_name_their_slots():
    """A state keyed by name, as FSDP gathers it, needs no order."""
    model = _model()
    state = _stepped(model)
    names = [name for name, _ in model.named_parameters()]
    keyed = {
        "state": {names[i]: value for i, value in state["state"].items()},
        "param_groups": [state["param_groups"][0] | {"params": names}],
    }
    assert {slot.name: slot.tensor for slot in parse(content(keyed, FILE)).slots} == {
        names[i]: value["exp_avg_sq"] for i, value in state["state"].items()
    }


def test_the_step_may_stand_in_the_group():
    """The step count of Apex is in the group."""
    model = _model()
    state = _stepped(model)
    for value in state["state"].values():
        del value["step"]
    state["param_groups"][0]["step"] = 17
    assert {slot.steps for slot in parse(content(state, FILE)).slots} == {17}


def test_adagrad_before_its_first_step_is_empty():
    """Accumulators at step 0 carry no information and are refused."""
    with pytest.raises(UnsupportedStateError, match="its state is empty"):
        parse(content(torch.optim.Adagrad(_model().parameters()).state_dict(), FILE))


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.RMSprop])
def test_an_optimizer_that_never_stepped_is_refused(make):
    """A state saved before the first step is refused as empty."""
    with pytest.raises(UnsupportedStateError, match="its state is empty"):
        parse(content(make(_model().parameters()).state_dict(), FILE))


@pytest.mark.parametrize("loaded", [{}, [], 3, None, {"state": {}, "param_groups": 3}, {"a": torch.zeros(2)}])
def test_a_file_without_an_optimizer_is_refused(loaded):
    """A file without param_groups and state is refused."""
    with pytest.raises(UnsupportedStateError, match="must hold an optimizer's state_dict"):
        parse(content(loaded, FILE))


def test_two_optimizers_are_both_read():
    """All optimizers of a file are read separately."""
    state = _stepped(_model())
    found = parse(content({"optimizer": state, "other": state}, FILE))
    assert [len(groups) for groups in found.optimizers] == [1, 1]
    assert [slot.index for slot in found.slots] == 2 * [slot.index for slot in found.optimizers[0][0]]


def _twice(state):
    state["param_groups"][0]["params"][1] = 0


def _stray(state):
    state["state"][17] = state["state"][0]


def _short_names(state):
    state["param_groups"][0]["param_names"] = ["a"]


def _same_names(state):
    state["param_groups"][0]["param_names"] = ["a"] * 6


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_twice, "found 0 twice"),
        (_stray, "state of 17, which is in no group"),
        (_short_names, "one of param_names for each of its 6 parameters, found 1"),
        (_same_names, "its own name, found a twice"),
    ],
)
def test_contradictions_are_refused(damage, words):
    """Groups and state that contradict each other are refused."""
    state = _stepped(_model())
    damage(state)
    with pytest.raises(CorruptFileError, match=words):
        parse(content(state, FILE))


def test_two_kinds_of_second_moment_are_refused():
    """A sum and a moving average in one file are refused, because they have no common scale."""
    state, other = _stepped(_model()), _stepped(_model(), torch.optim.Adagrad)
    state["state"] = {0: state["state"][0], 1: other["state"][1]}
    state["param_groups"] = [
        state["param_groups"][0] | {"params": [0]},
        other["param_groups"][0] | {"params": [1]},
    ]
    with pytest.raises(UnsupportedStateError, match="must all be of one kind, found both ema and sum"):
        parse(content(state, FILE))


def test_adagrads_starts_must_agree():
    """Two different starts of a sum are refused, because one value is subtracted."""
    state = _stepped(_model(), torch.optim.Adagrad)
    first, second = state["param_groups"][0] | {"params": [0, 1]}, state["param_groups"][0] | {"params": [2, 3, 4, 5]}
    state["param_groups"] = [first, second | {"initial_accumulator_value": 0.1}]
    with pytest.raises(UnsupportedStateError, match=r"found both 0\.0 and 0\.1"):
        parse(content(state, FILE))


class _Codes(torch.Tensor):
    pass


@pytest.mark.parametrize("value", [torch.zeros(3, 5, dtype=torch.uint8), torch.zeros(3, 5).as_subclass(_Codes), 0.5])
def test_codes_are_refused_as_second_moments(value):
    """Integers, tensors of a library's own class and numbers are refused as second moments."""
    state = _stepped(_model())
    state["state"][0]["exp_avg_sq"] = value
    with pytest.raises(UnsupportedStateError, match=r"exp_avg_sq of parameter 0 .* must be a plain tensor of floats"):
        parse(content(state, FILE))


def test_a_name_that_ends_like_a_wrapper_is_kept():
    """Whole parts of a name alone are prefixes of wrappers."""
    assert unwrapped("module.my_orig_mod._orig_mod.weight") == "my_orig_mod.weight"
