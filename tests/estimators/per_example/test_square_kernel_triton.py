"""Kernel of squared products compiled for GPUs without one."""

import pytest

from tests.compiled_kernels import compiled

pytest.importorskip("triton", reason="the kernel is written in Triton")

SHARED = {80: 163, 90: 227}  # KB that a program can have on an A100 and an H100, from NVIDIA's programming guide


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_every_tiling_fits_the_card(tmp_path, capability):
    """Every tiling compiles, its tiles fit the shared memory, and it flushes nothing to zero.

    The small tiling fits the 48 KB that every card has.
    """
    found = compiled("squares", capability, tmp_path)
    assert len(found) >= 9
    small = [kernel for kernel in found if "stages=2" in kernel["launch"]]
    assert [kernel["shared"] <= 48 * 1024 for kernel in small] == [True]
    for kernel in found:
        assert 0 < kernel["shared"] <= SHARED[capability] * 1024, kernel["launch"]
        assert kernel["stack"] <= 16, kernel["launch"]
        assert kernel["wide"]
        assert not kernel["flushes"]
