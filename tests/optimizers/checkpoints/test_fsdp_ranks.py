"""FSDP's files of each rank, joined without a process group."""

import subprocess
import sys

import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import CorruptFileError, NotFoundError
from tests.checkpoints import STATES, assert_read, copy, flip, truth

NAME = "fsdp2_sharded_nodcp"


@pytest.mark.parametrize("below", ["", "optimizer_0_rank0.bin", "optimizer_0_rank1.bin"])
def test_the_folder_and_the_file_of_any_rank_lead_to_all(below, tmp_path):
    """The folder and the file of any rank open the whole state."""
    assert_read(copy(NAME, tmp_path) / below, truth(NAME))


@pytest.mark.parametrize("name", [NAME, "fsdp1_nodcp", "fsdp2_hybrid_nodcp"])
def test_the_files_are_read_without_earlier_imports(name):
    """A process without torch.distributed reads the files without a message."""
    code = "import sys; from squisher_mergekit import load_fisher; dict(load_fisher(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, STATES / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_rank_is_named(rank, tmp_path):
    """The mesh in the files tells the number of ranks, so a missing one is refused by its number."""
    folder = copy(NAME, tmp_path)
    (folder / f"optimizer_0_rank{rank}.bin").unlink()
    with pytest.raises(NotFoundError, match=f"over 2 ranks, but the file of rank {rank} is missing"):
        load_fisher(folder)


def test_the_file_of_one_rank_twice_is_refused(tmp_path):
    """A copy of another rank's file is refused, because its 16 and 16 rows do not add up to the 33 of the tensor."""
    folder = copy(NAME, tmp_path)
    (folder / "optimizer_0_rank1.bin").write_bytes((folder / "optimizer_0_rank0.bin").read_bytes())
    with pytest.raises(CorruptFileError, match="must add up to the shape"):
        load_fisher(folder)


def test_flipped_bytes_are_found(tmp_path):
    """The checksum of a shard is verified when it is read."""
    folder, name = copy(NAME, tmp_path), "model.layers.0.mlp.up_proj.weight"
    file = folder / "optimizer_0_rank0.bin"
    flip(file, file.read_bytes().index(truth(NAME)[name][1].numpy().tobytes()))
    fisher = load_fisher(folder)
    with pytest.raises(CorruptFileError, match="checksum"):
        fisher[name]
    assert not torch.equal(load_fisher(folder, verify=False)[name], truth(NAME)[name])


def test_parts_that_tell_no_place_are_refused(tmp_path):
    """Plain tensors that differ between the ranks are parts of a tensor; that of the first rank is not the whole."""
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": ["w"]}
    for rank in (0, 1):
        moment = torch.full((3, 5), 1.0 + rank)
        state = {"w": {"step": torch.tensor(7.0), "exp_avg": moment.clone(), "exp_avg_sq": moment}}
        torch.save({"state": state, "param_groups": [group]}, tmp_path / f"optimizer_0_rank{rank}.bin")
    with pytest.raises(CorruptFileError, match="different plain tensors"):
        load_fisher(tmp_path, names=["w"])
