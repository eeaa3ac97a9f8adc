"""Compact forms of a Fisher tensor: logarithmic codes in blocks, and rank 1. Pure functions and their inverses.

``log8`` and ``log4`` cut the flattened tensor into blocks of 128 entries (the last block may be short). ``NAME.scale``,
int16, has the pair ``(low, high)`` of each block, in 1/128 octave: the positive entries are between ``2^(low/128)`` and
``2^(high/128)``; a block with ``low > high`` has no positive entry. Code 0 is an exact 0. Code k, at most n, is

    F = 2^(s / 128),  s = low + (k - 1) (high - low) / (n - 1),  n = 2^bits - 1

``bits`` is the smallest of the widths 8 and 16 (``log8``) or 4, 8 and 16 (``log4``) that keeps the relative error below
4 % (``log8``) or 40 % (``log4``); it is 0 in a block of zeros. Low and high alone determine it (:meth:`LogCode.bits`).

``NAME.code``, uint8, concatenates the codes of all 4-bit blocks, then all 8-bit blocks, then all 16-bit blocks. Two
4-bit codes share a byte, the first in the high half; a 16-bit code has its low byte first. A short last block has no
padding. The metadata of the header have the tensor's shape as JSON, under ``NAME.shape``.

``rank1`` keeps the means over the last axis (``NAME.row``) and over the last but one (``NAME.col``), float32:

    F_ij = row_i col_j / mean(row)

Leading axes are a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from squisher_mergekit.errors import ConfigError

BLOCK = 128
_UNIT = 128  # steps of low and high in an octave
_LEAST = -149 * _UNIT  # the smallest float32
_NORMAL = -126 * _UNIT  # below, float32 itself has steps that add to the error
_MOST = 128 * _UNIT
_CHUNK = 1 << 18  # entries per step: their float64 copy fits a core's cache
_LAUNCH = 16  # times as many on an accelerator, which has no such cache and a cost for each launch
_SMALLEST = 2.0**-149
_LARGEST = torch.finfo(torch.float32).max

LOG, RANK1 = (".code", ".scale"), (".row", ".col")


@dataclass(frozen=True)
class LogCode:
    """A logarithmic code.

    Args:
        widths: Possible sizes of one code, in bits, ascending.
        error: Bound on the relative error.

    Example:
        >>> CODES["log4"].spans()
        ((4, 1736), (8, 31497))
    """

    widths: tuple[int, ...]
    error: float

    def spans(self) -> tuple[tuple[int, int], ...]:
        """Return ``(width, largest high - low within the error bound)`` of each width but the last, which fits all."""
        # A little less than the bound: logarithms are rounded too.
        half_step = math.log2(1 + self.error * 0.9975) * _UNIT
        return tuple((bits, int(2 * half_step * (2**bits - 2))) for bits in self.widths[:-1])

    def bits(self, scale: Tensor) -> Tensor:
        """Return the bits per entry of each block."""
        low, high = scale.int().unbind(-1)
        bits = torch.full_like(low, self.widths[-1])
        for width, span in reversed(self.spans()):
            bits[(high - low <= span) & (low >= _NORMAL)] = width
        bits[low > high] = 0
        return bits

    def sizes(self, bits: Tensor, count: int) -> dict[int, int]:
        """Return width -> bytes of its codes, for a tensor with ``count`` entries."""
        sizes = {width: int((bits == width).sum()) * BLOCK * width // 8 for width in self.widths}
        if len(bits):
            last = int(bits[-1])
            sizes[last] = sizes.get(last, 0) - (-count % BLOCK) * last // 8
        return sizes


CODES = {"log8": LogCode((8, 16), 0.04), "log4": LogCode((4, 8, 16), 0.40)}
Compression = Literal["log8", "log4", "rank1"]
NAMES: tuple[str, ...] = get_args(Compression)


def check_name(code: str | None) -> None:
    """Raise if ``code`` is not None or the name of a compact form.

    Raises:
        ConfigError: The name is unknown.
    """
    if code is not None and code not in NAMES:
        raise ConfigError(f"compress must be None or one of {', '.join(NAMES)}, found {code!r}")


def suffixes(code: str) -> tuple[str, str]:
    """Return the two suffixes that name the parts of a compact tensor.

    Example:
        >>> suffixes("log8"), suffixes("rank1")
        (('.code', '.scale'), ('.row', '.col'))
    """
    return LOG if code in CODES else RANK1


def encode(tensor: Tensor, code: str, most: int) -> dict[str, Tensor] | None:
    """Encode a tensor.

    Args:
        tensor: Finite float32 entries, none negative.
        code: ``log8``, ``log4`` or ``rank1``.
        most: Size of the plain tensor in bytes.

    Returns:
        Suffix -> part; None if the parts would not be smaller than ``most``.

    Example:
        >>> parts = encode(torch.tensor([[0.0, 1.0, 2.0], [0.0, 2.0, 4.0]]), "rank1", 24)
        >>> parts[".row"], parts[".col"]
        (tensor([1., 2.]), tensor([0.0000, 1.5000, 3.0000]))
        >>> decode(parts, "rank1", (2, 3))
        tensor([[0., 1., 2.],
                [0., 2., 4.]])
        >>> encode(torch.ones(3), "rank1", 12) is None
        True
    """
    if code == "rank1" and (tensor.ndim < 2 or 4 * rank1_entries(tensor.shape) >= most):
        return None
    parts = _rank1(tensor) if code == "rank1" else _log(tensor.reshape(-1), CODES[code])
    return parts if sum(part.numel() * part.itemsize for part in parts.values()) < most else None


def decode(parts: Mapping[str, Tensor], code: str, shape: Sequence[int]) -> Tensor:
    """Decode a tensor to float32.

    Args:
        parts: Suffix -> part, as from :func:`encode`.
        code: The name of the compact form.
        shape: Shape of the tensor.

    Raises:
        ValueError: The sizes of the parts do not fit each other or the shape.

    Example:
        >>> parts = encode(torch.tensor([0.0, 1.0, 2.0, 4.0]), "log8", 16)
        >>> parts[".code"], parts[".scale"]
        (tensor([  0,   1, 128, 255], dtype=torch.uint8), tensor([[  0, 256]], dtype=torch.int16))
        >>> decode(parts, "log8", (2, 2))
        tensor([[0., 1.],
                [2., 4.]])
    """
    if code == "rank1":
        return outer_of_means(parts[".row"], parts[".col"])
    return _unlog(parts[".code"], parts[".scale"], CODES[code], math.prod(shape)).reshape(tuple(shape))


def rank1_entries(shape: Sequence[int]) -> int:
    """Return the number of row means and column means of a tensor."""
    *batch, rows, columns = shape
    return math.prod(batch) * (rows + columns)


# ---- logarithmic codes


def _log(flat: Tensor, code: LogCode) -> dict[str, Tensor]:
    """Encode a flat tensor in a logarithmic code."""
    scales: list[Tensor] = []
    packed: dict[int, list[Tensor]] = {width: [] for width in code.widths}
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        blocks = torch.nn.functional.pad(chunk, (0, -chunk.numel() % BLOCK)).view(-1, BLOCK)
        logs = blocks.log2().mul_(_UNIT)  # -inf for 0
        scale = _scale(logs)
        bits = code.bits(scale)
        for width in code.widths:
            chosen = bits == width
            packed[width].append(_pack(_number(logs[chosen], scale[chosen], width), width))
        scales.append(scale)
    scale = torch.cat(scales) if scales else torch.zeros(0, 2, dtype=torch.int16, device=flat.device)
    sizes = code.sizes(code.bits(scale), flat.numel())
    streams = [torch.cat(some)[: sizes[width]] for width, some in packed.items() if some]
    return {
        ".code": torch.cat(streams) if streams else torch.zeros(0, dtype=torch.uint8, device=flat.device),
        ".scale": scale,
    }


def _scale(logs: Tensor) -> Tensor:
    """Return low and high of each block, or (1, 0) for a block of zeros."""
    high = logs.amax(-1).ceil()
    low = torch.where(logs == -math.inf, math.inf, logs).amin(-1).floor().clamp_min(_LEAST)
    empty = high == -math.inf
    return torch.stack([torch.where(empty, 1, low), torch.where(empty, 0, high)], -1).to(torch.int16)


def _number(logs: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the codes of blocks of one width, as int32."""
    low, high = scale.to(logs.dtype).unbind(-1)
    last = 2**bits - 2
    per_unit = last / (high - low).clamp_min(1)
    codes = ((logs - low[:, None]) * per_unit[:, None]).round_().clamp_(0, last) + 1
    return torch.where(logs == -math.inf, 0, codes).to(torch.int32)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Pack the codes of blocks of one width into bytes."""
    if bits == 4:
        return (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).reshape(-1)
    if bits == 8:
        return codes.to(torch.uint8).reshape(-1)
    return torch.stack([codes & 255, codes >> 8], -1).to(torch.uint8).reshape(-1)


def _unpack(stream: Tensor, bits: int) -> Tensor:
    """Unpack bytes into the codes of blocks of one width."""
    if bits == 4:
        return torch.stack([stream >> 4, stream & 15], -1).view(-1, BLOCK)
    if bits == 8:
        return stream.view(-1, BLOCK)
    pairs = stream.view(-1, BLOCK, 2).int()
    return pairs[..., 0] | pairs[..., 1] << 8


def _unlog(stream: Tensor, scale: Tensor, code: LogCode, count: int) -> Tensor:
    """Return the entries of all blocks, in order.

    Raises:
        ValueError: The size of a part, or a scale, is impossible.
    """
    if scale.shape != (-(-count // BLOCK), 2):
        raise ValueError(f"{count} entries make {-(-count // BLOCK)} blocks, but {len(scale)} blocks have a scale")
    highest = int(scale.max()) if len(scale) else 0
    if len(scale) and (int(scale.min()) < _LEAST or highest > _MOST):
        raise ValueError("a block has a scale beyond the range of float32")
    bits = code.bits(scale)
    sizes = code.sizes(bits, count)
    if sum(sizes.values()) != stream.numel():
        raise ValueError(f"its scales need {sum(sizes.values())} bytes of codes, but it has {stream.numel()}")
    out = torch.zeros(len(scale), BLOCK, dtype=torch.float32, device=scale.device)  # blocks of zeros are in no group
    step = _CHUNK // BLOCK * (1 if out.is_cpu else _LAUNCH)
    begin = 0
    for width in code.widths:
        group = stream[begin : begin + sizes[width]]
        begin += sizes[width]
        places = (bits == width).nonzero().squeeze(-1)
        size = BLOCK * width // 8  # bytes a block
        for start in range(0, len(places), step):
            # Blocks of one width alone follow one another, and need no index.
            some = slice(start, start + step) if len(places) == len(scale) else places[start : start + step]
            blocks = scale[some]
            codes = group[start * size : (start + len(blocks)) * size]
            if len(codes) < len(blocks) * size:
                codes = torch.nn.functional.pad(codes, (0, len(blocks) * size - len(codes)))
            out[some] = _value(_unpack(codes, width), blocks, width, highest == _MOST)
    return out.view(-1)[:count]


def _value(codes: Tensor, scale: Tensor, bits: int, clamp: bool) -> Tensor:
    """Return the entries that the codes of blocks of one width stand for, in float32.

    ``clamp`` is True if a scale reaches the end of float32's range.
    """
    low, high = scale.to(torch.float64).unbind(-1)
    step = (high - low) / ((2**bits - 2) * _UNIT)
    # In float64: float32 has too few digits for a step of 16 bits, and no room above its largest number.
    logs = torch.addcmul((low / _UNIT - step)[:, None], codes.to(torch.float64), step[:, None])
    values = logs.exp2_()
    values = (values.clamp_max_(_LARGEST) if clamp else values).to(torch.float32)
    # Few tensors have zeros, and looking for one is cheaper than a mask. A GPU would wait for the answer.
    return values if codes.is_cpu and bool(codes.all()) else values.mul_(codes != 0)


# ---- rank 1


def _rank1(tensor: Tensor) -> dict[str, Tensor]:
    """Encode a tensor by its row means and column means."""
    *batch, rows, columns = tensor.shape
    whole = tensor.reshape(math.prod(batch), rows, columns)
    row = torch.zeros(whole.shape[:2], dtype=torch.float64, device=tensor.device)
    col = torch.zeros(len(whole), columns, dtype=torch.float64, device=tensor.device)
    for one, some in _slabs(*whole.shape):
        slab = whole[one, some].to(torch.float64)
        row[one, some] = slab.mean(-1)
        col[one] += slab.sum(-2) / rows
    return {".row": to_float32(row).view(*batch, rows), ".col": to_float32(col).view(*batch, columns)}


def to_float32(means: Tensor) -> Tensor:
    """Round means to float32, and keep positive ones positive."""
    return torch.where(means > 0, means.clamp_min(_SMALLEST), means).to(torch.float32)


def outer_of_means(row: Tensor, col: Tensor) -> Tensor:
    """Return ``row_i col_j / mean(row)`` in float32, or 0 where all row means are 0.

    The computation runs in float64: a quotient below float32's range can belong to a product within it.

    Args:
        row: Means over the last axis, shape ``(..., m)``.
        col: Means over the last but one, shape ``(..., n)``.

    Example:
        >>> outer_of_means(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0, 0.0]))
        tensor([[1., 2., 0.],
                [3., 6., 0.]])
    """
    batch = math.prod(row.shape[:-1])
    rows = row.to(torch.float64).reshape(batch, row.shape[-1])
    columns = col.to(torch.float64).reshape(batch, col.shape[-1])
    # Absolute, so that negative rows of a damaged file do not cancel out.
    mean = rows.mean(-1, keepdim=True).abs()
    rows = torch.where(mean == 0, 0.0, rows / mean)
    out = torch.empty(*rows.shape, columns.shape[-1], dtype=torch.float32, device=row.device)
    for one, some in _slabs(*out.shape):
        out[one, some] = (rows[one, some, None] * columns[one, None, :]).clamp_max_(_LARGEST)
    return out.view(*row.shape, col.shape[-1])


def _slabs(batch: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of a batch of matrices, in whole rows, that fit a core's cache."""
    height = max(1, min(rows, _CHUNK // max(columns, 1)))
    depth = max(1, _CHUNK // max(rows * columns, 1)) if height == rows else 1
    for one in range(0, batch, depth):
        for some in range(0, rows, height):
            yield slice(one, one + depth), slice(some, some + height)
