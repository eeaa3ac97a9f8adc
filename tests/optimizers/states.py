"""What the tests of the layouts share: copies of real checkpoints to spoil, and files to rewrite."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from squisher_mergekit import load_fisher
from squisher_mergekit.optimizers.checkpoints import safe_pickle

STATES = Path(__file__).parents[1] / "fixtures" / "optimizer_states"


def copy(name, to):
    """Copy a fixture, to be spoiled."""
    return Path(shutil.copytree(STATES / name, to / name))


def truth(name):
    """Return the accumulators that the run had in memory."""
    return load_file(STATES / name / "expected.safetensors")


def rewrite(file, change):
    """Load a file of torch.save, change its content in place, and save it again."""
    loaded = torch.load(file, weights_only=True) if "optim_states" not in file.name else safe_pickle.load(file)
    loaded = _copied(loaded)
    change(loaded)
    file.unlink()
    torch.save(without_stand_ins(loaded), file)


def assert_read(folder, expected, **options):
    """Read a checkpoint, and hold it bit for bit against what it should be."""
    fisher = load_fisher(folder, **options)
    assert set(fisher) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(fisher[name], tensor), name
    return fisher


def flip(file, offset, mask=0x10):
    """Flip a bit of a file."""
    data = bytearray(file.read_bytes())
    data[offset] ^= mask
    file.write_bytes(data)


def _copied(value):
    """Return containers of their own, tensors unmapped."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if type(value) is list else value


def without_stand_ins(value):
    """Leave out stand-ins of a library's objects, which cannot be saved."""
    if isinstance(value, dict):
        return {
            key: without_stand_ins(item) for key, item in value.items() if not isinstance(item, safe_pickle.StandIn)
        }
    if type(value) is list:
        return [without_stand_ins(item) for item in value if not isinstance(item, safe_pickle.StandIn)]
    return value
