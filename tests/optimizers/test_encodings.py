"""Encodings of a second moment, computed per entry from their source."""

from pathlib import Path

import pytest
import torch
import transformers

from squisher_mergekit.errors import CorruptFileError, UnsupportedStateError
from squisher_mergekit.optimizers.checkpoints.stand_ins import QuantizedStandIn
from squisher_mergekit.optimizers.checkpoints.torch_save import content
from squisher_mergekit.optimizers.slots import parse
from squisher_mergekit.tensors.lazy import read

FILE = Path("optimizer.pt")
_BETAS = {"betas": (0.9, 0.97)}
_M = torch.rand(5, 7)


ADAFACTORS = {
    "torch.optim.Adafactor": lambda p: torch.optim.Adafactor(p),
    "transformers.optimization.Adafactor": lambda p: transformers.Adafactor(p, lr=1e-3, relative_step=False),
}


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 5)])
@pytest.mark.parametrize("name", ADAFACTORS)
def test_adafactor_is_the_outer_product_of_its_means(name, shape):
    """Row and column means follow v = b_t v + (1 - b_t) g^2 with 1 - b_t = t^-0.8, and need no bias correction."""
    parameter = torch.nn.Parameter(torch.ones(shape))
    optimizer = ADAFACTORS[name]([parameter])
    generator = torch.Generator().manual_seed(3)
    mean = torch.zeros(shape, dtype=torch.float64)
    for step in range(1, 5):
        parameter.grad = torch.randn(shape, generator=generator)
        optimizer.step()
        mean += (parameter.grad.double() ** 2 - mean) * step**-0.8
    (slot,) = parse(content(optimizer.state_dict(), FILE)).slots
    if len(shape) > 1:
        rows, columns = mean.mean(-1), mean.mean(-2)
        mean = rows[..., None] * columns[..., None, :] / rows.mean(-1)[..., None, None]
    assert slot.tensor.shape == shape
    torch.testing.assert_close(read(slot.tensor).double(), mean, rtol=1e-5, atol=0)
    assert (slot.moment.class_, slot.moment.decay, slot.moment.corrected, slot.steps) == (name, None, True, 4)


def test_row_and_column_means_must_belong_together():
    """Means of different leading shapes are refused as damaged."""
    parameter = torch.nn.Parameter(torch.ones(5, 3))
    optimizer = torch.optim.Adafactor([parameter])
    parameter.grad = torch.ones(5, 3)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["col_var"] = torch.ones(2, 1, 3)
    with pytest.raises(CorruptFileError, match="must belong together"):
        parse(content(state, FILE))


def _bitsandbytes(wrapped, **changes):
    """Return the state of a 17 x 31 parameter in bitsandbytes' format, and its second moment per entry."""
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 256, (17, 31), generator=generator, dtype=torch.uint8)
    levels, scales = torch.rand(256, generator=generator), torch.rand(3, generator=generator)
    inner = {"state1": codes, "state2": codes, "qmap1": levels, "qmap2": levels, "absmax1": scales, "absmax2": scales}
    inner = {key: value for key, value in {**inner, **changes}.items() if value is not None}
    state = {"step": 3, "__bnb_optimizer_quant_state__": inner} if wrapped else {"step": 3, **inner}
    expected = [levels[int(code)] * scales[i // 256] for i, code in enumerate(codes.flatten())]
    groups = [{"params": [0], "betas": (0.9, 0.99)}]
    return {"state": {0: state}, "param_groups": groups}, torch.stack(expected).reshape(17, 31)


@pytest.mark.parametrize("wrapped", [False, True])
def test_eight_bits_are_levels_times_the_scale_of_their_block(wrapped):
    """Both generations of bitsandbytes' files decode to level times scale, with a short last block."""
    state, expected = _bitsandbytes(wrapped)
    (slot,) = parse(content(state, FILE)).slots
    assert torch.equal(read(slot.tensor), expected)
    assert (slot.tensor.shape, slot.moment.decay, slot.steps) == ((17, 31), 0.99, 3)


@pytest.mark.parametrize(
    "changes",
    [{"absmax2": torch.ones(2)}, {"qmap2": torch.ones(255)}, {"absmax2": None}, {"state2": torch.ones(17, 31)}],
)
def test_eight_bits_whose_parts_do_not_fit_are_refused(changes):
    """Missing scales, missing levels, an empty table and invalid codes are refused."""
    state, _ = _bitsandbytes(True, **changes)
    with pytest.raises(CorruptFileError, match="do not belong together"):
        parse(content(state, FILE))


def _torchao(kind, shape, **parts):
    """Return a tensor in torchao's format, through the stand-in that replaces it."""
    tensor = torch.Tensor._make_wrapper_subclass(QuantizedStandIn, shape)
    tensor.__dict__.update(parts)
    group = {**_BETAS, "params": [0]}
    return {"state": {0: {"step": torch.tensor(3.0), "exp_avg": _M, kind: tensor}}, "param_groups": [group]}


def _parts(form):
    generator = torch.Generator().manual_seed(9)
    shape, scale = (16, 32), torch.rand(4, generator=generator)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if form == "8 bits":
        qmap = torch.rand(256, generator=generator)
        flat = [qmap[int(code)] * scale[i // 128] for i, code in enumerate(codes.flatten())]
        return shape, {"codes": codes, "scale": scale, "qmap": qmap}, torch.stack(flat).reshape(shape)
    if form == "4 bits":
        qmap = torch.rand(16, generator=generator)
        packed = codes.flatten()[:256]
        halves = [part for code in packed.tolist() for part in (code >> 4, code & 15)]
        flat = [qmap[half] * scale[i // 128] for i, half in enumerate(halves)]
        return shape, {"codes": packed, "scale": scale, "qmap": qmap, "_shape": shape}, torch.stack(flat).reshape(shape)
    codes = torch.rand(shape, generator=generator).to(torch.float8_e4m3fn)
    flat = [code * scale[i // 128] for i, code in enumerate(codes.flatten().float())]
    return shape, {"codes": codes, "scale": scale}, torch.stack(flat).reshape(shape)


@pytest.mark.parametrize("form", ["8 bits", "4 bits", "float8"])
def test_torchaos_codes_are_levels_times_the_scale_of_their_block(form):
    """All three forms decode to level times scale, entry by entry."""
    shape, parts, expected = _parts(form)
    (slot,) = parse(content(_torchao("exp_avg_sq", shape, **parts), FILE)).slots
    assert torch.equal(read(slot.tensor), expected)
    assert slot.shape == shape


@pytest.mark.parametrize("form", ["8 bits", "4 bits", "float8"])
@pytest.mark.parametrize("part", ["codes", "scale"])
def test_torchaos_parts_must_belong_together(form, part):
    """Missing parts and parts of another size are refused as damaged."""
    shape, parts, _ = _parts(form)
    for other in (parts[part].flatten()[:-1], None):
        with pytest.raises(CorruptFileError, match="must belong together"):
            parse(content(_torchao("exp_avg_sq", shape, **{**parts, part: other}), FILE))


def test_a_stride_of_zero_claims_no_memory():
    """A tensor with more entries than its storage has bytes is refused without an expansion."""
    state = {"exp_avg_sq": torch.rand(1).expand(1 << 40), "step": 3}
    with pytest.raises(CorruptFileError, match="must have bytes of its own"):
        parse(content({"state": {0: state}, "param_groups": [{**_BETAS, "params": [0]}]}, FILE))


def test_older_files_of_bitsandbytes_have_blocks_of_2048_entries():
    """The number of scales tells the size of the blocks."""
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(0, 256, (59, 73), generator=generator, dtype=torch.uint8)
    state, _ = _bitsandbytes(False, state2=codes, absmax2=torch.tensor([0.5, 2.0, 7.0]))
    levels = state["state"][0]["qmap2"]
    (slot,) = parse(content(state, FILE)).slots
    expected = [levels[int(code)] * (0.5, 2.0, 7.0)[i // 2048] for i, code in enumerate(codes.flatten())]
    assert torch.equal(read(slot.tensor), torch.stack(expected).reshape(59, 73))


@pytest.mark.parametrize("bits", [8, 32])
def test_a_state_of_bitsandbytes_in_another_order_of_memory_is_refused(bits):
    """It follows the memory of a weight that was not contiguous at the first step, so that its axes mean nothing."""
    state, _ = _bitsandbytes(True)
    inner = state["state"][0]["__bnb_optimizer_quant_state__"]
    inner["state2"] = inner["state2"].T.contiguous().T
    if bits == 32:
        inner["state2"] = inner["state2"].float()
        del inner["qmap2"], inner["absmax2"]
    with pytest.raises(UnsupportedStateError, match=r"contiguous, .* strides \[1, 17\] for shape \[17, 31\]"):
        parse(content(state, FILE))
