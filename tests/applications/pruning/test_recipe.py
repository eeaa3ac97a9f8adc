"""Pruning of single weights: the plan, a slow reference, rounds, and refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squisher_mergekit.applications.pruning.recipe import PruningRecipe, plan_pruning, schedule
from squisher_mergekit.applications.selection import ScoreInputs, select_masks
from squisher_mergekit.errors import ConfigError, ValuesError
from tests.applications.pruning.pruned import slow_masks

SHAPES = {"a.weight": (7, 11), "b.weight": (13, 5), "b.bias": (13,)}


def _tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    fisher = {
        name: torch.rand(shape, generator=generator) ** 8 * 10.0 ** (-3 * row)
        for row, (name, shape) in enumerate(SHAPES.items())
    }
    return weights, fisher


def _found(weights, beside, recipe, scale=lambda name: (0.0, 1.0)):
    plan = plan_pruning(recipe, SHAPES, {"b.bias": "bias"})
    read = beside.__getitem__
    return dict(select_masks(plan, ScoreInputs(weights.__getitem__, fisher=read, gradient=read, scale=scale)))


@given(seed=st.integers(0, 99), sparsity=st.floats(0, 0.9), layer=st.booleans(), min_keep=st.sampled_from([0.0, 0.05]))
def test_the_lowest_scores_of_all_tensors_go(seed, sparsity, layer, min_keep):
    """The lowest scores theta^2 F / 2, raw or divided by the mean of their tensor, are pruned. The count is exact."""
    weights, fisher = _tensors(seed)
    recipe = PruningRecipe(sparsity, normalize="layer" if layer else "none", min_keep=min_keep)
    scores = {}
    for name in ("a.weight", "b.weight"):
        score = weights[name].double() ** 2 * fisher[name].double() / 2
        scores[name] = score / score.mean() if layer else score
    keep = 142 - round(142 * sparsity)
    wanted, found = slow_masks(scores, keep, min_keep), _found(weights, fisher, recipe)
    assert set(found) == {"a.weight", "b.weight"}
    for name, mask in wanted.items():
        assert torch.equal(found[name], mask)


def test_magnitude_and_the_squared_mean_follow_their_formulas():
    """Magnitude is |theta|, and the squared mean is (theta g)^2, which ignores the sign of g. Neither reads F."""
    weights, gradient = _tensors(1)
    gradient["a.weight"][::2] *= -1
    names = ("a.weight", "b.weight")
    squares = {name: (weights[name].double() * gradient[name].double()) ** 2 for name in names}
    sizes = {name: weights[name].double().abs() for name in names}
    for score, wanted in (("taylor_squared", squares), ("magnitude", sizes)):
        found = _found(weights, gradient, PruningRecipe(0.6, score, normalize="none", min_keep=0))
        for name, mask in slow_masks(wanted, 57).items():
            assert torch.equal(found[name], mask)


def test_a_global_ranking_empties_a_layer_and_the_defaults_do_not():
    """A global ranking by theta^2 F empties a layer with small F.

    The defaults keep a third of the global share there.
    """
    weights, fisher = _tensors(2)
    assert not _found(weights, fisher, PruningRecipe(0.9, min_keep=0))["b.weight"].any()
    assert int(_found(weights, fisher, PruningRecipe(0.9, min_keep=0.05))["b.weight"].sum()) == 4
    assert int(_found(weights, fisher, PruningRecipe(0.9))["b.weight"].sum()) == 3  # of 65 entries: 0.1 / 3
    assert int(_found(weights, fisher, PruningRecipe(0.9, normalize="layer", min_keep=0))["b.weight"].sum()) > 4


def test_a_layer_without_fisher_keeps_its_floor():
    """A layer with F = 0 keeps its floor under every way of scaling."""
    weights, fisher = _tensors(3)
    fisher["b.weight"].zero_()
    for normalize in ("none", "layer"):
        assert int(_found(weights, fisher, PruningRecipe(0.7, normalize=normalize))["b.weight"].sum()) == 7


def test_the_same_share_of_each_layer_goes():
    """With the scope layer, a third of the 77 and of the 65 entries stays, to the entry."""
    found = _found(*_tensors(4), PruningRecipe(2 / 3, scope="layer", min_keep=0))
    counts = [int(mask.sum()) for mask in found.values()]
    assert sum(counts) == 142 - round(142 * 2 / 3)
    assert counts in ([25, 22], [26, 21])


def test_weights_that_are_zero_go_first():
    """Weights that are 0 stay pruned, whatever the draw or F; all others are drawn from."""
    weights, fisher = _tensors(5)
    weights["a.weight"][:, ::2] = 0
    found = _found(weights, fisher, PruningRecipe(0.4, "random"))
    assert not found["a.weight"][:, ::2].any()
    assert sum(int(mask.sum()) for mask in found.values()) == 142 - 57


def test_random_depends_on_seed_and_name_alone():
    """The random mask depends on the seed and not on F."""
    weights, fisher = _tensors(6)
    first, same, other = (
        _found(weights, beside, PruningRecipe(0.5, "random", seed=seed))["a.weight"]
        for beside, seed in ((fisher, 1), (weights, 1), (fisher, 2))
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_scale_of_a_fisher_counts_where_nothing_is_normalized():
    """Without normalisation, offset and factor of each tensor apply before tensors are compared."""
    weights, fisher = _tensors(7)
    scale = {"a.weight": (0.0, 1.0), "b.weight": (0.25, 4000.0)}
    raised = {"a.weight": fisher["a.weight"], "b.weight": fisher["b.weight"] + 0.25}
    found = _found(weights, raised, PruningRecipe(0.5, normalize="none", min_keep=0), scale.__getitem__)
    scores = {
        name: weights[name].double() ** 2 * (raised[name].double() - scale[name][0]) * scale[name][1] for name in found
    }
    for name, mask in slow_masks(scores, 71).items():
        assert torch.equal(found[name], mask)


def test_a_pattern_takes_the_place_of_a_sparsity():
    """A pattern keeps the two highest scores of four neighbours along the given axis."""
    shapes = {"w": (8, 3)}
    generator = torch.Generator().manual_seed(0)
    weight, fisher = (torch.rand(8, 3, generator=generator) for _ in range(2))
    plan = plan_pruning(PruningRecipe(pattern=(2, 4)), shapes, {}, {"w": 0})
    ((_, mask),) = select_masks(plan, ScoreInputs({"w": weight}.get, {"w": fisher}.get))
    scores = weight**2 * fisher
    for column in range(3):
        for start in (0, 4):
            part = scores[start : start + 4, column]
            assert torch.equal(mask[start : start + 4, column], part >= part.sort().values[2])


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("harmonic", [1 / 2, 2 / 3, 3 / 4]), ("geometric", [0.3700395, 0.6031497, 0.75]), ("linear", [0.25, 0.5, 0.75])],
)
def test_rounds_reach_the_sparsity(kind, wanted):
    """Three rounds reach 75 % by hand-computed steps. The last round equals a single pruning, bit for bit."""
    found = schedule(0.75, 3, kind)
    assert found == pytest.approx(wanted, abs=1e-7)
    assert found[-1] == 0.75


@given(sparsity=st.floats(0, 0.99), rounds=st.integers(1, 9))
def test_harmonic_rounds_remove_the_originals_share_of_the_rest(sparsity, rounds):
    """Round i of the harmonic schedule removes p / (i p + n (1 - p)) of the rest."""
    left = 1.0
    for i, total in enumerate(schedule(sparsity, rounds), 1):
        left *= 1 - sparsity / (i * sparsity + rounds * (1 - sparsity))
        assert total == pytest.approx(1 - left, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), found 1.0"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\), found -0.1"),
        ({"sparsity": float("nan")}, r"sparsity must be in \[0, 1\), found nan"),
        ({"sparsity": 0.5, "min_keep": 1.5}, r"min_keep must be in \[0, 1\)"),
        ({"sparsity": 0.5, "pattern": (2, 4)}, "either a sparsity or a pattern"),
        ({}, "either a sparsity or a pattern"),
        ({"pattern": (4, 4)}, "0 < n < m"),
        ({"sparsity": 0.5, "score": "fischer"}, "score must be one of fisher, magnitude"),
        ({"sparsity": 0.5, "scope": "tensor"}, "scope must be one of global, layer, found 'tensor'"),
        ({"sparsity": 0.5, "ignore": ("nothing",)}, "'nothing' matches none"),
        ({"sparsity": 0.5, "ignore": ("(",)}, "a regular expression"),
        ({"sparsity": 0.5, "ignore": ("weight",)}, "something must be left to choose from"),
        ({"sparsity": 0.95, "min_keep": 0.2}, "takes 29 entries, but 7 of 142 are to be kept; lower min_keep"),
        ({"pattern": (2, 4)}, r"a.weight, \[7, 11\], has 11"),
    ],
)
def test_an_impossible_recipe_is_refused_in_one_line(options, message):
    """An impossible recipe is refused while planning, in one line with the wrong value."""
    with pytest.raises(ConfigError, match=message) as error:
        plan_pruning(PruningRecipe(**options), SHAPES, {"b.bias": "bias"}, dict.fromkeys(SHAPES, 1))
    assert "\n" not in str(error.value)


def test_an_unknown_input_axis_is_refused():
    """A tensor with an unknown input axis cannot have a pattern."""
    with pytest.raises(ConfigError, match="which axis of experts"):
        plan_pruning(PruningRecipe(pattern=(2, 4)), {"experts": (3, 4, 8)}, {}, {"experts": None})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_damaged_fisher_is_refused(value):
    """NaN, infinite and negative entries of a Fisher are counted by name."""
    weights, fisher = _tensors(8)
    fisher["b.weight"][3, 2] = value
    with pytest.raises(ValuesError, match=r"b\.weight in memory has 1 "):
        _found(weights, fisher, PruningRecipe(0.5))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value):
    """Weights that are not finite are refused, also with the magnitude score, which reads no F."""
    weights, fisher = _tensors(9)
    weights["a.weight"][0, 0] = value
    with pytest.raises(ValuesError, match=r"weights must be finite, but a\.weight"):
        _found(weights, fisher, PruningRecipe(0.5, "magnitude"))


def test_inputs_are_not_written_to():
    """The inputs stay unchanged, also float64 weights, which a score could use without a copy."""
    weights, fisher = ({name: tensor.double() for name, tensor in part.items()} for part in _tensors(10))
    before = {name: tensor.clone() for name, tensor in weights.items()}
    for score in ("fisher", "magnitude", "random", "taylor_squared"):
        _found(weights, fisher, PruningRecipe(0.5, score))
    assert all(torch.equal(weights[name], before[name]) for name in weights)
