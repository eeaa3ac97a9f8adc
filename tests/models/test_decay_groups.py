"""Rules by which trainers split parameters into groups."""

from squisher_mergekit.models.decay_groups import AXES_RULES, candidates, variants
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
