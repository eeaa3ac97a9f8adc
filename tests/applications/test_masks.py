"""Masks in memory and on disk."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from squisher_mergekit.applications.masks import MASK_NAME, Mask, read_mask, write_mask
from squisher_mergekit.errors import CorruptFileError, MismatchError, NotFoundError
from squisher_mergekit.models.weights import open_weights
from tests.estimators.models import make


@given(shape=st.lists(st.sampled_from([0, 1, 3, 7, 11]), max_size=3), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_a_mask_comes_back_from_disk(tmp_path_factory, shape, share, seed):
    """A mask of any shape, scalars and empty tensors included, comes back from disk for any share of kept entries."""
    folder = tmp_path_factory.mktemp("mask")
    generator = torch.Generator().manual_seed(seed)
    mask = Mask({"w": torch.rand(shape, generator=generator) < share, "b": torch.rand(13, generator=generator) < 0.5})
    write_mask(mask, folder / MASK_NAME)
    again = read_mask(folder)
    assert list(again) == ["w", "b"]
    assert all(torch.equal(again[name], mask[name]) for name in mask)
    assert again.shape("w") == tuple(shape)
    assert (again.kept, again.entries) == (mask.kept, mask.entries)


def test_an_entry_takes_a_bit(tmp_path):
    """An entry takes one bit; a tensor that is kept or dropped whole takes none."""
    mask = Mask({"w": torch.rand(1000, 801) < 0.5, "all": torch.ones(1000, 800).bool(), "no": torch.zeros(99).bool()})
    write_mask(mask, tmp_path / MASK_NAME)
    assert (tmp_path / MASK_NAME).stat().st_size < 1000 * 801 / 8 + 4000


def test_the_metadata_is_kept(tmp_path):
    """The header of the file has the metadata of the mask."""
    write_mask(Mask({"w": torch.ones(3).bool()}, {"score": "fisher", "keep": 0.5}), tmp_path / "my.safetensors")
    assert read_mask(tmp_path / "my.safetensors").metadata == {"score": "fisher", "keep": 0.5}


def test_an_invalid_mask_file_is_refused(tmp_path):
    """A missing file, a foreign safetensors file, a truncated file and a file with too few bits are refused."""
    with pytest.raises(NotFoundError, match=r"must be a file or a folder with mask\.safetensors"):
        read_mask(tmp_path)
    nn_file = tmp_path / "model.safetensors"
    make("bert").save_pretrained(tmp_path)
    with pytest.raises(CorruptFileError, match="must be a mask of version 1, but it says format pt"):
        read_mask(nn_file)
    file = tmp_path / MASK_NAME
    write_mask(Mask({"w": torch.arange(77).remainder(2).bool()}), file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(CorruptFileError, match="must be a whole safetensors file"):
        read_mask(file)
    size = struct.unpack("<Q", whole[:8])[0]
    file.write_bytes(whole[:8] + whole[8 : 8 + size].replace(b"[77]", b"[99]") + whole[8 + size :])
    with pytest.raises(CorruptFileError, match="must hold a bit for each entry of w"):
        read_mask(file)


def test_a_mask_of_other_weights_is_refused(tmp_path):
    """A mask with an unknown name, a missing name or another shape is refused."""
    make("bert").save_pretrained(tmp_path)
    infos = open_weights(tmp_path).infos
    own = {name: torch.ones(info.shape).bool() for name, info in infos.items()}
    Mask(own).check(infos, tmp_path)
    changes = ({"strange": torch.ones(2).bool()}, {"classifier.bias": torch.ones(4).bool()}, {"classifier.bias": None})
    for change in changes:
        tensors = {name: tensor for name, tensor in (own | change).items() if tensor is not None}
        with pytest.raises(MismatchError, match=f"{next(iter(change))} is "):
            Mask(tensors).check(infos, tmp_path)


def test_a_mask_finds_its_parameters(tmp_path):
    """A mask with names on disk becomes one with names in memory, with tied tables and packed experts."""
    for name in ("llama-tied", "mixtral-grouped", "bert"):
        model = make(name)
        model.save_pretrained(tmp_path / name)
        weights = open_weights(tmp_path / name)
        # Positive weights are kept, so the weights themselves tell where each bit belongs.
        mask = Mask({key: weights.read(key) > 0 for key in weights.infos})
        found = mask.by_parameter(model)
        assert found.keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(found[key], p > 0) for key, p in model.named_parameters())


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_mask_finds_the_parameters_of_a_wrapped_model(wrap):
    """Wrappers for several processes or for compilation do not change the names."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    mask = Mask({name: p > 0 for name, p in model.named_parameters()})
    found = mask.by_parameter(wrap(model))
    assert found.keys() == mask.keys()
    assert all(torch.equal(found[name], mask[name]) for name in mask)


def test_a_mask_that_lacks_a_parameter_is_refused():
    """A mask that lacks a parameter is refused, because the parameter would be neither kept nor dropped."""
    mask = Mask({"weight": torch.ones(1, 3).bool()})
    with pytest.raises(MismatchError, match=r"but of bias, \[1\], memory has missing"):
        mask.by_parameter(nn.Linear(3, 1))


def test_the_old_name_of_the_metadata_works_for_one_version():
    """``about`` still works as ``metadata``, with a warning at the line of the caller."""
    with pytest.warns(DeprecationWarning, match="use metadata"):
        mask = Mask({"w": torch.ones(2).bool()}, about={"score": "fisher"})
    with pytest.warns(DeprecationWarning, match=r"use Mask\.metadata") as caught:
        assert mask.about == mask.metadata == {"score": "fisher"}
    assert caught[0].filename == __file__
