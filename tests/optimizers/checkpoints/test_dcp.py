"""Distributed checkpoints, read per piece, in all layouts that torch writes."""

import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import CorruptFileError, NotFoundError, UnsafeFileError, UnsupportedStateError
from tests.checkpoints import STATES, assert_read, copy, flip, truth

CASES = {"fsdp1_sharded": "optimizer_0", "dcp_nested": "step-4"}


def _index(folder):
    with (folder / ".metadata").open("rb") as stream:
        return pickle.load(stream)


def _write_index(folder, index):
    with (folder / ".metadata").open("wb") as stream:
        pickle.dump(index, stream)


def _stepped():
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(11, 7)).square().mean().backward()
        optimizer.step()
    expected = {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
    return model, optimizer, expected


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # torch warns when it saves without ranks
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("prefix", ["optimizer", "optim"])
def test_both_forms_of_the_optimizer_are_read(flat, prefix, tmp_path):
    """The nested layout of accelerate and the flat one of torchtitan are read bit for bit, with steps and decay."""
    model, optimizer, expected = _stepped()
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    dcp.save({"model": model.state_dict(), prefix: state}, checkpoint_id=tmp_path / "step-3", no_dist=True)
    config = assert_read(tmp_path / "step-3", expected).config
    assert (config.steps, config.optimizer.beta2, config.optimizer.class_) == (3, 0.95, "torch.optim.AdamW")
    assert_read(tmp_path, expected)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_plain_state_dict_keeps_its_numbers(tmp_path):
    """A state saved with numbers needs names from the user, like a file of torch.save."""
    model, optimizer, expected = _stepped()
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path / "own", no_dist=True)
    assert_read(tmp_path / "own", expected, names=list(dict(model.named_parameters())))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_weights_alone_are_no_optimizer(tmp_path):
    """A checkpoint of the model alone is refused with a hint at the missing optimizer."""
    model, _, _ = _stepped()
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "w", no_dist=True)
    with pytest.raises(UnsupportedStateError, match="weights alone"):
        load_fisher(tmp_path / "w")


@pytest.mark.parametrize("name", CASES)
def test_a_missing_file_is_named(name, tmp_path):
    """A missing shard is refused by name."""
    folder = copy(name, tmp_path)
    (folder / CASES[name] / "__1_0.distcp").unlink()
    with pytest.raises(NotFoundError, match=r"__1_0\.distcp, which is missing"):
        load_fisher(folder)


@pytest.mark.parametrize("name", CASES)
def test_a_shorter_file_is_refused_before_anything_is_read(name, tmp_path):
    """A truncated shard is refused on opening, by its size."""
    folder = copy(name, tmp_path)
    file = folder / CASES[name] / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CorruptFileError, match="by its index, but has"):
        load_fisher(folder)


@pytest.mark.parametrize("path", ["../../outside.distcp", "/etc/passwd", "a/../../b"])
def test_no_path_leads_out_of_the_folder(path, tmp_path):
    """An index with a path outside of the folder is refused, whether the file exists or not."""
    folder = copy("fsdp1_sharded", tmp_path) / "optimizer_0"
    index = _index(folder)
    for stored in index.storage_data.values():
        stored.relative_path = path
    _write_index(folder, index)
    with pytest.raises(CorruptFileError, match="in its own folder"):
        load_fisher(folder)


def _longer(described):
    described.size = torch.Size([described.size[0] + 1, *described.size[1:]])


def _overlapping(described):
    described.chunks[1].offsets = torch.Size([described.chunks[1].offsets[0] - 1, *described.chunks[1].offsets[1:]])


def _fewer(described):
    del described.chunks[1]


@pytest.mark.parametrize("change", [_longer, _overlapping, _fewer])
def test_pieces_that_are_not_the_whole_are_refused(change, tmp_path):
    """Gaps, overlaps and sizes without bytes are found before memory is allocated."""
    folder = copy("fsdp1_sharded", tmp_path)
    index = _index(folder / "optimizer_0")
    change(index.state_dict_metadata["optimizer.state.model.embed_tokens.weight.exp_avg_sq"])
    _write_index(folder / "optimizer_0", index)
    with pytest.raises(CorruptFileError):
        load_fisher(folder)


def test_two_swapped_names_of_different_shapes_are_found(tmp_path):
    """A piece that contradicts the index is refused when it is read."""
    folder = copy("fsdp1_sharded", tmp_path)
    index = _index(folder / "optimizer_0")
    key = "optimizer.state.model.layers.0.mlp.{}_proj.weight.exp_avg_sq"
    up, down = ([at for at in index.storage_data if at.fqn == key.format(part)] for part in ("up", "down"))
    for a, b in zip(up, down, strict=True):
        index.storage_data[a], index.storage_data[b] = index.storage_data[b], index.storage_data[a]
    _write_index(folder / "optimizer_0", index)
    fisher = load_fisher(folder)
    with pytest.raises(CorruptFileError, match="holds something else"):
        fisher["model.layers.0.mlp.up_proj.weight"]


def test_flipped_bytes_are_found_unless_verify_is_off(tmp_path):
    """The checksum of a piece is verified when it is read. verify=False reads damaged values."""
    folder = copy("fsdp1_sharded", tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    index = _index(folder / "optimizer_0")
    (at, *_) = (i for i in index.storage_data if i.fqn == f"optimizer.state.{name}.exp_avg_sq")
    stored = index.storage_data[at]
    file = folder / "optimizer_0" / stored.relative_path
    piece = file.read_bytes()[stored.offset : stored.offset + stored.length]
    rows = truth("fsdp1_sharded")[name][at.offset[0] :].flatten()
    flip(file, stored.offset + piece.index(rows[3].numpy().tobytes()))
    with pytest.raises(CorruptFileError, match="checksum"):
        load_fisher(folder)[name]
    assert not torch.equal(load_fisher(folder, verify=False)[name], truth("fsdp1_sharded")[name])


def test_the_index_reaches_no_other_classes(tmp_path):
    """The index can reach neither code nor torch's own functions."""
    folder = copy("fsdp1_sharded", tmp_path)
    for payload in (b"cos\nsystem\n(S'touch x'\ntR.", b"ctorch\nload\n(S'x'\ntR.", b"ctorch.hub\nload\n(S'x'\ntR."):
        (folder / "optimizer_0" / ".metadata").write_bytes(payload)
        with pytest.raises(UnsafeFileError, match="nothing of it was run"):
            load_fisher(folder)


@pytest.mark.parametrize("name", CASES)
def test_the_path_of_the_training_machine_is_not_written_down(name):
    """The index names the folder of its training machine. The metadata of the Fisher have its last part only."""
    assert load_fisher(STATES / name).config.source.files == (CASES[name],)
