"""Megatron-Core's distributed checkpoint: keys, stacked layers, settings, several optimizers, refused buckets."""

import argparse

import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import MismatchError, UnsafeFileError, UnsupportedStateError
from squisher_mergekit.optimizers.load import extract
from tests.other_trainers import SHAPES, Opens, World, assert_moments, save_distributed, to_megatron, write_json


def _write(folder, world, common=None, stacked=True, prefixes=("",), kind="exp_avg_sq"):
    """Write iter_N: pieces of the state, and ``common.pt``; several prefixes share the parameters out."""
    own, weights = (
        to_megatron(world, world.moments, stacked=stacked),
        to_megatron(world, world.weights, stacked=stacked),
    )
    saved = dict(weights)
    for number, (name, tensor) in enumerate(own.items()):
        prefix = prefixes[number % len(prefixes)]
        saved[f"{prefix}optimizer.state.{kind}.{name}"] = tensor
        saved[f"{prefix}optimizer.state.exp_avg.{name}"] = -tensor
        saved[f"{prefix}optimizer.state.fp32_param.{name}"] = weights[name]
    save_distributed(saved, folder)
    write_json(folder / "metadata.json", {"sharded_backend": "torch_dist"})
    if common is not None:
        torch.save(common, folder / "common.pt")


def _settings(beta2=0.97, step=30):
    groups = [{"betas": (0.9, beta2), "step": step, "params": []}, {"betas": (0.9, beta2), "step": step, "params": []}]
    return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_sharded_model_space"}


ARGS = argparse.Namespace(num_layers=2, adam_beta1=0.9, adam_beta2=0.97)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_iteration_is_read_at_every_level(shape, stacked, tmp_path):
    """The run and the iteration are accepted; padding of the vocabulary is cut."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **shape)
    _write(tmp_path / "run" / "iter_0000030", world, {"optimizer": _settings(), "args": ARGS, "iteration": 30}, stacked)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("30")
    for source in ("run", "run/iter_0000030"):
        fisher = load_fisher(tmp_path / source, world.folder)
        assert_moments(fisher, world.moments)
        assert fisher.config.source.layout == "megatron-core"


@pytest.mark.parametrize("keys", [("chained_0", "chained_1"), (0, 1)])
def test_several_optimizers_are_joined(keys, tmp_path):
    """A mixture of experts chains two, each with its settings, under names or numbers."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[0])
    common = {"optimizer": {key: _settings() for key in keys}, "args": None, "iteration": 99}
    _write(tmp_path / "iter_0000030", world, common, prefixes=("chained_0.", "chained_1."))
    assert_moments(load_fisher(tmp_path / "iter_0000030", world.folder), world.moments)


def test_settings_are_those_of_the_arguments_where_groups_lack_them(tmp_path):
    """The Namespace is read as data; its iteration is that of the file."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[1])
    _write(tmp_path / "iter_0000030", world, {"args": ARGS, "iteration": 30})
    assert_moments(load_fisher(tmp_path / "iter_0000030", world.folder), world.moments)


def test_steps_that_all_parameters_share_are_read(tmp_path):
    """Without the distributed optimizer they are in its state; the iteration counts skipped ones as well."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[1])
    groups = [{"betas": (0.9, 0.97), "params": [0]}]
    inside = {"optimizer": {"param_groups": groups, "state": {"common_step": torch.tensor(30.0)}}}
    _write(tmp_path / "iter_0000033", world, {"optimizer": inside, "iteration": 33})
    assert_moments(load_fisher(tmp_path / "iter_0000033", world.folder), world.moments)


def test_settings_that_no_file_tells_are_supplied(tmp_path):
    """Without ``common.pt``, the steps are those of the folder's name, and beta2 is given."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[1])
    _write(tmp_path / "iter_0000030", world)
    assert_moments(load_fisher(tmp_path / "iter_0000030", world.folder), world.moments, beta2=None)
    extract(tmp_path / "iter_0000030", tmp_path / "out", world.folder, beta2=0.97)
    assert_moments(load_fisher(tmp_path / "out"), world.moments)


def test_flat_buckets_are_refused(tmp_path):
    """Their entries belong to no parameter that the file names."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[1])
    saved = {"optimizer.distributed.dp_group_idx_0.gbuf_idx_0.bucket_idx_0.exp_avg_sq": torch.rand(9)}
    save_distributed(saved, tmp_path / "iter_0000030")
    with pytest.raises(UnsupportedStateError, match="by parameter, but has flat buckets"):
        load_fisher(tmp_path / "iter_0000030", world.folder)


@pytest.mark.parametrize("layers", [1, 3])
def test_another_number_of_layers_is_refused(layers, tmp_path):
    """The stacked tensors must have as many layers as the model."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[1])
    other = World(tmp_path / "other", layers=layers, tie_word_embeddings=False, **SHAPES[1])
    _write(tmp_path / "iter_0000030", world, {"optimizer": _settings()})
    with pytest.raises(MismatchError, match=f"must stack the {layers} layers"):
        load_fisher(tmp_path / "iter_0000030", other.folder)


def test_groups_with_different_decays_are_refused(tmp_path):
    """No file tells which parameter is in which group."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[1])
    common = {"optimizer": _settings()}
    common["optimizer"]["optimizer"]["param_groups"][0]["betas"] = (0.9, 0.999)
    _write(tmp_path / "iter_0000030", world, common)
    with pytest.raises(UnsupportedStateError, match="must share their betas and steps"):
        load_fisher(tmp_path / "iter_0000030", world.folder)


def test_a_malicious_common_file_runs_nothing(tmp_path):
    """The file of the settings opens no file."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[1])
    _write(tmp_path / "iter_0000030", world, {"optimizer": _settings(), "args": Opens(tmp_path / "marker")})
    with pytest.raises(UnsafeFileError, match="nothing of it was run"):
        load_fisher(tmp_path / "iter_0000030", world.folder)
    assert not (tmp_path / "marker").exists()
