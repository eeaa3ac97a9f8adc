"""Several processes on the CPU (gloo), compared with torch's gathered state and with a run of one process."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import SquisherError
from squisher_mergekit.tensors.sharded import OnRankZero
from tests import processes
from tests.checkpoints import named_on_disk
from tests.training import worker

ROOT = Path(__file__).parents[2]
KINDS = ["ddp", "fsdp1", "fsdp2", "fsdp2_mixtral"]


def _run(kind, folder, world):
    """Run the processes, and return their exit codes and output."""
    return processes.run("tests.training.worker", kind, folder, world)


@pytest.fixture
def group(tmp_path):
    """Make this process a group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _check(folder, kind):
    """Assert that the Fisher equals torch's gathered state to the bit."""
    truth = load_file(folder / "gathered.safetensors")
    fisher = load_fisher(folder / "out", model=folder / "out")
    truth = named_on_disk(truth) if kind == "fsdp2_mixtral" else truth
    assert set(fisher) == set(truth)
    assert all(torch.equal(fisher[name], tensor) for name, tensor in truth.items())
    assert fisher.config.weights_fingerprint is not None
    assert fisher.config.steps == worker.STEPS
    return fisher


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2_mixtral"])
@pytest.mark.usefixtures("group")
def test_sharded_tensors_of_one_process_are_gathered(tmp_path, kind):
    """State, average and resume of FSDP2 with one process go through sharded tensors, to the bit."""
    model = worker.make("mixtral" if kind == "fsdp2_mixtral" else "llama")
    wrapped, optimizer, squares = worker.train(kind, model, 0, 1)
    assert hasattr(next(iter(squares.squares.values())), "full_tensor")
    truth, weights = worker.gathered(wrapped, optimizer)
    worker.save_file(truth, tmp_path / "gathered.safetensors")
    worker.make("mixtral" if kind == "fsdp2_mixtral" else "llama").save_pretrained(tmp_path / "out", state_dict=weights)
    worker.save_squisher(wrapped, optimizer, tmp_path / "out")
    _check(tmp_path, kind)
    squares.save(tmp_path / "ema", weights=tmp_path / "out")
    assert worker.resumed(squares, wrapped, tmp_path / "ema")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_write_the_fisher_of_one(tmp_path, kind):
    """The first process writes torch's gathered state to the bit.

    It equals that of one process at float32's precision.
    """
    codes, said = _run(kind, tmp_path / "two", 2)
    assert codes == [0, 0], said
    two = _check(tmp_path / "two", kind)
    if kind == "fsdp2_mixtral":  # its router balances over a batch of its process
        return
    codes, said = _run("alone", tmp_path / "one", 1)
    assert codes == [0], said
    one = _check(tmp_path / "one", "alone")
    _close(two, one)
    assert two.config.coverage == one.config.coverage
    if kind != "fsdp1":
        two, one = (load_fisher(tmp_path / name / "out" / "fisher_ema") for name in ("two", "one"))
        _close(two, one)
        assert two.config.weights_fingerprint is not None


def _close(two, one):
    assert set(two) == set(one)
    for name in one:
        # Another order of summation over a batch changes entries near 0 most.
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-6 * one[name].max().item())


@pytest.mark.slow
def test_a_failure_of_the_first_process_reaches_the_others(tmp_path):
    """NaN in the last tensor ends both processes with an error in time and leaves no files."""
    codes, said = _run("fsdp2_nan", tmp_path / "run", 2)
    assert codes == [1, 1]
    assert "a Fisher must be finite" in said[0]
    assert "the first process could not write the Fisher: a Fisher must be finite" in said[1]
    assert not [file for file in (tmp_path / "run").rglob("*") if "fisher" in file.name or file.name.startswith(".")]


@pytest.mark.slow
def test_the_trainer_in_two_processes(tmp_path):
    """Each checkpoint has one Fisher that extract would write. The batch size counts both processes."""
    codes, said = processes.run("tests.training.trainer_worker", "squisher", tmp_path / "run", 2, as_torchrun=True)
    assert codes == [0, 0], said
    checkpoint = tmp_path / "run" / "checkpoint-3"
    live, read = load_fisher(checkpoint), load_fisher(checkpoint / "optimizer.pt", model=checkpoint)
    assert all(torch.equal(live[name], read[name]) for name in read)
    assert set(live) == set(read)
    assert live.config.examples_per_step == 8
    assert 0 <= live.config.clipped_share <= 1
    assert json.loads((checkpoint / "fisher_ema" / "fisher_config.json").read_text())["steps"] == 3


@pytest.mark.usefixtures("group")
def test_failed_work_raises_its_own_error():
    """The error of failed work in the first process is the original one, with or without sharded tensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    tensor = distribute_tensor(torch.arange(7.0), init_device_mesh("cpu", (1,)), [Shard(0)])
    on_rank_zero = OnRankZero()
    lazy = on_rank_zero.add(tensor)
    assert torch.equal(on_rank_zero.run(lazy.read), torch.arange(7.0))
    assert (lazy.shape, lazy.dtype) == (torch.Size([7]), torch.float32)

    def fail():
        raise SquisherError("no room")

    for one in (on_rank_zero, OnRankZero()):
        with pytest.raises(SquisherError, match=r"^no room$"):
            one.run(fail)
