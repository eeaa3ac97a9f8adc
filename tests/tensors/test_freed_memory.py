"""Freed memory of a process, which it keeps or gives back to the system."""

import os
import subprocess
import sys

import pytest

from squisher_mergekit.tensors import freed_memory

PROGRAM = """
import torch
from pathlib import Path
from squisher_mergekit.tensors.freed_memory import give_back

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("Anonymous:"))

blocks = []
for _ in range(100):  # below glibc's first threshold, so all are in the heap
    blocks.append(torch.ones(30_000))
kept = blocks[-1]
del blocks
before = anonymous()
given = give_back()
print(given, before - anonymous())
"""


CHUNKS = """
import ctypes
import resource
import sys
import torch
from squisher_mergekit.merging.votes.equations import voted_mean
from squisher_mergekit.tensors.freed_memory import keep_blocks

torch.set_num_threads(1)
ctypes.CDLL(None).mallopt(-1, 1 << 17)  # the first trim threshold of glibc, which imports may have raised
kept = keep_blocks() if "keep" in sys.argv else None
base, *models = torch.rand(5, 1 << 18)

def chunk():
    voted_mean(models[:2], models[2:], [1.0, 1.0], [1.0, 1.0], base, elected=True)

for _ in range(3):
    chunk()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    chunk()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(freed_memory._c_function("malloc_trim") is None, reason="needs glibc")
def test_freed_blocks_below_one_in_use_are_given_back():
    """Of 100 freed blocks of 120 kB below one that is in use, the system gets most of their 12 MB."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    given, megabytes = done.stdout.split()
    assert given == "True"
    assert float(megabytes) > 8


def _faults(*arguments: str, **variables: str) -> tuple[str, int]:
    """Return what ``keep_blocks`` returned, and the pages that the system cleared while 30 chunks were merged."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", CHUNKS, *arguments]
    done = subprocess.run(command, env=own | variables, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(freed_memory._c_function("mallopt") is None, reason="needs glibc")
def test_blocks_of_a_chunk_are_kept_for_the_next():
    """The blocks of a chunk of a merge cost no new pages after the first chunks, unless the user chose otherwise."""
    kept, faults = _faults("keep")
    assert kept == "True"
    assert faults < _faults()[1] / 10
    assert _faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"


def test_another_c_library_is_no_error(monkeypatch):
    """Where the C library has no such function, nothing happens."""
    monkeypatch.setattr(freed_memory, "_c_function", lambda name: None)
    assert freed_memory.give_back() is False
    assert freed_memory.keep_blocks.__wrapped__() is False
