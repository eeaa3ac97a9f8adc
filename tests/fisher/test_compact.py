"""Compact forms of a tensor against slow float64 references: bounds for any entries, sizes, and edge cases."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squisher_mergekit.fisher import compact

BOUNDS = {"log8": 0.04, "log4": 0.40}
MUCH = 10**12


def _both_ways(tensor, code):
    return compact.decode(compact.encode(tensor, code, MUCH), code, tensor.shape)


def _errors(tensor, decoded):
    """Assert that only zeros became 0, and return the relative errors of the others in float64."""
    assert decoded.shape == tensor.shape
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded == 0, tensor == 0)
    assert bool(decoded.isfinite().all())
    positive = tensor > 0
    exact = tensor[positive].double()
    return (decoded[positive].double() - exact).abs() / exact


def _drawn(count, low, high, zeros=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(count, generator=generator, dtype=torch.float64) * (high - low) + low
    tensor = (10**exponents).clamp_max(torch.finfo(torch.float32).max).float()
    tensor[torch.rand(count, generator=generator) < zeros] = 0
    return tensor


def _float(bits):
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def _read_slowly(stream, scale, code, count):
    """Decode by the description in the module, one entry at a time, in Python's floats."""
    stream, bits_of, out = stream.tolist(), [], [0.0] * count
    for low, high in scale.tolist():
        half_steps = {bits: 2 ** ((high - low) / 128 / (2**bits - 2) / 2) - 1 for bits in (4, 8)}
        widths = [bits for bits in (4, 8) if bits >= int(code[3:]) and half_steps[bits] <= 0.9975 * BOUNDS[code]]
        bits_of.append(0 if low > high else widths[0] if widths and low >= -126 * 128 else 16)
    place = 0
    for bits in (4, 8, 16):
        for block in [number for number, found in enumerate(bits_of) if found == bits]:
            low, high = scale[block].tolist()
            entries = range(block * 128, min(block * 128 + 128, count))
            for number, entry in enumerate(entries):
                if bits == 4:
                    k = stream[place + number // 2] >> (4 if number % 2 == 0 else 0) & 15
                elif bits == 8:
                    k = stream[place + number]
                else:
                    k = stream[place + 2 * number] + 256 * stream[place + 2 * number + 1]
                if k:
                    out[entry] = 2 ** ((low + (k - 1) * (high - low) / (2**bits - 2)) / 128)
            place += math.ceil(len(entries) * bits / 8)
    assert place == len(stream)
    return torch.tensor(out, dtype=torch.float64)


@settings(max_examples=150)
@given(
    st.lists(st.one_of(st.just(0), st.integers(1, 40), st.integers(1, 0x7F7FFFFF)), min_size=1, max_size=300),
    st.sampled_from(["log8", "log4"]),
)
def test_the_bound_holds_for_any_float32(bits, code):
    """Zeros, denormal numbers and entries up to the largest float32, in any mixture, keep the bound."""
    tensor = torch.tensor([_float(each) for each in bits])
    errors = _errors(tensor, _both_ways(tensor, code))
    assert not len(errors) or errors.max() < BOUNDS[code]


@settings(max_examples=100)
@given(st.floats(-44, 37), st.floats(0, 25), st.sampled_from(["log8", "log4"]), st.integers(0, 10**6))
def test_the_bound_holds_at_any_span(low, span, code, seed):
    """Blocks with a span of any number of decades keep the bound."""
    tensor = _drawn(397, low, min(low + span, 38.5), seed=seed)
    assert _errors(tensor, _both_ways(tensor, code)).max() < BOUNDS[code]


@pytest.mark.parametrize("code", BOUNDS)
def test_the_widest_block_of_a_width_comes_close_to_the_bound(code):
    """The worst error at the largest span of each width is just within the bound. One unit more is wider."""
    for bits, span in compact.CODES[code].spans():
        for more in (0, 1):
            low = -7000 if span < 20000 else -126 * 128
            if low + span > 16383:
                continue
            halves = 10**4
            logs = torch.linspace(low, low + span + more, halves, dtype=torch.float64) / 128
            ends = torch.tensor([low / 128, (low + span + more) / 128], dtype=torch.float64)
            blocks = torch.cat([logs.view(-1, 100), ends.expand(100, 2)], 1)
            blocks = torch.nn.functional.pad(2**blocks, (0, 26)).float().flatten()
            parts = compact.encode(blocks, code, MUCH)
            chosen = compact.CODES[code].bits(parts[".scale"])
            assert (int(chosen.min()) == int(chosen.max()) == bits) is (more == 0)
            worst = _errors(blocks, compact.decode(parts, code, blocks.shape)).max().item()
            assert worst < BOUNDS[code]
            if more == 0 and bits == int(code[3:]):
                assert worst > 0.97 * BOUNDS[code]


@pytest.mark.parametrize("code", BOUNDS)
def test_the_smallest_numbers_keep_the_bound(code):
    """Each of the first 3000 denormal numbers comes back within the bound, also next to the largest number."""
    least = 2.0**-149
    tensor = (torch.arange(1, 3001, dtype=torch.float64) * least).float()
    assert _errors(tensor, _both_ways(tensor, code)).max() < BOUNDS[code]
    ends = torch.tensor([least, torch.finfo(torch.float32).max, 0.0])
    assert _errors(ends, _both_ways(ends, code)).max() < BOUNDS[code]


@pytest.mark.parametrize("code", BOUNDS)
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 127, 128, 129, 130, 255, 256, 257, 641])
def test_the_format_is_the_one_in_the_description(code, count):
    """A reader written from the module's description, one entry at a time, finds the same numbers at any length."""
    kinds = [_drawn(128, -9, -6, seed=1), _drawn(128, -30, 30, seed=2), torch.zeros(128), _drawn(128, -14, -7, seed=3)]
    tensor = torch.cat([*kinds, _drawn(129, -44.5, -39, seed=4)])[-count:] if count else torch.zeros(0)
    parts = compact.encode(tensor, code, MUCH)
    slow = _read_slowly(parts[".code"], parts[".scale"], code, count)
    decoded = compact.decode(parts, code, tensor.shape).double()
    assert torch.allclose(decoded, slow, rtol=2e-7, atol=2.0**-149)


@pytest.mark.parametrize("code", BOUNDS)
def test_order_within_a_block_is_kept(code):
    """Decoding keeps the order of the entries of a block."""
    tensor = _drawn(128, -12, -5).sort().values
    assert bool((_both_ways(tensor, code).diff() >= 0).all())


@pytest.mark.parametrize("code", BOUNDS)
def test_equal_entries_stay_equal_and_near(code):
    """A constant tensor is decoded to one constant within 0.3 %, and powers of two exactly."""
    for value in (1e-12, 0.7, 3.3e38, 2.0**-20, 1.0):
        decoded = _both_ways(torch.full((3, 43), value), code)
        assert len(decoded.unique()) == 1
        assert decoded[0, 0].item() == pytest.approx(value, rel=0.003)
        assert math.frexp(value)[0] != 0.5 or decoded[0, 0].item() == value


def test_sizes():
    """Codes take 26 % and 13 % of float32, twice that for wide spans, and 4 bytes for 128 zeros."""

    def share(tensor, code):
        parts = compact.encode(tensor, code, MUCH)
        return sum(part.numel() * part.itemsize for part in parts.values()) / 4 / tensor.numel()

    usual = _drawn(128 * 101, -9, -6)
    assert share(usual, "log8") == pytest.approx(0.25 + 1 / 128)
    assert share(usual, "log4") == pytest.approx(0.125 + 1 / 128)
    assert share(_drawn(128 * 101, -12, -4), "log4") == pytest.approx(0.25 + 1 / 128, rel=0.01)
    assert share(torch.zeros(128 * 101), "log4") == pytest.approx(1 / 128)
    assert share(_drawn(128 * 101, -30, 30), "log8") == pytest.approx(0.5 + 1 / 128)
    assert share(_drawn(7, -9, -6), "log4") == pytest.approx(8 / 28)


@pytest.mark.parametrize("code", compact.NAMES)
def test_parts_that_are_not_smaller_are_not_made(code):
    """An encoding that needs the allowed bytes or more gives None. With a limit one byte higher it gives parts."""
    assert compact.encode(torch.tensor(3.0), code, 4) is None
    assert compact.encode(torch.ones(0, 3), code, 0) is None
    tensor = _drawn(143, -9, -6, zeros=0).view(13, 11)
    size = sum(part.numel() * part.itemsize for part in compact.encode(tensor, code, MUCH).values())
    assert compact.encode(tensor, code, size) is None
    assert compact.encode(tensor, code, size + 1) is not None


@pytest.mark.parametrize("shape", [(29,), (2, 2), (1, 31), (31, 1), ()])
def test_rank1_skips_tensors_that_would_not_shrink(shape):
    """Vectors, scalars and matrices with as many means as entries have no rank-1 form."""
    tensor = torch.ones(shape)
    assert compact.encode(tensor, "rank1", 4 * tensor.numel()) is None


@pytest.mark.parametrize("shape", [(13, 7), (3, 11, 5), (2, 3, 5, 7), (5, 1, 3), (1, 2, 3)])
@pytest.mark.parametrize("decades", [(-38, -30), (-9, -5), (-38, 30), (20, 30)])
def test_rank1_is_row_mean_times_column_mean_over_mean(shape, decades):
    """The rank-1 form equals row mean times column mean over mean.

    Batches and entries from 1e-38 to 1e30 agree with float64.
    """
    tensor = _drawn(math.prod(shape), *decades).view(shape)
    parts = compact.encode(tensor, "rank1", MUCH)
    exact = tensor.double()
    row, col = exact.mean(-1), exact.mean(-2)
    assert torch.allclose(parts[".row"].double(), row, rtol=1e-6, atol=2.0**-149)
    assert torch.allclose(parts[".col"].double(), col, rtol=1e-6, atol=2.0**-149)
    mean = row.mean(-1)[..., None, None]
    reference = torch.where(mean == 0, 0.0, row[..., :, None] * col[..., None, :] / mean)
    decoded = compact.decode(parts, "rank1", shape).double()
    assert decoded.shape == tensor.shape
    normal = reference > 1e-30 if decades[0] == -38 else reference >= 0
    assert torch.allclose(decoded[normal], reference[normal], rtol=1e-6, atol=0)
    assert torch.allclose(decoded, reference.clamp_max(3.4e38), rtol=2e-2, atol=1e-44)


@pytest.mark.parametrize("shape", [(5, 0, 3), (5, 3, 0), (0, 3, 5), (0, 7)])
def test_rank1_of_an_empty_tensor_is_empty(shape):
    """A tensor without entries decodes to one of its shape."""
    assert _both_ways(torch.ones(shape), "rank1").shape == shape


def test_rank1_is_exact_where_the_tensor_is_of_rank_one():
    """An outer product comes back exactly. Rows and columns of zeros stay 0, and so does a zero matrix."""
    row, col = _drawn(17, -9, -6, zeros=0.3).double(), _drawn(11, -3, 3, zeros=0.3, seed=1).double()
    tensor = torch.stack([row[:, None] * col, torch.zeros(17, 11)]).float()
    decoded = _both_ways(tensor, "rank1")
    assert torch.allclose(decoded, tensor, rtol=1e-6, atol=0)
    assert torch.equal(decoded == 0, tensor == 0)


def test_rank1_neither_overflows_nor_loses_a_row():
    """A single large entry among small ones stays finite.

    A row with only the smallest number keeps a positive entry.
    """
    tensor = torch.full((5, 7), 1e-38)
    tensor[2, 3] = torch.finfo(torch.float32).max
    decoded = _both_ways(tensor, "rank1")
    assert bool(decoded.isfinite().all())
    assert decoded[2, 3].item() == pytest.approx(3.4e38, rel=0.01)
    lonely = torch.zeros(5, 7)
    lonely[1, 2] = 2.0**-149
    assert bool((compact.encode(lonely, "rank1", MUCH)[".row"] > 0).tolist() == [False, True, False, False, False])
    assert _both_ways(torch.full((5, 7), torch.finfo(torch.float32).max), "rank1").isfinite().all()


@pytest.mark.parametrize("code", compact.NAMES)
@pytest.mark.parametrize("shape", [(37, 29), (7, 5, 31), (41, 3, 5)])
def test_chunks_change_nothing(monkeypatch, code, shape):
    """Small chunks give the bits of a single chunk, and strides do not matter."""
    tensor = _drawn(math.prod(shape), -13, -5).view(shape)
    whole = compact.encode(tensor, code, MUCH)
    decoded = compact.decode(whole, code, shape)
    turned = tensor.transpose(0, 1).contiguous().transpose(0, 1)
    monkeypatch.setattr(compact, "_CHUNK", 128)
    for pieces in (compact.encode(tensor, code, MUCH), compact.encode(turned, code, MUCH)):
        assert all(torch.allclose(pieces[suffix], part, rtol=1e-6) for suffix, part in whole.items())
        assert torch.allclose(compact.decode(pieces, code, shape), decoded, rtol=1e-6)
    assert torch.equal(compact.decode(whole, code, shape), decoded)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({".code": lambda part: part[:-1]}, "bytes of codes"),
        ({".code": lambda part: torch.cat([part, part])}, "bytes of codes"),
        ({".scale": lambda part: part[1:]}, "2 blocks"),
        ({".scale": lambda part: part * 0}, "bytes of codes"),
        ({".scale": lambda part: part * 0 + 16385}, "beyond the range"),
        ({".scale": lambda part: part * 0 - 19073}, "beyond the range"),
    ],
)
def test_parts_that_cannot_belong_together_are_refused(change, said):
    """Truncated or repeated codes and missing or impossible scales raise a ValueError that names the part."""
    parts = compact.encode(torch.cat([_drawn(128, -9, -6), _drawn(13, -30, 30)]), "log4", MUCH)
    parts = {suffix: change.get(suffix, lambda part: part)(part) for suffix, part in parts.items()}
    with pytest.raises(ValueError, match=said):
        compact.decode(parts, "log4", (141,))


@pytest.mark.parametrize("code", ["log8", "log4"])
def test_blocks_of_zeros_are_zeros_whatever_memory_held(code, monkeypatch):
    """A block of zeros has no codes: nothing but the start value of the result makes it 0."""
    tensor = torch.zeros(5 * compact.BLOCK)
    tensor[: compact.BLOCK] = torch.rand(compact.BLOCK) + 0.1
    parts = compact.encode(tensor, code, 4 * tensor.numel())
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(-7))
    found = compact.decode(parts, code, tensor.shape)
    assert torch.equal(found == 0, tensor == 0)


def test_the_means_are_on_the_device_of_the_tensor():
    """A Fisher on an accelerator is encoded there; the device without memory stands for one."""
    parts = compact.encode(torch.empty(13, 7, device="meta"), "rank1", MUCH)
    assert {suffix: (part.device.type, part.shape) for suffix, part in parts.items()} == {
        ".row": ("meta", (13,)),
        ".col": ("meta", (7,)),
    }
