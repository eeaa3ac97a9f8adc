"""Times and errors of the fused kernel ``sum_n (B_n^T A_n)^2``, for several tilings, next to torch's products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from scripts.benchmarks.gpu_timing import Budget, kernel_ms
from squisher_mergekit.estimators.per_example.square_kernel import TILINGS, Tiling, add_product_squares, plan

# rows, columns, examples, tokens: the matrices of a Llama of 1.1B parameters, of BERT-base and of a small BERT
SHAPES = {
    "up": (5632, 2048, 8, 512),
    "head": (32000, 2048, 8, 512),
    "query": (2048, 2048, 8, 512),
    "key": (256, 2048, 8, 512),
    "bert": (768, 768, 32, 128),
    "small": (256, 1024, 16, 64),
    "odd": (257, 1021, 5, 61),
}
LARGE = TILINGS[0]
VARIANTS: dict[str, Tiling] = {
    "128x128x64": LARGE,
    "128x128x64 tma": replace(LARGE, tma=True),
    "128x128x64 nested": replace(LARGE, flat=False),
    "128x128x64 nested tma": replace(LARGE, flat=False, tma=True),
    "128x128x64 3 stages": replace(LARGE, stages=3),
    "128x128x32": TILINGS[1],
    "128x128x128 tma": Tiling(128, 128, 128, 8, 2, tma=True),
    "256x128x64 tma 16 warps": Tiling(256, 128, 64, 16, 3, tma=True),
    "64x128x64": TILINGS[2],
    "64x128x64 tma": replace(TILINGS[2], tma=True),
    "64x64x64": TILINGS[3],
    "64x64x32": TILINGS[4],
    "32x32x32": TILINGS[5],
}


def factors(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return random B ``(N, T, rows)`` and A ``(N, T, columns)``."""
    rows, columns, examples, tokens = shape
    generator = torch.Generator(device).manual_seed(0)
    b = torch.randn(examples, tokens, rows, device=device, generator=generator)
    a = torch.randn(examples, tokens, columns, device=device, generator=generator)
    return b.to(dtype), a.to(dtype)


def exact_sum(b: Tensor, a: Tensor) -> Tensor:
    """Return the sum in float64, one example at a time, of at most the first 1024 rows."""
    total = torch.zeros(min(b.shape[2], 1024), a.shape[2], dtype=torch.float64, device=b.device)
    for n in range(len(b)):
        total += (b[n, :, :1024].double().T @ a[n].double()).square_()
    return total


def baselines(total: Tensor, b: Tensor, a: Tensor) -> dict[str, Callable[[], Any]]:
    """Return the calls of torch that the kernel is compared with.

    ``product`` is the weight gradient of an ordinary backward pass: the same operations, without any square.
    """
    flat_b, flat_a = b.flatten(0, 1), a.flatten(0, 1)

    def by_bmm() -> None:
        # The part that the cache of a GPU holds.
        chunk = max(1, (1 << 23) // total.numel())
        for start in range(0, len(b), chunk):
            part = torch.bmm(
                b[start : start + chunk].transpose(1, 2), a[start : start + chunk], out_dtype=torch.float32
            )
            total.add_(part.square_().sum(0))

    def by_wide_bmm() -> None:
        for n in range(len(b)):
            product = b[n].float().T @ a[n].float()
            total.addcmul_(product, product)

    calls: dict[str, Callable[[], Any]] = {"product": lambda: flat_b.T @ flat_a, "wide products": by_wide_bmm}
    return calls if b.dtype == torch.float32 else calls | {"bmm to float32": by_bmm}


def measure_shape(name: str, dtype: torch.dtype, device: torch.device, budget: Budget) -> dict[str, Any]:
    """Return times in ms and relative errors of all variants for one shape."""
    b, a = factors(SHAPES[name], dtype, device)
    rows, columns, examples, tokens = SHAPES[name]
    expected = exact_sum(b, a)
    total = torch.zeros(rows, columns, device=device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    tiling, splits = plan(rows, columns, examples, tokens, processors)
    found: dict[str, Any] = {"planned": asdict(tiling) | {"splits": splits}, "ms": {}, "error": {}}
    calls = baselines(total, b, a)
    calls["planned"] = lambda: add_product_squares(total, b, a)
    if dtype == torch.float32:
        small = replace(TILINGS[4], stages=3)
        calls["kernel ieee"] = lambda: add_product_squares(total, b, a, tiling=small)
        calls["kernel tf32x3"] = lambda: add_product_squares(total, b, a, tiling=small, precision="tf32x3")
        del calls["planned"]
    else:
        for title, variant in VARIANTS.items():
            _, parts = plan(rows, columns, examples, tokens, processors, (variant,))
            calls[title] = lambda variant=variant, parts=parts: add_product_squares(
                total, b, a, tiling=variant, splits=parts
            )
    for title, call in calls.items():

        def run(title: str = title, call: Callable[[], Any] = call) -> None:
            total.zero_()
            call()
            if title != "product":
                found["error"][title] = float((total[:1024].double() - expected).norm() / expected.norm())
            found["ms"][title] = kernel_ms(call, device)

        budget.attempt(f"{name} {dtype} {title}", run, least=3.0 if device.type == "cuda" else 0.0)
    return found


def measure_kernels(device: torch.device, quick: bool, budget: Budget) -> dict[str, Any]:
    """Return times and errors for all shapes, in bfloat16 and some in float32 and float16."""
    if quick:
        return {}
    parts = [(name, torch.bfloat16) for name in SHAPES]
    parts[4:4] = [("query", torch.float32)]
    parts += [("bert", torch.float32), ("query", torch.float16)]
    found = {}
    for name, dtype in parts:
        key = f"{name} {str(dtype).removeprefix('torch.')}"
        found[key] = budget.attempt(key, lambda n=name, d=dtype: measure_shape(n, d, device, budget), least=5.0)
    return found
