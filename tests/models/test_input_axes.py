"""Input axis of a weight."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from squisher_mergekit.models.input_axes import axes_on_disk, input_axes
from squisher_mergekit.models.parameters import describe
from squisher_mergekit.models.weights import open_weights
from tests.training.cases import make


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.Linear(5, 3), 5),
        (nn.Conv1d(5, 3, 7), 5),
        (nn.Conv2d(5, 3, 7), 5),
        (nn.Conv3d(5, 3, 2), 5),
        (nn.ConvTranspose2d(5, 3, 7), 5),
        (Conv1D(3, 5), 5),
    ],
)
def test_the_axis_is_that_of_the_inputs(module, inputs):
    """Each kind of layer has the input axis of its layout."""
    shapes = {"weight": tuple(module.weight.shape)}
    axis = input_axes(module, describe(module).checkpoint_names, shapes)["weight"]
    assert module.weight.shape[axis] == inputs


@pytest.mark.parametrize(("transposed", "axis"), [(True, 1), (False, 2), (None, None)])
def test_packed_experts_declare_their_layout(transposed, axis):
    """The attribute is_transposed gives the input axis of three-dimensional experts. Without it the axis is unknown."""
    module = nn.Module()
    module.packed = nn.Parameter(torch.zeros(3, 5, 7))
    if transposed is not None:
        module.is_transposed = transposed
    assert input_axes(module, describe(module).checkpoint_names, {"packed": (3, 5, 7)}) == {"packed": axis}


def test_the_config_gives_the_layout_on_disk(tmp_path):
    """The config tells that GPT-2's Conv1D keeps [in, out]. Without it, matrices count as [out, in]."""
    make("gpt2").save_pretrained(tmp_path)
    name = "transformer.h.0.mlp.c_fc.weight"
    weights = open_weights(tmp_path)
    assert axes_on_disk(weights, {name: (12, 48)}) == {name: 0}
    (tmp_path / "config.json").unlink()
    assert axes_on_disk(open_weights(tmp_path), {name: (12, 48), "experts": (2, 3, 5)}) == {name: 1, "experts": None}
