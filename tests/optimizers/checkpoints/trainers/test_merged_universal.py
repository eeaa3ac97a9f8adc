"""Universal checkpoints of Megatron-DeepSpeed without settings, as BLOOM has them."""

import argparse

import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import CorruptFileError, UnsafeFileError
from tests.other_trainers import Opens, World, assert_moments, to_bloom

BLOOM = [{"hidden_size": 16, "n_head": 2, "vocab_size": 30}, {"hidden_size": 24, "n_head": 3, "vocab_size": 18}]
ARGS = argparse.Namespace(adam_beta1=0.9, adam_beta2=0.97, lr=1e-4)


def _write(folder, world):
    for name, tensor in to_bloom(world, world.moments).items():
        (folder / "zero" / name).mkdir(parents=True)
        for key, value in (("exp_avg_sq", tensor), ("exp_avg", -tensor), ("fp32", tensor)):
            torch.save({"param": value, "cat_dim": 0}, folder / "zero" / name / f"{key}.pt")
    for rank in range(4):
        content = {"args": ARGS, "iteration": 30, "param_shapes": [{}], "module": None}
        torch.save(content, folder / f"mp_rank_{rank:02}_model_states.pt")


def _world(folder, shape):
    return World(folder, "bloom", n_layer=2, **shape)


@pytest.mark.parametrize("shape", BLOOM)
def test_a_universal_checkpoint_is_read_at_every_level(shape, tmp_path):
    """The run and the step are accepted; the settings are those of the arguments."""
    world = _world(tmp_path / "model", shape)
    _write(tmp_path / "run" / "global_step30_universal", world)
    for source in ("run", "run/global_step30_universal"):
        assert_moments(load_fisher(tmp_path / source, world.folder), world.moments)


def test_a_file_without_a_tensor_is_refused(tmp_path):
    """The refusal names the file."""
    world = _world(tmp_path / "model", BLOOM[0])
    _write(tmp_path / "global_step30_universal", world)
    torch.save(
        {"cat_dim": 0}, tmp_path / "global_step30_universal" / "zero" / "3.input_layernorm.bias" / "exp_avg_sq.pt"
    )
    with pytest.raises(CorruptFileError, match=r"3\.input_layernorm\.bias.*must hold a tensor under param"):
        load_fisher(tmp_path / "global_step30_universal", world.folder)


def test_a_malicious_pickle_runs_nothing(tmp_path):
    """Neither in the arguments nor in a parameter."""
    world = _world(tmp_path / "model", BLOOM[0])
    _write(tmp_path / "global_step30_universal", world)
    torch.save(
        {"args": Opens(tmp_path / "marker")}, tmp_path / "global_step30_universal" / "mp_rank_00_model_states.pt"
    )
    with pytest.raises(UnsafeFileError, match="nothing of it was run"):
        load_fisher(tmp_path / "global_step30_universal", world.folder)
    assert not (tmp_path / "marker").exists()
