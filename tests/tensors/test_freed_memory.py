"""Memory that a process gives back to the system."""

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


@pytest.mark.skipif(freed_memory._trim() is None, reason="needs glibc")
def test_freed_blocks_below_one_in_use_are_given_back():
    """Of 100 freed blocks of 120 kB below one that is in use, the system gets most of their 12 MB."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    given, megabytes = done.stdout.split()
    assert given == "True"
    assert float(megabytes) > 8


def test_another_c_library_is_no_error(monkeypatch):
    """Where the C library has no such function, nothing happens."""
    monkeypatch.setattr(freed_memory, "_trim", lambda: None)
    assert freed_memory.give_back() is False
