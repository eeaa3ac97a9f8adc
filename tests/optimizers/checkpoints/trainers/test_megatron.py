"""Megatron-Core's distributed checkpoint: keys, stacked layers, settings, several optimizers, refused buckets."""

import argparse
import pickle
from itertools import pairwise

import pytest
import torch
from torch.distributed.checkpoint import metadata as index
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan

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


@pytest.mark.parametrize("prefix", ["module.module.", "module."])
@pytest.mark.parametrize("shape", SHAPES)
def test_its_own_fsdp_keeps_the_settings_of_each_name(shape, prefix, tmp_path):
    """``fsdp_dtensor`` has steps among the settings, and the halves of the gated MLP apart."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **shape)
    saved = {}
    for name, tensor in to_megatron(world, world.moments, stacked=False).items():
        gated = name.endswith("linear_fc1.weight")
        parts = dict(zip((f"{name}_w", f"{name}_v"), tensor.chunk(2), strict=True)) if gated else {name: tensor}
        for own, part in parts.items():
            saved[f"optimizer.state.{prefix}{own}.exp_avg_sq"] = part.contiguous()
            saved[f"optimizer.state.{prefix}{own}.exp_avg"] = torch.randn(part.shape)
            for key, value in {"betas": (0.9, 0.97), "step": 30, "lr": 1e-3}.items():
                saved[f"optimizer.param_to_group_meta.{prefix}{own}.{key}"] = value
    save_distributed(saved, tmp_path / "iter_0000030")
    assert_moments(load_fisher(tmp_path / "iter_0000030", world.folder), world.moments)


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


def _write_flat(folder, world, tensor_ranks, data_ranks, note=True):
    """Write iter_N as before version 0.14: each chunk of tensor parallelism flat, in ranges of the data ranks.

    The settings are in an object of the distributed optimizer, and the index has the plans of saving.
    """
    folder.mkdir(parents=True)
    described, stored, notes, content = {}, {}, {}, bytearray()

    def write(key, value, offset=None):
        torch.save(value, folder / "piece")
        data = (folder / "piece").read_bytes()
        stored[index.MetadataIndex(key, offset)] = _StorageInfo("__0_0.distcp", len(content), len(data))
        content.extend(data)

    for name, tensor in to_megatron(world, world.moments, padding=1).items():
        columns = "linear_proj" in name or "linear_fc2" in name
        matrix = 0 if "norm" in name else tensor_ranks * (2 if "linear_fc1" in name else 1)
        grid = [tensor.shape[0]] * (".layers." in name)
        grid += [matrix or 1, 1][: tensor.ndim - len(grid)] if not columns else [1, tensor_ranks]
        sizes = [size // n for size, n in zip(tensor.shape, grid, strict=True)]
        length, key = torch.Size(sizes).numel(), f"optimizer.state.exp_avg_sq.{name}"
        chunks = []
        for position in torch.cartesian_prod(*map(torch.arange, grid)).reshape(-1, len(grid)).tolist():
            region = tuple(slice(n * size, (n + 1) * size) for n, size in zip(position, sizes, strict=True))
            ends = [length * k // data_ranks for k in range(data_ranks)] + [length]
            for start, stop in pairwise(ends):
                part = tensor[region].reshape(-1)[start:stop].reshape(*[1] * len(grid), -1).clone()
                chunks.append(index.ChunkStorageMetadata(torch.Size([*position, start]), part.shape))
                write(key, part, torch.Size([*position, start]))
        properties = index.TensorProperties(torch.float32)
        described[key] = index.TensorStorageMetadata(properties, torch.Size([*grid, length]), chunks)
        notes[key] = {"nd_reformulated_orig_global_shape": tuple(tensor.shape)} if note else {}
    key = "optimizer.distributed.dp_group_idx_0.optimizer/shard_0_1"
    described[key] = index.BytesStorageMetadata()
    write(key, [{"param_groups": [{"betas": (0.9, 0.97), "step": 30, "params": [0]}]}])
    (folder / "__0_0.distcp").write_bytes(content)
    whole = index.Metadata(described, storage_data=stored)
    whole.mcore_data, whole.all_local_plans = notes, [SavePlan([])]
    (folder / ".metadata").write_bytes(pickle.dumps(whole, 4))
    torch.save({"optimizer": {"param_state_sharding_type": "fully_sharded_model_space"}, "iteration": 44},
               folder / "common.pt")  # fmt: skip


EVEN = [{"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 12,
         "vocab_size": 31}, {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
         "intermediate_size": 40, "vocab_size": 17}]  # fmt: skip


@pytest.mark.parametrize("shape", EVEN)
@pytest.mark.parametrize("ranks", [(1, 1), (1, 3), (2, 1), (2, 5)])
def test_flat_chunks_of_the_distributed_optimizer_are_joined(ranks, shape, tmp_path):
    """With tensor and data parallelism; the steps are those of its object, not the iteration."""
    world = World(tmp_path / "model", layers=3, tie_word_embeddings=False, **shape)
    _write_flat(tmp_path / "iter_0000044", world, *ranks)
    assert_moments(load_fisher(tmp_path / "iter_0000044", world.folder), world.moments)


def test_flat_chunks_without_their_shape_are_refused(tmp_path):
    """The shape of the grid is not that of the parameter."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **EVEN[0])
    _write_flat(tmp_path / "iter_0000044", world, 2, 2, note=False)
    with pytest.raises(MismatchError, match="must have the shape that the model's config"):
        load_fisher(tmp_path / "iter_0000044", world.folder)


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.module."])
def test_a_prefix_of_nemo_is_dropped(prefix, tmp_path):
    """Its settings are in a list, and its count is global_step."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[0])
    own = to_megatron(world, world.moments)
    save_distributed({f"optimizer.state.exp_avg_sq.{prefix}{n}": t for n, t in own.items()}, tmp_path / "x" / "weights")
    groups = [{"betas": (0.9, 0.97), "params": []}]
    common = {"optimizer": [{"optimizer": {"param_groups": groups}}], "global_step": 30}
    torch.save(common, tmp_path / "x" / "weights" / "common.pt")
    assert_moments(load_fisher(tmp_path / "x", world.folder), world.moments)


def test_halves_with_a_key_each_and_norms_of_heads_are_read(tmp_path):
    """``singleton_local_shards`` gives gate and up a key each; Qwen 3 has norms of queries and keys."""
    world = World(tmp_path / "model", "qwen3", tie_word_embeddings=False, **SHAPES[2])
    saved = {}
    for name, tensor in to_megatron(world, world.moments, stacked=False).items():
        if name.endswith("linear_fc1.weight"):
            saved |= dict(zip((f"{name}_w", f"{name}_v"), tensor.chunk(2), strict=True))
        else:
            name = name.replace("self_attn.q_norm", "self_attention.q_layernorm")
            saved[name.replace("self_attn.k_norm", "self_attention.k_layernorm")] = tensor
    saved = {f"optimizer.state.exp_avg_sq.{name}": tensor.clone() for name, tensor in saved.items()}
    save_distributed(saved, tmp_path / "iter_0000030")
    torch.save({"optimizer": _settings()}, tmp_path / "iter_0000030" / "common.pt")
    assert_moments(load_fisher(tmp_path / "iter_0000030", world.folder), world.moments)


def test_a_chain_without_prefixes_has_the_settings_of_all(tmp_path):
    """Newer checkpoints leave out ``chained_N`` in the keys, but not in the settings."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[0])
    _write(tmp_path / "iter_0000044", world, {"optimizer": {0: _settings(), 1: _settings()}, "iteration": 44})
    assert_moments(load_fisher(tmp_path / "iter_0000044", world.folder), world.moments)


def test_gathered_buffers_are_refused_as_such(tmp_path):
    """``dp_zero_gather_scatter`` has one object of all buffers, and no key of a parameter."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[1])
    save_distributed({"optimizer.distributed.dp_group_idx_0.param_state": b"x"}, tmp_path / "iter_0000030")
    with pytest.raises(UnsupportedStateError, match="by parameter, but has flat buckets"):
        load_fisher(tmp_path / "iter_0000030", world.folder)


def test_a_malicious_object_of_the_distributed_optimizer_runs_nothing(tmp_path):
    """Its settings are a file of torch.save within a piece."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **EVEN[0])
    folder = tmp_path / "iter_0000044"
    _write_flat(folder, world, 1, 1)
    whole = pickle.loads((folder / ".metadata").read_bytes())
    position = next(key for key in whole.storage_data if "distributed" in key.fqn)
    torch.save([Opens(tmp_path / "marker")], folder / "other.distcp")
    whole.storage_data[position] = _StorageInfo("other.distcp", 0, (folder / "other.distcp").stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(whole, 4))
    with pytest.raises(UnsafeFileError, match="nothing of it was run"):
        load_fisher(folder, world.folder)
    assert not (tmp_path / "marker").exists()


def test_a_malicious_plan_in_the_index_runs_nothing(tmp_path):
    """The plans of saving are read as data, whatever they name."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **EVEN[0])
    folder = tmp_path / "iter_0000044"
    _write_flat(folder, world, 1, 1)
    whole = pickle.loads((folder / ".metadata").read_bytes())
    whole.all_local_plans = [Opens(tmp_path / "marker")]
    (folder / ".metadata").write_bytes(pickle.dumps(whole, 4))
    with pytest.raises(UnsafeFileError, match="nothing of it was run"):
        load_fisher(folder, world.folder)
    assert not (tmp_path / "marker").exists()
