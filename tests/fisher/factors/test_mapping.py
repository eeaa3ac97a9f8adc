"""Factors in the files of portable Fishers: round trips, shards, digests, and refusals of what does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import CorruptFileError, MismatchError, ValuesError
from squisher_mergekit.fisher.compare import compare
from squisher_mergekit.fisher.config import Coverage, FactorsInfo, FisherConfig
from squisher_mergekit.fisher.factors.blocks import second_moments
from squisher_mergekit.fisher.factors.mapping import factors_in_memory
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import write_fisher

SHAPES = {"a.weight": (13, 5), "b.weight": (3, 19), "b.bias": (3,)}
INFO = FactorsInfo(source="recorded", statistic="ema", decay=0.9, every=4, steps=11)


def make(block=4, **config):
    """Return a Fisher with factors over both sides of one matrix and the rows of the other."""
    generator = torch.Generator().manual_seed(5)
    gradients = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    factors = {
        "rows": {name: second_moments(gradients[name], block) for name in ("a.weight", "b.weight")},
        "columns": {"a.weight": second_moments(gradients["a.weight"].T, block)},
    }
    known = factors_in_memory(factors, INFO, SHAPES)
    settings = {"estimator": "empirical", "statistic": "mean", **config}
    return Fisher({n: g.square() for n, g in gradients.items()}, FisherConfig(**settings), factors=known)


def _same(one, other):
    return all(
        list(one.factors.side(side)) == list(other.factors.side(side))
        and all(torch.equal(f, other.factors.side(side)[n]) for n, f in one.factors.side(side).items())
        for side in ("rows", "columns")
    )


@pytest.mark.parametrize("shard_bytes", [10**9, 200])
def test_a_round_trip_keeps_every_bit(tmp_path, shard_bytes):
    """Factors come back from one file or many shards, and are no entries of the diagonal."""
    fisher = make()
    config = write_fisher(fisher, tmp_path / "f", shard_bytes=shard_bytes)
    read = load_fisher(tmp_path / "f")
    assert _same(fisher, read)
    assert (len(read), list(read)) == (3, list(SHAPES))
    assert "a.weight.rows" not in read
    assert config.coverage.with_ == 3
    assert config.mean == write_fisher(Fisher(dict(fisher), fisher.config), tmp_path / "plain").mean
    assert read.config.factors == INFO.model_copy(update={"rows": ("a.weight", "b.weight"), "columns": ("a.weight",)})
    read.save(tmp_path / "again")
    assert _same(fisher, load_fisher(tmp_path / "again"))
    files = list((tmp_path / "f").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 200)


def test_a_fisher_without_factors_has_the_file_of_earlier_versions(tmp_path):
    """The metadata have no key for factors."""
    Fisher({"w": torch.ones(2)}, FisherConfig(estimator="empirical", statistic="mean")).save(tmp_path / "f")
    assert "factors" not in json.loads((tmp_path / "f" / "fisher_config.json").read_text())
    assert not load_fisher(tmp_path / "f").factors


def test_compare_and_aliases_see_the_diagonal_alone(tmp_path):
    """A comparison has a row for each tensor of the diagonal; a tied name finds it."""
    fisher = make(coverage=Coverage(**{"with": 3}, without={"head.weight": "tied to a.weight"}))
    fisher.save(tmp_path / "f")
    read = load_fisher(tmp_path / "f")
    assert len(compare(read, fisher).rows) == 3
    assert read.resolve("head.weight") in read.factors.rows


@pytest.fixture
def folder(tmp_path):
    """The folder of a Fisher with factors, without digests, so that its tensors can be changed."""
    make().save(tmp_path / "f")
    file = tmp_path / "f" / "fisher.safetensors"
    save_file(load_file(file), file)
    return tmp_path / "f"


def _change(folder, **tensors):
    file = folder / "fisher.safetensors"
    known = load_file(file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in known.items() if tensor is not None}, file)


@pytest.mark.parametrize(
    "shape", [(3, 4, 4), (4, 4, 5), (4, 16), (4, 0, 0), (1, 14, 14), (5, 4, 4)]
)  # 13 rows in blocks of 4
def test_factors_of_other_shapes_are_refused(folder, shape):
    """The message has the shape that fits and the shape that was found."""
    _change(folder, a__weight__rows=torch.zeros(shape))
    with pytest.raises(MismatchError, match="must have a shape such as"):
        load_fisher(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.float64])
def test_factors_of_other_dtypes_are_refused(folder, dtype):
    """A factor is float32 or bfloat16."""
    _change(folder, a__weight__columns=torch.zeros(2, 4, 4, dtype=dtype))
    with pytest.raises(CorruptFileError, match="must be float32 or bfloat16"):
        load_fisher(folder)


def test_a_missing_factor_is_refused(folder):
    """The metadata name it."""
    _change(folder, a__weight__columns=None)
    with pytest.raises(CorruptFileError, match=r"lacks a\.weight\.columns"):
        load_fisher(folder)


def test_a_factor_of_a_vector_is_refused(folder):
    """Factors belong to matrices."""
    file = folder / "fisher_config.json"
    config = json.loads(file.read_text())
    config["factors"]["rows"].append("b.bias")
    file.write_text(json.dumps(config))
    _change(folder, b__bias__rows=torch.zeros(1, 3, 3))
    with pytest.raises(MismatchError, match="must be of a matrix with a diagonal"):
        load_fisher(folder)


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "NaN"), (-1.0, "negative entries")])
def test_impossible_entries_are_refused_on_access(folder, value, words):
    """Factors are checked as they are read."""
    factor = load_file(folder / "fisher.safetensors")["a.weight.rows"]
    factor[2, 1, 1] = value
    _change(folder, a__weight__rows=factor)
    read = load_fisher(folder)
    with pytest.raises(ValuesError, match=words):
        read.factors.rows["a.weight"]


def test_a_flipped_bit_of_a_factor_is_noticed(tmp_path):
    """Factors have digests as other tensors do."""
    make().save(tmp_path / "f")
    file = tmp_path / "f" / "fisher.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1  # the last tensor is a factor
    file.write_bytes(content)
    read = load_fisher(tmp_path / "f")
    with pytest.raises(CorruptFileError, match=r"a\.weight\.columns"):
        read.factors.columns["a.weight"]
