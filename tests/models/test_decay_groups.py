"""Rules by which trainers split parameters into groups."""

import pytest

from squisher_mergekit.models.decay_groups import AXES_RULES, candidates, layers_of_groups, variants
from squisher_mergekit.models.names import ParameterInfo

LINEAR = frozenset({"Linear"})
PARAMETERS = [
    ParameterInfo("cls_token", (1, 1, 3), LINEAR),
    ParameterInfo("positions", (7, 3), LINEAR, trainable=False),
    ParameterInfo("gain", (3,), LINEAR),
]


def test_either_group_of_the_split_by_axes_can_be_first():
    """NanoGPT puts the matrices first, timm the vectors."""
    groups = candidates(PARAMETERS, [2, 1], AXES_RULES)
    names = [[[parameter.name for parameter in group] for group in split] for split in groups.values()]
    assert names == [[["cls_token", "positions"], ["gain"]], [["gain"], ["cls_token", "positions"]]]


def test_a_trainers_rules_need_the_types_of_the_modules():
    """A model known by names and shapes alone has no LayerNorm that a Trainer's rule could recognise."""
    untyped = [ParameterInfo(parameter.name, parameter.shape) for parameter in PARAMETERS]
    assert set(candidates(untyped, [2, 1])) == set(AXES_RULES)
    assert set(candidates(PARAMETERS, [2, 1])) > set(AXES_RULES)


def test_a_parameter_frozen_by_the_constructor_may_have_been_trained():
    """Positions that the constructor freezes are left out of the first variant, and trainable in the second."""
    frozen, thawed = variants(PARAMETERS)
    assert [parameter.name for parameter in frozen] == ["cls_token", "gain"]
    assert [parameter.name for parameter in thawed] == ["cls_token", "positions", "gain"]
    assert all(parameter.trainable for parameter in thawed)


@pytest.mark.parametrize(
    ("scales", "layers"),
    [
        ((0.5, 0.5, 1.0), [[0, 1], [2]]),
        ((0.25, 0.5, 0.5, 1.0), [[0], [1, 2], [3]]),
        ((None, 0.5, 1.0), None),
        ((1.0, 1.0, 1.0), None),
        ((0.5, 1.0, 0.5), None),
    ],
    ids=["two", "three", "unknown", "one scale", "a layer in two places"],
)
def test_groups_of_equal_scale_are_a_layer(scales, layers):
    """Only layers that follow each other tell which parameters are theirs."""
    settings = [{} if scale is None else {"lr_scale": scale} for scale in scales]
    assert layers_of_groups(settings) == layers
