"""Clocks, memory peaks and versions of benchmarks on a GPU, or in small on a CPU."""

from __future__ import annotations

import contextlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Budget:
    """Time limit of a benchmark; parts that begin later are left out.

    Attributes:
        seconds: Limit.
        problems: Mapping from parts to reasons for missing numbers.
    """

    seconds: float
    problems: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Remaining seconds."""
        return self.seconds - (time.monotonic() - self.began)

    def attempt(self, part: str, work: Callable[[], Any], least: float = 0.0) -> Any:
        """Return the result of a part; None if it fails, or if fewer than ``least`` seconds are left."""
        if self.left < least:
            self.problems[part] = f"left out: {self.left:.0f} s left, needs {least:.0f}"
            return None
        try:
            return work()
        except Exception as error:  # one part's failure must not cost the others
            self.problems[part] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            return None
        finally:
            if torch.cuda.is_available():
                with contextlib.suppress(Exception):
                    torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the time of a call, between events on a GPU."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end))


def median_ms(work: Callable[[], Any], device: torch.device, repeat: int, warm: int = 2) -> float:
    """Return the median time of some calls after others that warm up."""
    for _ in range(warm):
        work()
    return statistics.median(milliseconds(work, device) for _ in range(repeat))


def kernel_ms(work: Callable[[], Any], device: torch.device, repeat: int = 10) -> float:
    """Return the mean time of consecutive calls after a warm-up, which hides the time of their launches."""
    work()
    return milliseconds(lambda: [work() for _ in range(repeat)], device) / repeat


@contextlib.contextmanager
def peak_gb(device: torch.device) -> Iterator[list[float]]:
    """Yield a list that gets the growth of the memory peak during the block in GB; empty on a CPU."""
    found: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    yield found
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        found.append((torch.cuda.max_memory_allocated(device) - before) / 1e9)


def relative_l2(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return ``|found - expected| / |expected|`` over all tensors together."""
    off = sum(float((found[name] - tensor).double().norm() ** 2) for name, tensor in expected.items())
    return float((off / sum(float(tensor.double().norm() ** 2) for tensor in expected.values())) ** 0.5)


def environment(device: torch.device) -> dict[str, Any]:
    """Return card, driver and versions."""
    import transformers

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(device),
    }
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "card": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
        with contextlib.suppress(Exception):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    return found
