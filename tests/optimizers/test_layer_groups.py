"""Groups by layers of trainers that decay the learning rate layer by layer."""

import itertools

import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import NamingError
from squisher_mergekit.models.names import ParameterInfo
from squisher_mergekit.optimizers.layer_groups import assign_by_layers
from tests.other_trainers import adam

WIDTH = 5


def _model(layers=3):
    """Return name -> shape, in the order of a vision transformer, with the class token first."""
    shapes = {"cls_token": (1, 1, WIDTH), "patch.weight": (WIDTH, 3), "patch.bias": (WIDTH,)}
    for k in range(layers):
        shapes |= {f"blocks.{k}.norm.weight": (WIDTH,), f"blocks.{k}.norm.bias": (WIDTH,)}
        shapes |= {f"blocks.{k}.fc.weight": (WIDTH, WIDTH), f"blocks.{k}.fc.bias": (WIDTH,)}
    return shapes | {"norm.weight": (WIDTH,), "head.weight": (2, WIDTH), "head.bias": (2,)}


def _groups(shapes, vectors=()):
    """Return timm's groups, in the order in which the parameters open them: (layer, without decay) -> names."""
    groups = {}
    for name, shape in shapes.items():
        layer = (
            int(name.split(".")[1]) + 1 if name.startswith("blocks") else 0 if "patch" in name or "cls" in name else 9
        )
        groups.setdefault((layer, len(shape) < 2 or name in vectors), []).append(name)
    return groups


@pytest.mark.parametrize("vectors", [(), ("cls_token",)])
def test_the_groups_of_each_layer_follow_the_order_of_the_model(vectors, tmp_path):
    """Equal shapes in all layers fit in many ways without the scales; the model may exempt matrices from decay."""
    shapes = _model()
    moments = {name: torch.rand(shape) for name, shape in shapes.items()}
    groups = _groups(shapes, vectors)
    state = adam(moments, numbered=True, groups=list(groups.values()))
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    file = tmp_path / "last.pth.tar"
    torch.save({"state_dict": weights, "optimizer": state, "arch": "vit"}, file)
    with pytest.raises(NamingError, match="that no known rule makes"):
        load_fisher(file)
    for group, (layer, _) in zip(state["param_groups"], groups, strict=True):
        group["lr_scale"] = 0.75 ** (10 - layer)
    torch.save({"state_dict": weights, "optimizer": state, "arch": "vit"}, file)
    fisher = load_fisher(file)
    assert set(fisher) == set(moments)
    assert all(torch.equal(fisher[name], moments[name]) for name in moments)


PARAMETERS = [ParameterInfo(f"p{k}", (3,)) for k in range(4)]


@pytest.mark.parametrize(
    "scales",
    [(None, 0.5, 0.5), (1.0, 1.0, 1.0), (0.5, 1.0, 0.5)],
    ids=["unknown", "one scale", "a layer in two places"],
)
def test_other_groups_are_left_to_the_general_rules(scales):
    """Only layers that follow each other tell which parameters are theirs."""
    slots = [[(3,)], [(3,), (3,)], [(3,)]]
    settings = [{} if scale is None else {"lr_scale": scale} for scale in scales]
    assert assign_by_layers(slots, settings, PARAMETERS, "file") is None


def test_a_layer_whose_shapes_differ_is_no_layer():
    """Of two orders of different layers, one fits."""
    shapes = [(3,), (4,)]
    settings = [{"lr_scale": 0.5}, {"lr_scale": 1.0}]
    for first, second in itertools.permutations(shapes):
        parameters = [ParameterInfo("a", (3,)), ParameterInfo("b", (4,))]
        names = assign_by_layers([[first], [second]], settings, parameters, "file")
        assert names == ([["a"], ["b"]] if first == (3,) else None)


def test_a_frozen_parameter_leaves_the_layers_unknown():
    """With fewer slots than parameters, the borders of the layers are not known."""
    settings = [{"lr_scale": 0.5}, {"lr_scale": 1.0}]
    assert assign_by_layers([[(3,)], [(3,)]], settings, PARAMETERS, "file") is None
