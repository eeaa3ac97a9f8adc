"""Triton kernels compiled for a GPU without one, from the package's own launches.

Tests run this file in a process of its own, because Triton interprets the kernels in theirs. It prints one JSON object
a line for each kernel: the launch, the instructions that load, and the resources that the assembler gave it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SIZE = 16 * 1237

Launches = Iterator[tuple[str, Callable[[], object]]]


def compiled(launches: str, capability: int, cache: Path) -> list[dict[str, Any]]:
    """Compile the kernels that a function of this file launches.

    Args:
        launches: ``merges``, ``squares`` or ``norms``.
        capability: Compute capability times 10, such as 90 for an H100.
        cache: Folder of Triton's cache.

    Returns:
        For each kernel: ``launch``, ``kernel``, ``loads``, ``flushes`` (numbers below 1e-38 become 0), ``wide`` (there
        are offsets of 64 bits), ``stack`` (bytes of a thread in local memory: spilled registers), ``shared`` (bytes).
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.compiled_kernels", launches, str(capability)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# ---- launches


def merges() -> Launches:
    """Yield merges of one tensor: with 1 to 32 models, and with each option."""
    import torch

    from squisher_mergekit.merging import fused

    bf16, fp16, single, double = torch.bfloat16, torch.float16, torch.float32, torch.float64

    def tensor(dtype: torch.dtype) -> torch.Tensor:
        return torch.ones(SIZE, dtype=dtype)

    def models(count: int, theta: torch.dtype = bf16, fisher: torch.dtype = single, **parts: Any) -> list[fused.Model]:
        return [fused.Model(tensor(theta), tensor(fisher), 0.5, 2.0, **parts) for _ in range(count)]

    def average(given: list[fused.Model], work: torch.dtype = single, out: torch.dtype = bf16, **options: Any) -> Any:
        return lambda: fused.squisher(given, work, out, **options)

    def match(given: list[fused.Model], own: torch.Tensor | None, work: torch.dtype = single, **options: Any) -> Any:
        return lambda: fused.ubgm_squisher(tensor(bf16), own, given, work, bf16, **options)

    kept = models(2, kept=(tensor(torch.bool), tensor(bf16)))
    unused = [fused.Model(tensor(bf16), tensor(single), 0.0)]
    for count in (2, 8):
        yield f"squisher {count}", average(models(count))
        yield f"ubgm {count}", match(models(count), tensor(single), prior=0.1)
    yield "squisher 32", average(models(32))
    for theta in (fp16, single, double):
        work = double if theta == double else single
        yield f"squisher {theta}", average(models(2, theta), work, theta)
    for fisher in (bf16, double):
        work = double if fisher == double else single
        yield f"squisher, Fishers in {fisher}", average(models(2, bf16, fisher), work)
        yield f"ubgm, Fishers in {fisher}, power", match(models(2, bf16, fisher), None, work, prior=0.1, power=0.5)
    yield "squisher, power", average(models(2), power=0.5)
    yield "squisher, elected", average(models(2), elect_from=tensor(bf16))
    yield "squisher, masks", average([*kept, *models(1)])
    yield "squisher, all options", average([*kept, *models(1), *unused], power=0.5, elect_from=tensor(bf16))
    yield "ubgm, no prior", match(models(2), tensor(single))
    yield "ubgm, no F_0", match(models(2), None, prior=0.1)
    yield "ubgm, all options", match([*kept, *models(1), *unused], tensor(single), prior=0.1, power=0.5)


def squares() -> Launches:
    """Yield sums of squared products with each tiling, dtype and division of the examples."""
    import torch

    from squisher_mergekit.estimators.per_example import square_kernel

    def add(dtype: torch.dtype, tokens: int, width: int, **options: Any) -> Any:
        total, a = torch.zeros(width, width), torch.ones(2, tokens, width, dtype=dtype)
        return lambda: square_kernel.add_product_squares(total, a, a, **options)

    for tiling in (*square_kernel.TILINGS, square_kernel.SMALL):
        yield f"{tiling}", add(torch.bfloat16, 512, 1024, tiling=tiling)
    yield "float16, cut tiles, two parts", add(torch.float16, 37, 41, splits=2)
    yield "one token", add(torch.bfloat16, 1, 1024)


def norms() -> Launches:
    """Yield gradients of layer norms and root mean square norms."""
    import torch

    from squisher_mergekit.estimators.per_example import norm_kernel

    for columns, dtype, centered in ((4096, torch.bfloat16, False), (16384, torch.float32, True)):
        norm, x = norm_kernel.Normalization(1e-5, centered), torch.ones(2, 37, columns, dtype=dtype)
        yield f"{norm} of {columns}", lambda norm=norm, x=x: norm_kernel.norm_gradients(x, x, norm)


# ---- compilation


class Card:
    """Triton's driver of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        """Return the number of the GPU."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the stream that nothing runs on."""
        return 0

    def get_current_target(self) -> Any:
        """Return the architecture to compile for."""
        return self._target


def main(launches: str, capability: int) -> None:
    """Compile the kernels of some launches, and print a line for each."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(Card(capability))
    made: list[Any] = []

    def launch(kernel: Any, grid: object) -> Callable[..., None]:
        def compile_only(*arguments: Any, **options: Any) -> None:
            if "WIDEN" in options:
                options["WIDEN"] = False  # as on a GPU
            made.append(kernel.warmup(*arguments, grid=grid, **options))

        return compile_only

    JITFunction.__getitem__ = launch
    for label, run in {"merges": merges, "squares": squares, "norms": norms}[launches]():
        run()
        for kernel in made:
            print(json.dumps({"launch": label, "kernel": kernel.name, **_findings(kernel, capability)}))
        made.clear()


def _findings(kernel: Any, capability: int) -> dict[str, Any]:
    """Return the properties of a compiled kernel; see :func:`compiled`."""
    ptx = kernel.asm["ptx"]
    lines = [line.split() for line in ptx.splitlines() if "ld.global" in line]
    return {
        "loads": [next(word for word in line if word.startswith("ld.global")) for line in lines],
        "flushes": ".ftz" in ptx,
        "wide": "add.s64" in ptx,
        "stack": _stack(ptx, capability),
        "shared": kernel.metadata.shared,
    }


def _stack(ptx: str, capability: int) -> int:
    """Return the bytes of local memory that NVIDIA's assembler gives a thread."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        assert target
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target[1]}", source.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"(\d+) bytes stack", said)
    assert found, said
    return int(found[1])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
