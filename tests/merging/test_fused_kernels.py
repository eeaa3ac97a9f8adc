"""Kernels compiled for an H100 without one."""

import json
import os
import subprocess
import sys

import pytest

from scripts import ROOT

pytest.importorskip("triton", reason="the kernels are written in Triton")

COMPILE = """
import json, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from squisher_mergekit.merging import fused_kernels as kernels

def compile_one(count, matched):
    theta, fisher = ("*bf16",) * count, ("*fp32",) * count
    base = dict(base="*bf16", base_fisher="*fp32", prior="*fp64") if matched else {}
    sizes = dict(MATCHED=matched, ELECTED=False, POWERED=False, WORK=tl.float32, TILE=1024, LOOPS=8, ROWS=128)
    fixed = sizes | {"SLOTS": (-1,) * count} | ({} if matched else dict.fromkeys(("base", "base_fisher", "prior")))
    given = dict(thetas=theta, fishers=fisher, watched=(), masks=(), origins=(), out="*bf16", sums="*fp64") | base
    given |= dict(invalid="*i64", weights=("fp32",) * count, coefficients=("fp32",) * (count + matched))
    given |= dict(power="fp32", size="i32")
    signature = {name: "constexpr" if name in fixed else given[name] for name in kernels.merge.arg_names}
    aligned = {}
    for place, (name, kind) in enumerate(signature.items()):
        kinds = [((place, i), one) for i, one in enumerate(kind)] if isinstance(kind, tuple) else [((place,), kind)]
        aligned |= {at: [["tt.divisibility", 16]] for at, one in kinds if one.startswith("*") or name == "size"}
    source = ASTSource(kernels.merge, signature, constexprs=fixed, attrs=aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 1}).asm["ptx"]
    loads = [line.split()[1] if line.strip().startswith("@") else line.split()[0]
             for line in ptx.splitlines() if "ld.global" in line]
    return {"loads": loads, "local": ".local" in ptx, "flushes": ".ftz" in ptx, "wide": "add.s64" in ptx}

print(json.dumps([compile_one(count, matched) for count in (2, 4) for matched in (False, True)]))
"""


@pytest.mark.slow
def test_an_h100_reads_16_bytes_at_a_time_and_flushes_nothing_to_zero(tmp_path):
    """All tiles are read in vectors of 16 bytes, offsets have 64 bits, and numbers below 1e-38 are kept."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    # Triton reads the source of a kernel from its file.
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout):
        scalars = [load for load in found["loads"] if ".v" not in load]
        assert len(found["loads"]) >= 6
        assert all(load in {"ld.global.b64"} for load in scalars), scalars  # the prior
        assert all(load.endswith((".v4.b32", ".v2.b64")) for load in set(found["loads"]) - set(scalars))
        assert not found["local"]
        assert not found["flushes"]
        assert found["wide"]
