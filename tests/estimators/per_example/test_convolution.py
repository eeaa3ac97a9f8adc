"""Per-example gradients of convolutions against autograd on single examples."""

import pytest
import torch
from torch import nn

from squisher_mergekit.estimators.per_example import convolution

KINDS = {
    "few channels": lambda: nn.Conv2d(3, 5, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    "few, one axis": lambda: nn.Conv1d(2, 5, 3, stride=2, padding=2),
    "few, three axes": lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1)),
    "many channels": lambda: nn.Conv2d(11, 5, 3, stride=2, padding=1, dilation=2),
    "groups": lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1),
    "depthwise": lambda: nn.Conv2d(11, 22, 3, groups=11),
    "pointwise": lambda: nn.Conv2d(11, 7, 1),
    "same": lambda: nn.Conv2d(3, 5, 4, padding="same", dilation=2),
    "circular": lambda: nn.Conv2d(9, 5, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv1d(3, 5, 3, padding=2, padding_mode="reflect"),
    "replicate": lambda: nn.Conv3d(3, 5, 3, padding=1, padding_mode="replicate"),
}


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths:UserWarning"
)  # the test covers this case
def test_gradients_are_those_of_each_example(kind, name):
    """Per-example gradients are right for strides, paddings, dilations and groups over one to three axes."""
    torch.manual_seed(0)
    module = KINDS[kind]().double()
    x = torch.randn(3, module.in_channels, *(7, 5, 6)[: len(module.kernel_size)]).double()
    output = module(x)
    b = torch.randn_like(output)
    found = convolution.gradients(name, module, x, b)
    for n in range(3):
        (expected,) = torch.autograd.grad(output[n], getattr(module, name), b[n], retain_graph=True)
        torch.testing.assert_close(found[n], expected)
