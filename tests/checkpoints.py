"""Helpers of tests of checkpoints: copies of the fixtures to damage, rewritten files, and names on disk."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from squisher_mergekit import load_fisher
from squisher_mergekit.optimizers.checkpoints import safe_pickle

STATES = Path(__file__).parent / "fixtures" / "optimizer_states"


def copy(name, to):
    """Copy a fixture, so that a test may damage it."""
    return Path(shutil.copytree(STATES / name, to / name))


def truth(name):
    """Return the accumulators that the training run had in memory."""
    return load_file(STATES / name / "expected.safetensors")


def rewrite(file, change):
    """Load a file of torch.save, change its content in place, and save it again."""
    loaded = torch.load(file, weights_only=True) if "optim_states" not in file.name else safe_pickle.load(file)
    loaded = _copied(loaded)
    change(loaded)
    file.unlink()
    torch.save(without_stand_ins(loaded), file)


def assert_read(folder, expected, **options):
    """Read a checkpoint and compare it bit for bit with the expected tensors."""
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
    """Return copies of the containers, with tensors that are not mapped."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if type(value) is list else value


def without_stand_ins(value):
    """Remove stand-ins of library objects, which cannot be saved."""
    if isinstance(value, dict):
        return {
            key: without_stand_ins(item) for key, item in value.items() if not isinstance(item, safe_pickle.StandIn)
        }
    if type(value) is list:
        return [without_stand_ins(item) for item in value if not isinstance(item, safe_pickle.StandIn)]
    return value


def named_on_disk(accumulators):
    """Rename accumulators to the names on disk: Mixtral's packed experts one by one, all others unchanged."""
    named = {}
    for name, tensor in accumulators.items():
        if name.endswith(".experts.gate_up_proj"):
            width = tensor.shape[1] // 2
            block = name.removesuffix(".mlp.experts.gate_up_proj") + ".block_sparse_moe.experts"
            for k in range(len(tensor)):
                named[f"{block}.{k}.w1.weight"] = tensor[k, :width]
                named[f"{block}.{k}.w3.weight"] = tensor[k, width:]
        elif name.endswith(".experts.down_proj"):
            block = name.removesuffix(".mlp.experts.down_proj") + ".block_sparse_moe.experts"
            named.update({f"{block}.{k}.w2.weight": tensor[k] for k in range(len(tensor))})
        else:
            named[name.replace(".mlp.gate.weight", ".block_sparse_moe.gate.weight")] = tensor
    return named
