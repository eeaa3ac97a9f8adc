"""Host memory as the default of new tensors, inside any other default."""

import torch

from squisher_mergekit.tensors.devices.default_device import host_by_default


@host_by_default()
def _made():
    return torch.zeros(2), torch.tensor([1.0]), torch.arange(3)


def test_tensors_are_made_on_the_host_inside_another_default():
    """Also the second call of a decorated function makes them there, and the caller's default comes back."""
    with torch.device("meta"):
        for _ in range(2):
            assert {tensor.device.type for tensor in _made()} == {"cpu"}
            assert torch.zeros(2).is_meta


def test_without_another_default_nothing_changes():
    """No mode is entered, which each call of torch would pay for."""
    before = len(torch.overrides._get_current_function_mode_stack())
    with host_by_default():
        assert len(torch.overrides._get_current_function_mode_stack()) == before
        assert torch.zeros(2).device.type == "cpu"
