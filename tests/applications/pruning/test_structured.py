"""Scores of filters, neurons and heads against sums by hand, their choice, and masks of whole units."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from squisher_mergekit.applications.pruning.shrinking import shrink
from squisher_mergekit.applications.pruning.structured import (
    UnitChoice,
    choose_units,
    mask_units,
    unit_masks,
    unit_scores,
)
from squisher_mergekit.applications.pruning.units import chain_units, ffn_units, head_units
from squisher_mergekit.errors import ConfigError, MismatchError, ValuesError
from tests.applications.pruning.networks import cnn, fisher, llama_gqa, mlp, transformer


def test_a_filter_is_scored_with_its_bias_and_scale():
    """The score of a filter sums theta^2 F / 2 over its weights, its bias, and BatchNorm's scale and shift."""
    model = cnn()
    F = fisher(model)
    found = unit_scores(model, chain_units(model), F)
    assert list(found) == ["0.0", "1.0", "3"]
    parameters = {name: p.detach().double() for name, p in model.named_parameters()}
    members = {
        "0.0": ["0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"],
        "1.0": ["1.0.weight", "1.2.weight", "1.2.bias"],
        "3": ["3.weight", "3.bias", "4.weight", "4.bias"],
    }
    for layer, names in members.items():
        wanted = [
            sum(float((parameters[name][unit] ** 2 * F[name][unit].double() / 2).sum()) for name in names)
            for unit in range(len(found[layer]))
        ]
        torch.testing.assert_close(found[layer], torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_squared_mean_adds_up_before_it_squares():
    """The squared mean of a unit is (sum theta g)^2, where weights can cancel. Magnitude adds |theta|."""
    model = mlp()
    gradient = fisher(model, 1)
    gradient["0.weight"][:, ::2] *= -1
    units = chain_units(model)
    found = unit_scores(model, units, score="taylor_squared", gradient=gradient)["0"]
    sizes = unit_scores(model, units, score="magnitude")["0"]
    for unit in range(13):
        weight, bias = model[0].weight[unit].detach().double(), model[0].bias[unit].detach().double()
        mean = (weight * gradient["0.weight"][unit].double()).sum() + bias * gradient["0.bias"][unit].double()
        assert found[unit].item() == pytest.approx(mean.item() ** 2, rel=1e-12)
        assert sizes[unit].item() == pytest.approx((weight.abs().sum() + bias.abs()).item(), rel=1e-12)


def test_a_head_is_scored_over_queries_keys_and_values():
    """The score of a head sums two queries of four rows each, and the keys and values that they share."""
    model = llama_gqa()
    F = fisher(model)
    units = head_units(model)
    assert [(layer.name, layer.count) for layer in units] == [(f"model.layers.{n}.self_attn", 6) for n in range(2)]
    found = unit_scores(model, units, F)["model.layers.1.self_attn"]
    for unit in range(6):
        wanted = 0.0
        for part, rows in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
            for kind in ("weight", "bias"):
                name = f"model.layers.1.self_attn.{part}.{kind}"
                own = slice(rows * unit, rows * (unit + 1))
                wanted += (model.get_parameter(name)[own].double() ** 2 * F[name][own].double() / 2).sum().item()
        assert found[unit].item() == pytest.approx(wanted, rel=1e-12)


def test_units_of_one_layer_share_its_name_and_count():
    """Feed-forward neurons of four architectures, two of them gated, share the name and the count of their layer."""
    widths = {"bert": 12, "gpt2": 48, "llama": 19, "t5": 19}
    for name, width in widths.items():
        model = transformer(name)
        units = ffn_units(model)
        assert {layer.count for layer in units} == {width}
        assert len(units) == {"bert": 2, "gpt2": 3, "llama": 3, "t5": 4}[name]
        assert len(units[0].made) == {"bert": 2, "gpt2": 2, "llama": 2, "t5": 1}[name]


def test_the_lowest_units_go_and_every_layer_keeps_its_floor():
    """The lowest units are pruned with exact counts, and every layer keeps its floor."""
    model = cnn()
    F = fisher(model)
    for name in ("3.weight", "3.bias", "4.weight", "4.bias"):
        F[name] *= 1e-6
    units = chain_units(model)
    raw = choose_units(model, units, F, 0.5, normalize="none", min_keep=0)
    assert raw.widths["3"] == 1
    assert sum(raw.widths.values()) == 23 - 12  # 11.5, rounded to the even number
    floored = choose_units(model, units, F, 0.5, normalize="none", min_keep=0.35)
    assert floored.widths == {"0.0": floored.widths["0.0"], "1.0": 7 - floored.widths["0.0"], "3": 4}
    usual = choose_units(model, units, F, 0.5)
    assert usual.widths["3"] == 4  # a third of 11, rounded up
    measured = choose_units(model, units, F, 0.5, normalize="layer", min_keep=0)
    assert measured.widths["3"] > 4
    scores = unit_scores(model, units, F)
    flat = torch.cat([values / values.mean() for values in scores.values()])
    kept = torch.cat(list(measured.kept.values()))
    assert flat[kept].min() > flat[~kept].max()
    even = choose_units(model, units, F, 0.4, scope="layer")
    assert even.widths == {"0.0": 4, "1.0": 3, "3": 7}
    assert str(even).splitlines()[0] == "0.0  4 of 7"


def test_a_masked_unit_puts_out_zero():
    """A masked unit puts out 0 for any input, also after BatchNorm.

    The functions of torch recognise the masks. A second choice adds to the first.
    """
    model = cnn()
    choice = choose_units(model, chain_units(model), fisher(model), 0.5)
    mask_units(model, choice)
    assert torch_prune.is_pruned(model)
    inputs = torch.randn(3, 2, 12, 12)
    after_first = model[0](inputs)
    assert not after_first[:, ~choice.kept["0.0"]].any()
    assert after_first[:, choice.kept["0.0"]].flatten(2).any(2).any(0).any()
    again = choose_units(model, chain_units(model), fisher(cnn()), 0.7)
    assert all(not (again.kept[name] & ~kept).any() for name, kept in choice.kept.items())
    mask_units(model, again)
    assert not model[0](inputs)[:, ~again.kept["0.0"]].any()


def test_the_random_choice_has_the_same_floor():
    """The random choice depends on layer and seed, and has the same floor."""
    model = cnn()
    units = chain_units(model)
    first, same, other = (choose_units(model, units, None, 0.5, score="random", seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first.kept[name], same.kept[name]) for name in first.kept)
    assert any(not torch.equal(first.kept[name], other.kept[name]) for name in first.kept)
    assert sum(first.widths.values()) == 11


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, ConfigError, r"sparsity must be in \[0, 1\)"),
        ({"sparsity": 0.5, "min_keep": 0.9}, ConfigError, "takes"),
        ({"sparsity": 0.95}, ConfigError, "takes 3 entries"),
        ({"sparsity": 0.5, "score": "taylor_squared"}, ConfigError, "needs gradient="),
        ({"sparsity": 0.5, "scope": "model"}, ConfigError, "scope must be one of"),
        ({"sparsity": 0.5, "fisher": {"3.weight": torch.ones(11, 20)}}, MismatchError, r"lacks 0\.0\.weight"),
        ({"sparsity": 0.5, "fisher": {"3.weight": torch.ones(2)}}, MismatchError, "must have the weight's shape"),
        ({"sparsity": 0.5, "fisher": None}, ConfigError, "score fisher needs a Fisher"),
    ],
)
def test_an_impossible_choice_is_refused_in_one_line(options, error, message):
    """An impossible choice is refused in one line with the wrong value."""
    model = cnn()
    given = options.pop("fisher") if "fisher" in options else fisher(model)
    with pytest.raises(error, match=message) as caught:
        choose_units(model, chain_units(model), given, **options)
    assert "\n" not in str(caught.value)


def test_damaged_values_are_refused():
    """NaN in F is refused with the name of the tensor, and NaN in a weight with its layer."""
    model = cnn()
    F = fisher(model)
    F["1.0.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValuesError, match=r"1\.0\.weight in memory has 1 NaN"):
        choose_units(model, chain_units(model), F, 0.5)
    model[0][0].weight.data[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValuesError, match=r"scores must be finite, but those of 0\.0"):
        choose_units(model, chain_units(model), score="magnitude", sparsity=0.5)


def test_a_choice_of_another_model_is_refused():
    """A choice of another model is refused for an unknown name or for missing rows."""
    model, other = cnn(), mlp()
    choice = UnitChoice(
        chain_units(model), {layer.name: torch.ones(layer.count, dtype=torch.bool) for layer in chain_units(model)}
    )
    for wrong in (other, nn.Sequential(*list(cnn())[:1], nn.Sequential(nn.Conv2d(7, 3, 3)), *list(cnn())[2:])):
        with pytest.raises(MismatchError, match="must be of this model"):
            unit_masks(wrong, choice)


@pytest.mark.parametrize("score", ["fisher", "random"])
def test_another_default_device_changes_no_choice(score):
    """A program may have called ``torch.set_default_device``: units are chosen and cut out all the same."""
    model = mlp()
    units, F = chain_units(model), fisher(model)
    wanted = choose_units(model, units, F, 0.4, score=score)
    masks = unit_masks(model, wanted)
    with torch.device("meta"):
        found = choose_units(model, units, F, 0.4, score=score)
        assert all(torch.equal(mask, masks[name]) for name, mask in unit_masks(model, found).items())
        small = shrink(model, found)
    assert [p.shape for p in small.parameters()] == [p.shape for p in shrink(model, wanted).parameters()]
    assert not any(parameter.is_meta for parameter in small.parameters())
