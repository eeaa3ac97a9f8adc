"""Fused kernel on the GPU: multiply, square and accumulate, without any per-example gradient in memory.

``total += sum_n (B_n^T A_n)^2`` takes the tensor cores for the product, in float32 accumulators, and squares these in
registers. A loop over :func:`torch.bmm` would write and read each example's gradient instead, which costs about
``590 / T`` times the product itself on an H100, T being the tokens of an example.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from squisher_mergekit.estimators.per_example.kernel_fallback import can_launch, give_up, launching_on
from squisher_mergekit.estimators.per_example.layer_kinds import NARROW

KERNEL = "square"
Precision = Literal["ieee", "tf32x3"]

# Tokens of work that cost as much as writing a tile once, and as squaring it once; for an H100.
_STORE, _SQUARE = 640, 32


@dataclass(frozen=True)
class Tiling:
    """Shape of the work of one program.

    Attributes:
        rows: Rows of a tile of the parameter.
        columns: Columns of a tile of the parameter.
        tokens: Tokens that one product takes.
        warps: Warps of a program.
        stages: Tiles that are loaded ahead.
        speed: Expected speed of a product, relative to that of the largest tiles.
        flat: If True, one loop runs over examples and tokens; if False, one within another.
        tma: If True, the copy engine of Hopper loads the tiles.
    """

    rows: int
    columns: int
    tokens: int
    warps: int
    stages: int
    speed: float = 1.0
    flat: bool = True
    tma: bool = False


# In order of preference where the expected times are equal.
TILINGS = (
    Tiling(128, 128, 64, 8, 4),
    Tiling(128, 128, 32, 8, 4, speed=0.9),
    Tiling(64, 128, 64, 4, 4, speed=0.8),
    Tiling(64, 64, 64, 4, 4, speed=0.6),
    Tiling(64, 64, 32, 4, 4, speed=0.55),
    Tiling(32, 32, 32, 4, 3, speed=0.25),
)
# A card with less shared memory than any of the above asks for.
SMALL = Tiling(64, 64, 32, 4, 2, speed=0.4)


def is_offered(total: Tensor, b: Tensor, a: Tensor) -> bool:
    """Return whether the kernel takes these tensors: bfloat16 or float16 on a GPU that Triton compiles for."""
    narrow = b.dtype == a.dtype and b.dtype in NARROW and total.dtype == torch.float32
    return narrow and can_launch(KERNEL, b)


def add_product_squares(
    total: Tensor,
    b: Tensor,
    a: Tensor,
    *,
    tiling: Tiling | None = None,
    splits: int | None = None,
    precision: Precision = "ieee",
) -> None:
    """Add ``sum_n (B_n^T A_n)^2``, entry by entry, in one launch.

    The sum is the same from run to run: where the examples are split over several programs, each writes its own
    partial sum, and these are added in a fixed order.

    Args:
        total: Shape ``(rows, columns)``, float32.
        b: Shape ``(N, T, rows)``; any strides, bfloat16, float16 or float32.
        a: Shape ``(N, T, columns)``, of the same dtype.
        tiling: Shape of the work of one program; by default the one that :func:`plan` expects to be fastest.
        splits: Parts of the range of examples, at most N; by default as many as fill the GPU.
        precision: Products of float32 inputs: ``ieee``, or ``tf32x3``, three products of tensor cores.
    """
    rows, columns = total.shape
    examples, tokens, _ = b.shape
    if not (total.numel() and examples and tokens):
        return
    planned, parts = plan(rows, columns, examples, tokens, _processors(total.device))
    tiling, splits = tiling or planned, splits or (parts if tiling is None else 1)
    if splits == 1 and total.stride(1) == 1:
        _launch(total.unsqueeze(0), b, a, tiling, precision, add=True)
        return
    partial = torch.empty((splits, rows, columns), dtype=torch.float32, device=total.device)
    _launch(partial, b, a, tiling, precision, add=False)
    total += partial.sum(0)


@functools.lru_cache(4096)
def plan(
    rows: int, columns: int, examples: int, tokens: int, processors: int, tilings: Sequence[Tiling] = TILINGS
) -> tuple[Tiling, int]:
    """Return the tiling, and the number of parts to split the examples into, of the least expected time.

    Args:
        rows: Rows of the parameter.
        columns: Columns of the parameter.
        examples: Number of examples.
        tokens: Tokens of an example.
        processors: Multiprocessors of the GPU.
        tilings: Tilings to choose from.

    Example:
        A large matrix fills an H100 by its tiles, a small one by its examples.

        >>> plan(5632, 2048, 8, 512, 132)[1], plan(768, 768, 32, 128, 132)[1]
        (1, 3)
    """
    choices = [(tiling, splits) for tiling in tilings for splits in range(1, min(examples, 64) + 1)]
    return min(choices, key=lambda choice: _expected(choice[0], choice[1], rows, columns, examples, tokens, processors))


def _expected(
    tiling: Tiling, splits: int, rows: int, columns: int, examples: int, tokens: int, processors: int
) -> float:
    """Return the expected time, in products of one token and one pair of entries on each multiprocessor."""
    tiles = -(-rows // tiling.rows) * -(-columns // tiling.columns)
    waves = -(-tiles * splits // processors)
    work = -(-examples // splits) * (-(-tokens // tiling.tokens) * tiling.tokens + _SQUARE)
    stores = _STORE * (1 if splits == 1 else 2)
    return waves * tiling.rows * tiling.columns * (work / tiling.speed + stores)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _launch(out: Tensor, b: Tensor, a: Tensor, tiling: Tiling, precision: Precision, add: bool) -> None:
    """Run the kernel over ``out``, shape ``(splits, rows, columns)``."""
    from squisher_mergekit.estimators.per_example import square_kernel_triton as device_code

    splits, rows, columns = out.shape
    examples, tokens, _ = b.shape
    tma = tiling.tma and _can_copy(b) and _can_copy(a)
    left: Any = _descriptor(b, tiling.tokens, tiling.rows) if tma else b
    right: Any = _descriptor(a, tiling.tokens, tiling.columns) if tma else a
    grid = (-(-rows // tiling.rows) * -(-columns // tiling.columns), splits)
    with launching_on(out.device):
        device_code.add_squares[grid](
            left, right, out, examples, tokens, rows, columns, *b.stride(), *a.stride(), out.stride(0), out.stride(1),
            splits, ROWS=tiling.rows, COLUMNS=tiling.columns, TOKENS=tiling.tokens, PRECISION=precision,
            FLAT=tiling.flat, TMA=tma, ADD=add, WIDEN=not b.is_cuda, EVEN_TOKENS=tokens % tiling.tokens == 0,
            EVEN_ROWS=rows % tiling.rows == 0, EVEN_COLUMNS=columns % tiling.columns == 0, num_warps=tiling.warps,
            num_stages=tiling.stages,
        )  # fmt: skip


def _can_copy(tensor: Tensor) -> bool:
    """Return whether the copy engine takes a tensor: contiguous columns, everything else in units of 16 bytes."""
    size = tensor.element_size()
    return tensor.stride(2) == 1 and not any(x * size % 16 for x in (*tensor.stride()[:2], tensor.storage_offset()))


def _descriptor(tensor: Tensor, tokens: int, columns: int) -> Any:
    """Return the copy engine's description of a tensor ``(N, T, columns)``."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, tokens, columns])


def try_product_squares(total: Tensor, b: Tensor, a: Tensor) -> bool:
    """Add ``sum_n (B_n^T A_n)^2`` by the kernel where it runs; return whether it did.

    The first failure on a device is logged, and the kernel is not tried there again. Nothing was added then.

    Args:
        total: Shape ``(rows, columns)``.
        b: Shape ``(N, T, rows)``.
        a: Shape ``(N, T, columns)``.
    """
    if not is_offered(total, b, a):
        return False
    try:
        try:
            add_product_squares(total, b, a)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the card has less shared memory, perhaps
            add_product_squares(total, b, a, tiling=SMALL)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        give_up(KERNEL, total, error)
        return False
    return True
