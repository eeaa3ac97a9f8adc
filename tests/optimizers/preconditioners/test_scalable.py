"""States of ScalableShampoo: read without its classes, in tiles of any size, with and without grafting."""

import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import CorruptFileError, SquisherError, UnsafeFileError
from squisher_mergekit.optimizers.preconditioners.recognise import preconditioned
from squisher_mergekit.optimizers.preconditioners.scalable import Tiles, scalable_shampoo
from tests.optimizers.preconditioners.runs import BETA2, FIXTURES, NAMES, STEPS


class Kept:
    """Object with attributes, as the stand-ins of a file have."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


def _state(gradients, cuts, leading=0, **changes):
    """Return the state that the optimizer keeps of a matrix whose sides are cut into ``cuts``."""
    tiles = []
    for rows in cuts[0]:
        for columns in cuts[1]:
            pair = [torch.zeros(1, 1)] * leading + [
                torch.zeros(len(rows), len(rows)),
                torch.zeros(len(columns), len(columns)),
            ]
            for gradient in gradients:
                tile = gradient[rows][:, columns]
                pair[-2] = BETA2 * pair[-2] + (1 - BETA2) * tile @ tile.T
                pair[-1] = BETA2 * pair[-1] + (1 - BETA2) * tile.T @ tile
            tiles += pair
    shape = gradients[0].shape
    sizes = [(axis + leading, [len(cut) for cut in each]) for axis, each in enumerate(cuts) if len(each) > 1]
    found = {
        "original_shape": shape, "transformed_shape": [1] * leading + list(shape), "rank": 2 + leading, "beta2": BETA2,
        "matrix_eps": 0.0, "statistics": tiles, "partitioner": Kept(split_sizes=sizes), **changes,
    }  # fmt: skip
    return {"pre_conditioner": Kept(**found), "graft": Kept(momentum=torch.zeros(shape))}


def _cut(size, width):
    return [list(range(start, min(start + width, size))) for start in range(0, size, width)]


@pytest.mark.parametrize(("shape", "block"), [((7, 11), 3), ((5, 4), 8), ((6, 3), 3), ((2, 9), 4), ((13, 17), 5)])
@pytest.mark.parametrize("leading", [0, 1])
def test_a_factor_is_the_sum_over_the_tiles(shape, block, leading):
    """Each block is that of the whole gradient, whether or not the block divides the sides."""
    generator = torch.Generator().manual_seed(block)
    gradients = [torch.randn(shape, generator=generator) for _ in range(4)]
    state = _state(gradients, [_cut(size, block) for size in shape], leading)
    found = scalable_shampoo(state, {"betas": (0.9, BETA2), "step": 4}, "here")
    for side, size, turn in zip(found.factors, shape, (False, True), strict=True):
        wanted = 0
        for gradient in gradients:
            matrix = (gradient.T if turn else gradient).double()
            wanted = BETA2 * wanted + (1 - BETA2) * matrix @ matrix.T
        for number, rows in enumerate(_cut(size, block)):
            torch.testing.assert_close(
                side.read()[number, : len(rows), : len(rows)].double(), wanted[rows][:, rows], rtol=1e-5, atol=1e-6
            )
    squares = sum((1 - BETA2) * BETA2 ** (3 - i) * g.double().square() for i, g in enumerate(gradients))
    torch.testing.assert_close(found.tensor.read().double().sum(1), squares.sum(1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.tensor.read().double().sum(0), squares.sum(0), rtol=1e-5, atol=1e-7)


def test_grafting_by_squares_gives_the_diagonal_of_every_tensor():
    """RMSProp's average and AdaGrad's sum are the second moment; without them a vector has none."""
    rmsprop, adagrad, plain = (
        load_fisher(FIXTURES / kind / "optimizer.pt", names=NAMES)
        for kind in ("scalable_rmsprop", "scalable_adagrad", "scalable")
    )
    truth = load_file(FIXTURES / "scalable_rmsprop" / "truth.safetensors")
    torch.testing.assert_close(rmsprop["0.bias"].double(), truth["0.bias.row_sums"], rtol=1e-5, atol=1e-9)
    assert (rmsprop.config.beta2_of("0.bias"), rmsprop.config.steps) == (BETA2, STEPS)
    assert (adagrad.config.statistic, adagrad.factors.info.statistic) == ("sum", "ema")
    assert adagrad.factors.info.decay == BETA2
    assert sorted(plain) == ["0.weight", "2.weight"]
    assert plain.config.optimizer.class_ == "ScalableShampoo"


@pytest.mark.parametrize(
    "changes",
    [
        {"statistics": [torch.eye(3)] * 3},
        {"statistics": [torch.eye(3), torch.eye(4)]},
        {"statistics": [torch.eye(3), "text"]},
        {"matrix_eps": "text"},
        {"beta2": None},
        {"original_shape": 3},
        {"partitioner": None},
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused_in_one_line(changes):
    """Factors of other sizes or numbers, and settings of other types, give no Fisher."""
    state = _state([torch.randn(3, 3)], [_cut(3, 9), _cut(3, 9)], **changes)
    with pytest.raises(SquisherError) as found:
        preconditioned(state, {"betas": (0.9, BETA2), "step": 4}, "here")
    assert "\n" not in str(found.value)


def test_one_side_alone_has_no_factors():
    """A matrix with merged axes, or preconditioned over one side, has no factors, and no diagonal without grafting."""
    state = _state([torch.randn(3, 5)], [_cut(3, 9), _cut(5, 9)], rank=1)
    found = scalable_shampoo(state, {"betas": (0.9, BETA2), "step": 4}, "here")
    assert (found.factors, found.tensor) == ((None, None), None)
    merged = _state([torch.randn(3, 5)], [_cut(3, 9), _cut(5, 9)], transformed_shape=[15, 1])
    assert scalable_shampoo(merged, {"betas": (0.9, BETA2), "step": 4}, "here").factors == (None, None)


def test_another_object_in_the_file_is_refused(tmp_path):
    """The stand-ins are for the classes of the optimizer alone; another global of its package is not loaded."""
    source = FIXTURES / "scalable" / "optimizer.pt"
    file = tmp_path / "optimizer.pt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(
                name, data.replace(b"BlockPartitioner", b"BlockPartitionex") if name.endswith(".pkl") else data
            )
    with pytest.raises(UnsafeFileError, match="BlockPartitionex"):
        load_fisher(file, names=NAMES)


def test_a_tile_with_a_flipped_bit_is_noticed(tmp_path):
    """The checksums of all tiles are verified."""
    content = bytearray((FIXTURES / "scalable_adagrad" / "optimizer.pt").read_bytes())
    factor = load_file(FIXTURES / "scalable_adagrad" / "truth.safetensors")["2.weight.rows"].numpy().tobytes()
    content[content.index(factor) + len(factor) // 2] ^= 1
    (tmp_path / "optimizer.pt").write_bytes(content)
    with pytest.raises(CorruptFileError):
        load_fisher(tmp_path / "optimizer.pt", names=NAMES).factors.rows["2.weight"]


def test_tiles_are_pickled_as_plain_data():
    """A lazy factor is plain data: workers can take it."""
    tiles = Tiles((torch.eye(2), torch.eye(2)), across=2)
    assert torch.equal(pickle.loads(pickle.dumps(tiles)).read(), 2 * torch.eye(2)[None])


def test_a_factor_is_on_the_device_of_its_tiles():
    """In training the tiles can be on another device than the default one."""
    tiles = tuple(torch.empty(size, size, device="meta") for size in (3, 3, 2, 2))
    assert Tiles(tiles, across=2).read().device.type == "meta"
