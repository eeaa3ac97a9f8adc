"""ZeRO-1 of DeepSpeed 0.3 under GPT-NeoX: sub-partitions by interval and rank, steps, betas, tensor parallelism."""

import math
import random
import types

import numpy
import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import (
    CorruptFileError,
    MismatchError,
    NotFoundError,
    UnsafeFileError,
    UnsupportedStateError,
)
from squisher_mergekit.optimizers.load import extract
from tests.other_trainers import Opens, World, assert_moments, to_neox

NEOX = [{"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 31},
        {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 10}]  # fmt: skip
YAML = '{\n  "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.9, 0.97], }},\n  # a comment\n}\n'


def _world(folder, shape):
    return World(folder, "gpt_neox", tie_word_embeddings=False, **shape)


def _part(own, rank, ranks):
    """Return one rank's part of each parameter under tensor parallelism; what is whole on all ranks stays whole."""
    result = {}
    for name, tensor in own.items():
        rows = any(part in name for part in ("query_key_value", "dense_h_to_4h", "word_embeddings", "final_linear"))
        columns = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
        result[name] = tensor.chunk(ranks, 0)[rank] if rows else tensor.chunk(ranks, 1)[rank] if columns else tensor
    return {name: tensor.contiguous() for name, tensor in result.items()}


def _cut(tensors, ranks, intervals, padded):
    """Return rank -> sub-partitions of a flat buffer, interval by interval."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    size = math.ceil(flat.numel() / (ranks * intervals))
    if padded:
        flat = torch.cat([flat, torch.zeros(size * ranks * intervals - flat.numel())])
    subs = [flat[k * size : (k + 1) * size].clone() for k in range(ranks * intervals)]
    return [[subs[interval * ranks + rank] for interval in range(intervals)] for rank in range(ranks)]


def _write(
    folder, world, ranks=2, intervals=1, padded=False, parallel=1, groups=2, skipped=4, rigid=False, layers=True
):
    """Write the step's folder of GPT-NeoX 1.0."""
    folder.mkdir(parents=True)
    moments, weights = to_neox(world, world.moments), to_neox(world, world.weights)
    for model_rank in range(parallel):
        own, masters = _part(moments, model_rank, parallel), _part(weights, model_rank, parallel)
        order = list(own)
        parts = (
            [order] if groups == 1 else [[n for n in order if own[n].ndim > 1], [n for n in order if own[n].ndim == 1]]
        )
        cuts = {
            key: [_cut([source[n] for n in names], ranks, intervals, padded) for names in parts]
            for key, source in (("exp_avg_sq", own), ("master", masters))
        }
        for rank in range(ranks):
            base = [
                [{"exp_avg": torch.randn(v.shape), "exp_avg_sq": v} for v in cuts["exp_avg_sq"][g][rank]]
                for g in range(len(parts))
            ]
            if rigid:
                flat = [{"step": 30, **sub} for group in base for sub in group]
                numbers = iter(range(len(flat)))
                settings = [{"betas": (0.9, 0.97), "params": [next(numbers) for _ in group]} for group in base]
                base = {"state": dict(enumerate(flat)), "param_groups": settings}
            state = {
                "loss_scaler": types.SimpleNamespace(cur_scale=2.0), "zero_stage": 1, "partition_count": ranks,
                "num_comm_intervals_per_group": [intervals] * len(parts), "base_optimizer_state": base,
                "local_sub_partitions_of_fp32_groups": [cuts["master"][g][rank] for g in range(len(parts))],
            }  # fmt: skip
            shapes = {name: own[name].shape for name in order}
            content = {"optimizer_state_dict": state, "param_shapes": shapes}
            torch.save(content, folder / f"zero_pp_rank_{rank}_mp_rank_{model_rank:02}_optim_states.pt")
        model = {"module": None, "global_steps": 30 + skipped, "skipped_steps": skipped, "dp_world_size": ranks,
                 "numpy_rng_state": numpy.random.get_state(), "random_rng_state": random.getstate()}  # fmt: skip
        torch.save(model, folder / f"mp_rank_{model_rank:02}_model_states.pt")
        for number in sorted({name.partition(".")[0] for name in own}) if layers else ():
            layer = {n.partition(".")[2]: t.half() for n, t in masters.items() if n.startswith(f"{number}.")}
            torch.save(layer, folder / f"layer_{int(number):02}-model_{model_rank:02}-model_states.pt")


@pytest.mark.parametrize("shape", NEOX)
@pytest.mark.parametrize(
    ("ranks", "intervals", "padded"), [(2, 1, False), (3, 2, False), (2, 3, True), (11, 1, False), (1, 1, True)]
)
def test_sub_partitions_are_put_together(ranks, intervals, padded, shape, tmp_path):
    """Interval by interval and rank by rank, with padding or without; steps that overflowed do not count."""
    world = _world(tmp_path / "model", shape)
    _write(tmp_path / "global_step34", world, ranks, intervals, padded)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "70M.yml").write_text(YAML)
    for source in ("", "global_step34"):
        assert_moments(load_fisher(tmp_path / source, world.folder), world.moments)


@pytest.mark.parametrize(
    "options", [{"groups": 1}, {"rigid": True, "padded": True}, {"rigid": True, "padded": True, "intervals": 2}]
)
def test_one_group_and_ordinary_states(options, tmp_path):
    """Without weight decay there is one group; a checkpoint that is not elastic has steps and settings."""
    world = _world(tmp_path / "model", NEOX[0])
    _write(tmp_path / "global_step34", world, **options)
    (tmp_path / "global_step34" / "70M.yml").write_text(YAML)
    assert_moments(load_fisher(tmp_path / "global_step34", world.folder), world.moments)


@pytest.mark.parametrize("shape", NEOX)
@pytest.mark.parametrize("parallel", [2, 4])
def test_parts_of_tensor_parallelism_are_joined(parallel, shape, tmp_path):
    """Rows or columns follow one another; biases after a sum over ranks, and norms, are taken once and not added."""
    shape = {
        **shape,
        "num_attention_heads": 4,
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": shape["vocab_size"] // 5 * 20,
    }
    world = _world(tmp_path / "model", shape)
    _write(tmp_path / "global_step34", world, ranks=3, parallel=parallel)
    (tmp_path / "6-9B.yml").write_text(YAML)
    assert_moments(load_fisher(tmp_path, world.folder), world.moments)


def test_betas_that_no_file_tells_are_supplied(tmp_path):
    """They are in the YAML of the run alone, which is not always published beside."""
    world = _world(tmp_path / "model", NEOX[0])
    _write(tmp_path / "global_step34", world)
    assert_moments(load_fisher(tmp_path / "global_step34", world.folder), world.moments, beta2=None)
    extract(tmp_path / "global_step34", tmp_path / "out", world.folder, beta2=0.97)
    assert_moments(load_fisher(tmp_path / "out"), world.moments)


@pytest.mark.parametrize("layers", [True, False])
def test_cuts_are_verified(layers, tmp_path):
    """By the files of the layers, or without them by the model: other weights mean another layout."""
    world = _world(tmp_path / "model", NEOX[0])
    other = _world(tmp_path / "other", NEOX[0])
    world.weights = {name: tensor + 1 for name, tensor in world.weights.items()}
    _write(tmp_path / "global_step34", world, layers=layers)
    if layers:
        file = tmp_path / "global_step34" / "layer_02-model_00-model_states.pt"
        torch.save({name: tensor + 1 for name, tensor in torch.load(file).items()}, file)
    with pytest.raises(MismatchError, match="must hold the weights in float32"):
        load_fisher(tmp_path / "global_step34", other.folder)


@pytest.mark.parametrize(
    "missing", ["zero_pp_rank_0_mp_rank_00", "zero_pp_rank_2_mp_rank_00", "zero_pp_rank_0_mp_rank_01"]
)
def test_a_missing_rank_is_named(missing, tmp_path):
    """Of data parallelism, and of tensor parallelism."""
    world = _world(tmp_path / "model", {**NEOX[0], "vocab_size": 32, "num_attention_heads": 4})
    _write(tmp_path / "global_step34", world, ranks=3, parallel=2)
    (tmp_path / "global_step34" / f"{missing}_optim_states.pt").unlink()
    with pytest.raises((NotFoundError, CorruptFileError), match="rank"):
        load_fisher(tmp_path / "global_step34", world.folder)


def test_a_whole_missing_model_rank_is_named(tmp_path):
    """A download of one of two model ranks alone is refused."""
    world = _world(tmp_path / "model", {**NEOX[0], "vocab_size": 32, "num_attention_heads": 4})
    _write(tmp_path / "global_step34", world, parallel=2)
    for file in (tmp_path / "global_step34").glob("zero*mp_rank_01*"):
        file.unlink()
    with pytest.raises(UnsupportedStateError, match="those of mp_rank_01 are missing"):
        load_fisher(tmp_path / "global_step34", world.folder)


def test_longer_buffers_are_refused(tmp_path):
    """Entries behind the parameters that are no padding belong to a parameter that is not named."""
    world = _world(tmp_path / "model", NEOX[0])
    _write(tmp_path / "global_step34", world, ranks=1)
    file = tmp_path / "global_step34" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    loaded = torch.load(file, weights_only=False)
    del loaded["param_shapes"][list(loaded["param_shapes"])[-1]]
    torch.save(loaded, file)
    with pytest.raises(CorruptFileError, match="padding that is not 0"):
        load_fisher(tmp_path / "global_step34", world.folder)


@pytest.mark.parametrize(
    "name",
    ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "layer_02-model_00-model_states.pt"],
)
def test_a_malicious_pickle_runs_nothing(name, tmp_path):
    """None of the files opens another."""
    world = _world(tmp_path / "model", NEOX[1])
    _write(tmp_path / "global_step34", world)
    loaded = torch.load(tmp_path / "global_step34" / name, weights_only=False)
    torch.save({**loaded, "extra": Opens(tmp_path / "marker")}, tmp_path / "global_step34" / name)
    with pytest.raises(UnsafeFileError, match="nothing of it was run"):
        load_fisher(tmp_path / "global_step34", world.folder)
    assert not (tmp_path / "marker").exists()
