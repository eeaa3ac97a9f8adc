"""Kernels compiled for an H100 without one."""

import pytest

from tests.compiled_kernels import compiled

pytest.importorskip("triton", reason="the kernels are written in Triton")


@pytest.mark.slow
def test_an_h100_reads_16_bytes_at_a_time_and_flushes_nothing_to_zero(tmp_path):
    """Every launch compiles. It reads vectors of 16 bytes, at offsets of 64 bits, and keeps numbers below 1e-38.

    Tiles of 32 models are smaller, and so are their vectors. A mask has one byte an entry. A logarithm, of a power,
    flushes.
    """
    found = compiled("merges", 90, tmp_path)
    assert {kernel["kernel"] for kernel in found} == {"merge", "weighted_sum"}
    for kernel in found:
        scalars = [load for load in kernel["loads"] if ".v" not in load]
        vectors = {load for load in kernel["loads"] if ".v" in load}
        name = kernel["launch"]
        assert kernel["wide"], name
        assert kernel["stack"] == 0, name
        assert kernel["flushes"] == ("power" in name or "all options" in name), name
        if name == "squisher 32":
            continue
        assert set(scalars) <= {"ld.global.b64"}, name  # the prior
        assert vectors <= {"ld.global.v4.b32", "ld.global.v2.b64"} | ({"ld.global.v2.b32"} if _masked(name) else set())


def _masked(launch):
    return "masks" in launch or "all options" in launch
