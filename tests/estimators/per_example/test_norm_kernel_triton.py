"""Kernel of norms compiled for an H100 without one."""

import pytest

from tests.compiled_kernels import compiled

pytest.importorskip("triton", reason="the kernel is written in Triton")


@pytest.mark.slow
def test_a_row_stays_in_registers(tmp_path):
    """Both norms compile, and read their widest rows in vectors of 16 bytes."""
    found = compiled("norms", 90, tmp_path)
    assert [kernel["kernel"] for kernel in found] == ["sum_products"] * 2
    for kernel in found:
        assert set(kernel["loads"]) == {"ld.global.v4.b32"}
        assert kernel["stack"] == 0
