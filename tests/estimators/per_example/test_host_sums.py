"""Additions to accumulators in host memory, in pieces."""

import pytest
import torch

from squisher_mergekit.estimators.per_example.host_sums import HostSums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slots", [1, 3])
def test_pieces_add_up_to_the_sums(dtype, slots):
    """Tensors of many pieces and of none are added in full, in every order of the buffers."""
    draw = torch.Generator().manual_seed(0)
    sums = HostSums(torch.device("cpu"), slots=slots, slot_bytes=64)
    totals = [torch.zeros(shape, dtype=dtype) for shape in [(7, 11), (0,), (3,)]]
    expected = [total.clone() for total in totals]
    for _ in range(5):
        for total, wanted in zip(totals, expected, strict=True):
            part = torch.rand(total.shape, generator=draw, dtype=dtype)
            sums.add(total, part)
            wanted += part
    sums.wait()
    assert all(torch.equal(total, wanted) for total, wanted in zip(totals, expected, strict=True))
    sums.wait()  # nothing is pending
