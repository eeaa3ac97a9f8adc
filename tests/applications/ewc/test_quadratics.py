"""Exact sum of two quadratics."""

import pytest
import torch

from squisher_mergekit.applications.ewc.quadratics import Quadratic, add_quadratics


def test_close_anchors_keep_float32_precision():
    """The sum of two quadratics with weights near 1000 and steps of 1e-3 keeps the float32 precision of the steps."""
    p = torch.full((11,), 1000.0, dtype=torch.float64)
    q, theta = p + 1e-3, p + 2e-3
    first, second = torch.full((11,), 3.0), torch.full((11,), 5.0)
    found = add_quadratics(Quadratic(first.double(), p), Quadratic(second.double(), q)).at(theta)
    expected = 11 * (3.0 * 2e-3**2 + 5.0 * 1e-3**2)
    assert found.item() == pytest.approx(expected, rel=1e-6)
