"""Assignment of slots to parameters: made-up lists, every rule of the Trainer, and brute force."""

from itertools import combinations, product
from random import Random

import pytest
import torch
from torch import nn

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import MismatchError, NamingError
from squisher_mergekit.models.checkpoint_names import types_around
from squisher_mergekit.models.names import ParameterInfo
from squisher_mergekit.optimizers.assign_names import assign, divide


def _parameter(name, shape, *types):
    return ParameterInfo(name, shape, frozenset(types))


IN_LAYER_NORM = types_around("norm.weight", {"norm": nn.LayerNorm(3)})


# In the model's order. A comment names the rules that decay the parameter: until 4.48, 4.49 to 4.52, since 4.53.
MODEL = [
    _parameter("embed_tokens.weight", (53, 8), "Embedding"),  # all
    _parameter("layers.0.q_proj.weight", (8, 8), "Linear"),  # all
    _parameter("layers.0.q_proj.bias", (8,), "Linear"),  # none
    _parameter("layers.0.q_norm.weight", (2,), "Qwen3RMSNorm"),  # until 4.48, 4.49 to 4.52
    _parameter("layers.0.input_layernorm.weight", (8,), "Qwen2RMSNorm"),  # until 4.48
    _parameter("layers.0.ln_1.weight", (3,), *IN_LAYER_NORM),  # none
    _parameter("layers.0.ln_2.scale", (5,), "LlamaRMSNorm"),  # since 4.53
    _parameter("layers.0.conv_norm_2.weight", (7,), "Norm"),  # all rules: _norm is not at the end of a part
    _parameter("layers.0.RMSNorm_f.weight", (11,), "Other"),  # until 4.48; later rules compare names in lower case
    _parameter("norm.weight", (13,), "Qwen2RMSNorm"),  # until 4.48, 4.49 to 4.52
    _parameter("norms.weight", (17,), "Other"),  # all
    _parameter("lm_head.weight", (53, 8), "Linear"),  # all
]
ALWAYS = {"embed_tokens.weight", "layers.0.q_proj.weight", "layers.0.conv_norm_2.weight", "norms.weight",
          "lm_head.weight"}  # fmt: skip
DECAYED = {
    "until 4.48": ALWAYS
    | {"layers.0.q_norm.weight", "layers.0.input_layernorm.weight", "layers.0.RMSNorm_f.weight", "norm.weight"},
    "4.49 to 4.52": ALWAYS | {"layers.0.q_norm.weight", "norm.weight"},
    "since 4.53": ALWAYS | {"layers.0.ln_2.scale"},
}


def _split(parameters, decayed):
    return [[p for p in parameters if (p.name in decayed) is kind] for kind in (True, False)]


def _shapes(groups):
    return [[p.shape for p in group] for group in groups]


def _names(groups):
    return [[p.name for p in group] for group in groups]


@pytest.mark.parametrize("era", DECAYED)
def test_each_rule_of_the_trainer_is_found_from_the_shapes(era):
    """Two groups split by the rule of any era get the names of that era."""
    groups = _split(MODEL, DECAYED[era])
    assert assign(_shapes(groups), MODEL, None, "optimizer.pt") == _names(groups)


def test_one_group_is_in_the_models_order():
    """An optimizer made from model.parameters() numbers them in the order of the model."""
    assert assign(_shapes([MODEL]), MODEL, None, "optimizer.pt") == _names([MODEL])


@pytest.mark.parametrize("era", DECAYED)
def test_frozen_parameters_are_skipped_in_every_rule(era):
    """With frozen embeddings, the remaining slots still fit one way by their shapes."""
    frozen = {"embed_tokens.weight", "layers.0.q_norm.weight", "lm_head.weight", "layers.0.ln_1.weight"}
    groups = _split([p for p in MODEL if p.name not in frozen], DECAYED[era])
    trained = {name for group in _names(groups) for name in group}
    assert assign(_shapes(groups), MODEL, trained, "optimizer.pt") == _names(groups)


def test_two_rules_that_differ_are_refused():
    """Two rules that fit the shapes and name a tensor differently are refused."""
    parameters = [
        _parameter("a.weight", (3,), "Linear"),
        _parameter("norm.weight", (3,), "Other"),  # decayed until 4.52
        _parameter("b.weight", (3,), "LlamaRMSNorm"),  # decayed since 4.53
    ]
    with pytest.raises(NamingError, match=r"optimizer\.pt.* one way only.*4\.5"):
        assign([[(3,), (3,)], [(3,)]], parameters, None, "optimizer.pt")


def test_two_rules_that_agree_are_one():
    """Rules that split a model alike are not ambiguous."""
    parameters = [_parameter("a.weight", (3, 3), "Linear"), _parameter("a.bias", (3,), "Linear")]
    assert assign([[(3, 3)], [(3,)]], parameters, None, "f") == [["a.weight"], ["a.bias"]]


EQUAL = [_parameter(name, (3, 3), "Linear") for name in ("a.weight", "b.weight", "c.weight")]


def test_frozen_layers_of_equal_shape_need_the_base():
    """Two slots for three equal layers fit in three ways. The cure is the base model, or names."""
    with pytest.raises(NamingError, match=r"optimizer\.pt.* one way only.*--base DIR.*--names FILE"):
        assign([[(3, 3), (3, 3)]], EQUAL, None, "optimizer.pt")


@pytest.mark.parametrize("trained", list(combinations(["a.weight", "b.weight", "c.weight"], 2)))
def test_changes_since_the_base_identify_trained_layers(trained):
    """Two of three equal layers that changed since the base are the trained ones."""
    assert assign([[(3, 3), (3, 3)]], EQUAL, set(trained), "optimizer.pt") == [list(trained)]


def test_a_base_that_tells_too_little_is_refused_without_asking_for_it_again():
    """A base with one known change for two trained layers is refused with --names as the only cure."""
    with pytest.raises(NamingError) as caught:
        assign([[(3, 3), (3, 3)]], EQUAL, {"b.weight"}, "optimizer.pt")
    assert "one way only" in str(caught.value)
    assert "--names FILE" in str(caught.value)
    assert "--base" not in str(caught.value)


def test_a_base_that_contradicts_the_state_is_refused():
    """A base from which more layers changed than the optimizer holds is refused."""
    with pytest.raises(NamingError):
        assign([[(3, 3)]], EQUAL, {"a.weight", "b.weight"}, "optimizer.pt")


@pytest.mark.parametrize(
    "slots",
    [
        [[(3, 3)] * 4],
        [[(3, 3), (3, 3), (3, 5)]],
        [[(3, 5)]],
        [[(9,), (3, 3), (3, 3)]],
        [[(3, 3)], [(3, 3)], [(3, 3)]],
        [[(3, 3)] * 3, [(3,)]],
    ],
)
def test_a_mismatch_is_refused(slots):
    """Too many slots, a foreign or flattened shape, and an unknown number of groups are refused with place and cure."""
    with pytest.raises((NamingError, MismatchError), match=r"optimizer\.pt.*--"):
        assign(slots, EQUAL, None, "optimizer.pt")


def test_transposed_shapes_are_not_taken():
    """A transposed shape is refused although the number of entries is equal."""
    with pytest.raises((NamingError, MismatchError)):
        assign([[(5, 3)]], [_parameter("a.weight", (3, 5), "Linear")], None, "optimizer.pt")


def test_a_slot_never_stepped_leaves_the_others_their_names():
    """A slot without a tensor takes a place in the order, and slots with one are named by their shapes."""
    parameters = [_parameter(f"{n}.weight", (n,), "Linear") for n in (2, 3, 5)]
    assert assign([[(2,), None, (5,)]], parameters, None, "f") == [["2.weight", "3.weight", "5.weight"]]


@pytest.mark.parametrize("seed", range(60))
def test_every_way_tried_by_hand_agrees(seed):
    """The assignment of random lists of few shapes succeeds exactly if brute force finds one choice in order."""
    random = Random(seed)
    outcomes = set()
    for _ in range(40):
        count = random.randint(1, 7)
        parameters = [_parameter(f"p{i}", (random.choice([2, 3, 5]),), "Linear") for i in range(count)]
        trained = sorted(random.sample(range(count), random.randint(1, count)))
        changed = {f"p{i}" for i in trained if random.random() < 0.6} if random.random() < 0.6 else None
        shapes = [parameters[i].shape for i in trained]
        if random.random() < 0.1:
            shapes[random.randrange(len(shapes))] = (7,)
        ways = [
            [parameters[i].name for i in some]
            for some in combinations(range(count), len(trained))
            if [parameters[i].shape for i in some] == shapes
            and (changed or set()) <= {parameters[i].name for i in some}
        ]
        if len(ways) == 1:
            assert assign([shapes], parameters, changed, "f") == [ways[0]]
        else:
            with pytest.raises((NamingError, MismatchError)):
                assign([shapes], parameters, changed, "f")
        outcomes.add(min(len(ways), 2))
    assert outcomes == {0, 1, 2}


@pytest.mark.parametrize("seed", range(40))
def test_slots_never_stepped_are_named_only_if_one_name_fits(seed):
    """Brute force confirms that a stepped slot with two possible names is refused.

    A slot never stepped has the name None.
    """
    random = Random(seed)
    outcomes = set()
    for _ in range(60):
        count = random.randint(2, 6)
        parameters = [_parameter(f"p{i}", (random.choice([2, 3, 5, 7]),), "Linear") for i in range(count)]
        held = sorted(random.sample(range(count), random.randint(1, count)))
        shapes = [parameters[i].shape if random.random() < 0.6 else None for i in held]
        changed = {parameters[i].name for i, shape in zip(held, shapes, strict=True) if shape and random.random() < 0.3}
        ways = [
            [parameters[i].name for i in some]
            for some in combinations(range(count), len(held))
            if all(
                parameters[i].name not in changed if shape is None else parameters[i].shape == shape
                for i, shape in zip(some, shapes, strict=True)
            )
            and changed <= {parameters[i].name for i in some}
        ]
        possible = [set(names) for names in zip(*ways, strict=True)]
        if any(shape is not None and len(names) > 1 for shape, names in zip(shapes, possible, strict=True)):
            outcomes.add("refused")
            with pytest.raises(NamingError, match="one way only"):
                assign([shapes], parameters, changed, "f")
            continue
        expected = [next(iter(names)) if len(names) == 1 else None for names in possible]
        outcomes.add("partly named" if None in expected else "named")
        assert assign([shapes], parameters, changed, "f") == [expected]
    assert outcomes == {"refused", "partly named", "named"}


def test_many_equal_layers_do_not_take_exponential_time():
    """400 equal layers with 200 trained ones are refused at once, and assigned at once with the base."""
    parameters = [_parameter(f"layers.{i}.weight", (3, 3), "Linear") for i in range(400)]
    slots = [[(3, 3)] * 200]
    with pytest.raises(NamingError):
        assign(slots, parameters, None, "f")
    trained = [p.name for p in parameters[::2]]
    assert assign(slots, parameters, set(trained), "f") == [trained]


def _all_ways(sequences, parameters, changed):
    """Yield every assignment by trying each choice for each parameter."""
    found = []
    for choice in product([None, *range(len(sequences))], repeat=len(parameters)):
        dealt = [
            [p for p, k in zip(parameters, choice, strict=True) if k == number] for number in range(len(sequences))
        ]
        skipped = {p.name for p, k in zip(parameters, choice, strict=True) if k is None}
        shapes = [[p.shape for p in some] for some in dealt]
        if shapes == sequences and not skipped & set(changed):
            found.append([[p.name for p in some] for some in dealt])
    return found


@pytest.mark.parametrize("seed", range(60))
def test_the_assignment_agrees_with_brute_force(seed):
    """The assignment succeeds exactly if one way fits, and equals that way."""
    chance = Random(seed)
    shapes = [(3, 5), (5,), (5, 5)]
    parameters = [ParameterInfo(f"p{i}", chance.choice(shapes)) for i in range(7)]
    owners = [chance.choice([0, 0, 1, 1, None]) for _ in parameters]
    sequences = [[p.shape for p, k in zip(parameters, owners, strict=True) if k == number] for number in (0, 1)]
    changed = {p.name for p, k in zip(parameters, owners, strict=True) if k is not None and chance.random() < 0.7}
    ways = _all_ways(sequences, parameters, changed)
    needed = [[True] * len(sequence) for sequence in sequences]
    assert ways
    if len(ways) == 1:
        assert divide(sequences, parameters, changed, needed, "file") == ways[0]
    else:
        with pytest.raises(NamingError, match="--names"):
            divide(sequences, parameters, changed, needed, "file")


def test_an_impossible_assignment_is_refused():
    """Parameters of another model are refused."""
    with pytest.raises(NamingError, match="do not fit"):
        divide([[(3,)], [(5,)]], [ParameterInfo("a", (3,)), ParameterInfo("b", (7,))], None, [[True], [True]], "file")


class _Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 5)
        self.up, self.norm, self.down = torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 5)

    def forward(self, x):
        return self.down(self.norm(self.up(self.embed(x))))


@pytest.mark.parametrize("form", ["list", "dict"])
def test_muon_with_adamw_is_a_partial_fisher(form, tmp_path):
    """Matrices trained by Muon are listed as missing with the reason. All others have AdamW's accumulator."""
    torch.manual_seed(3)
    net = _Net()
    matrices = [net.up.weight, net.down.weight]
    others = [p for p in net.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(others, lr=1e-3)]
    for _ in range(3):
        net(torch.randint(11, (13,))).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    states = [optimizer.state_dict() for optimizer in optimizers]
    bundle = {"list": {"model": net.state_dict(), "optimizers": states}}
    bundle["dict"] = {"model": net.state_dict(), "muon": states[0], "adamw": states[1]}
    torch.save(bundle[form], tmp_path / "last.pt")
    fisher = load_fisher(tmp_path)
    named = dict(net.named_parameters())
    assert set(fisher) == {name for name, p in named.items() if any(p is other for other in others)}
    for name in fisher:
        assert torch.equal(fisher[name], optimizers[1].state[named[name]]["exp_avg_sq"])
    assert set(fisher.config.coverage.without) == {"up.weight", "down.weight"}
    assert all("Muon" in why for why in fisher.config.coverage.without.values())
    assert fisher.config.optimizer.class_ == "torch.optim.AdamW"
