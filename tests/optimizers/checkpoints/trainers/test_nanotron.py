"""nanotron's checkpoint: names, slices of ZeRO-1, stages of a pipeline, rotary rows."""

import pytest
import torch
from safetensors.torch import save_file

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import CorruptFileError, NotFoundError, UnsafeFileError, UnsupportedStateError
from tests.other_trainers import SHAPES, Opens, World, adam, assert_moments, to_nanotron, write_json


def _write(folder, world, ranks=0, stages=1, rotary=False, experts=True, parts=1):
    """Write the folder of a step; ``ranks`` of data parallelism with ZeRO-1, or whole tensors with 0."""
    own = to_nanotron(world, world.moments, rotary)
    names = list(own)
    (folder / "optimizer").mkdir(parents=True)
    offsets = {}
    for stage in range(stages):
        of_stage = {name: own[name] for k, name in enumerate(names) if k * stages // len(names) == stage}
        decay = [[n for n in of_stage if own[n].ndim > 1], [n for n in of_stage if own[n].ndim == 1]]
        order = [name for group in decay for name in group]
        for rank in range(max(ranks, 1)):
            state = adam(of_stage, numbered=True, groups=decay)
            if ranks:
                state["state"] = {
                    k: _slice(entry, order[k], rank, ranks, offsets) for k, entry in state["state"].items()
                }
                state["state"] = {k: entry for k, entry in state["state"].items() if entry is not None}
                kept = sorted(state["state"])  # each rank numbers its own parameters
                renumbered = {old: new for new, old in enumerate(kept)}
                state["state"] = {renumbered[k]: entry for k, entry in state["state"].items()}
                for group in state["param_groups"]:
                    group["params"] = [renumbered[k] for k in group["params"] if k in renumbered]
                state["names"] = {renumbered[k]: order[k] for k in kept}
            else:
                state["names"] = dict(enumerate(order))
            of_rank = f"_dp-{rank}-of-{ranks}" if ranks else ""
            end = "_exp-0-of-1" if experts else ""
            torch.save(
                state, folder / "optimizer" / f"optimizer_pp-{stage}-of-{stages}{of_rank}_tp-0-of-{parts}{end}.pt"
            )
    configs = {
        "param_name_to_dp_rank_offsets": offsets,
        "orig_param_shapes": {name: [str(size) for size in tensor.shape] for name, tensor in own.items()},
    }
    kind = "ZeroDistributedOptimizer" if ranks else "NamedOptimizer"
    write_json(folder / "optimizer" / "optimizer_config.json", {"type": kind, "configs": configs if ranks else {}})
    write_json(folder / "model_config.json", {"is_llama_config": True, "rope_interleaved": rotary})


def _slice(entry, name, rank, ranks, offsets):
    """Return one rank's slice of a parameter's state; None where it has nothing of it."""
    numel = entry["exp_avg_sq"].numel()
    count = min(ranks, numel, 1 + len(name) % ranks)  # a small number of ranks share some parameters
    bounds = [numel * k // count for k in range(count)] + [numel]
    offsets.setdefault(name, {}).update({str(k): [str(bounds[k]), str(bounds[k + 1])] for k in range(count)})
    if rank >= count:
        return None
    cut = slice(bounds[rank], bounds[rank + 1])
    return {key: value if not value.ndim else value.reshape(-1)[cut].clone() for key, value in entry.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options", [{}, {"ranks": 2}, {"ranks": 3, "experts": False}, {"stages": 2}, {"ranks": 2, "stages": 3}]
)
def test_a_step_is_read_at_every_level(options, shape, tmp_path):
    """The run with ``latest.txt``, the step, and the folder of the files are accepted."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **shape)
    _write(tmp_path / "run" / "30", world, **options)
    (tmp_path / "run" / "latest.txt").write_text("30")
    for source in ("run", "run/30", "run/30/optimizer"):
        fisher = load_fisher(tmp_path / source, world.folder)
        assert_moments(fisher, world.moments)
        assert fisher.config.source.layout == "nanotron"


@pytest.mark.parametrize("shape", SHAPES)
def test_rotary_rows_in_pairs_are_put_in_halves(shape, tmp_path):
    """The model's own config tells; the shapes are equal either way."""
    world = World(tmp_path / "model", tie_word_embeddings=True, **shape)
    _write(tmp_path / "30", world, ranks=2, rotary=True)
    assert_moments(load_fisher(tmp_path / "30", world.folder), world.moments)


EARLY = {"is_llama_config": True, "max_position_embeddings": 64, "pretraining_tp": 1, "rms_norm_eps": 1e-6}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("settings", "rotary"), [(EARLY, True), ({"is_llama_config": True}, False), ({"is_qwen2_config": True}, False)]
)
def test_without_the_setting_the_version_tells_the_order_of_rotary_rows(settings, rotary, shape, tmp_path):
    """Version 0.4 and earlier write their settings and always have pairs; elsewhere the later default counts."""
    world = World(tmp_path / "model", tie_word_embeddings=True, **shape)
    _write(tmp_path / "30", world, rotary=rotary)
    write_json(tmp_path / "30" / "model_config.json", settings)
    (world.folder / "model.safetensors").unlink()
    assert_moments(load_fisher(tmp_path / "30", world.folder), world.moments)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", [EARLY, {"is_llama_config": True}])
@pytest.mark.parametrize("rotary", [True, False])
def test_without_the_setting_the_weights_tell_the_order_of_rotary_rows(rotary, settings, shape, tmp_path):
    """The fused weights of the checkpoint are compared with those of the model in both orders."""
    world = World(tmp_path / "model", tie_word_embeddings=True, **shape)
    _write(tmp_path / "30", world, rotary=rotary)
    write_json(tmp_path / "30" / "model_config.json", settings)
    place = tmp_path / "30" / "model" / "model" / "decoder" / "0" / "pp_block" / "attn" / "qkv_proj"
    place.mkdir(parents=True)
    weight = to_nanotron(world, world.weights, rotary)["model.decoder.0.pp_block.attn.qkv_proj.weight"]
    save_file({"data": weight}, place / "model_weight_pp-rank-0-of-1_tp-rank-0-of-1.safetensors")
    assert_moments(load_fisher(tmp_path / "30", world.folder), world.moments)


def test_without_the_config_of_the_model_the_order_of_rotary_rows_is_not_guessed(tmp_path):
    """The file's name is in the message."""
    world = World(tmp_path / "model", tie_word_embeddings=True, **SHAPES[0])
    _write(tmp_path / "30", world)
    (tmp_path / "30" / "model_config.json").unlink()
    with pytest.raises(NotFoundError, match=r"must hold nanotron's model_config\.json.*copy it as well"):
        load_fisher(tmp_path / "30", world.folder)


def test_the_last_of_several_steps_is_taken(tmp_path):
    """Folders are compared as numbers."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[0])
    for step in (9, 30, 100):
        (tmp_path / "run" / str(step)).mkdir(parents=True)
    _write(tmp_path / "run" / "30" / "x", world)
    for name in ("optimizer", "model_config.json"):
        (tmp_path / "run" / "30" / "x" / name).rename(tmp_path / "run" / "30" / name)
    (tmp_path / "run" / "latest.txt").write_text("100")
    assert_moments(load_fisher(tmp_path / "run", world.folder), world.moments)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_missing_rank_is_named(stages, tmp_path):
    """The file of one rank alone is refused, whether the folder or the file is given, with names or without."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[0])
    _write(tmp_path / "30", world, ranks=2, stages=stages)
    (
        tmp_path / "30" / "optimizer" / f"optimizer_pp-{stages - 1}-of-{stages}_dp-1-of-2_tp-0-of-1_exp-0-of-1.pt"
    ).unlink()
    file = tmp_path / "30" / "optimizer" / f"optimizer_pp-0-of-{stages}_dp-0-of-2_tp-0-of-1_exp-0-of-1.pt"
    for source in (tmp_path / "30", file):
        for names in (None, list(world.moments)):
            with pytest.raises(NotFoundError, match=rf"that of pp {stages - 1}, dp 1 is missing"):
                load_fisher(source, names=names)


def test_wrong_offsets_are_refused(tmp_path):
    """Slices that overlap or leave gaps make up no parameter."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[0])
    _write(tmp_path / "30", world, ranks=2)
    file = tmp_path / "30" / "optimizer" / "optimizer_config.json"
    text = file.read_text()
    file.write_text(text.replace('"744"', '"745"', 1) if '"744"' in text else text.replace('["0", "', '["1", "', 1))
    with pytest.raises(CorruptFileError, match="must make up its"):
        load_fisher(tmp_path / "30", world.folder)


def test_expert_parallelism_is_refused(tmp_path):
    """No file tells how experts are shared out."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[0])
    _write(tmp_path / "30", world)
    for file in (tmp_path / "30" / "optimizer").glob("*.pt"):
        file.rename(file.with_name(file.name.replace("exp-0-of-1", "exp-0-of-2")))
    with pytest.raises(UnsupportedStateError, match="of expert parallelism"):
        load_fisher(tmp_path / "30", world.folder)


def test_tied_embeddings_of_the_last_stage_are_read_once(tmp_path):
    """The first and the last stage of a pipeline have them under one name."""
    world = World(tmp_path / "model", tie_word_embeddings=True, **SHAPES[0])
    _write(tmp_path / "30", world, stages=2)
    (first, last) = sorted((tmp_path / "30" / "optimizer").glob("*.pt"))
    states = torch.load(first), torch.load(last)
    name = "model.token_position_embeddings.pp_block.token_embedding.weight"
    index = next(k for k, own in states[0]["names"].items() if own == name)
    states[1]["names"][99] = name
    states[1]["state"][99] = states[0]["state"][index]
    states[1]["param_groups"][0]["params"].append(99)
    torch.save(states[1], last)
    assert_moments(load_fisher(tmp_path / "30", world.folder), world.moments)


def test_a_malicious_pickle_runs_nothing(tmp_path):
    """The file of a rank opens no other file."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[1])
    _write(tmp_path / "30", world)
    (file,) = (tmp_path / "30" / "optimizer").glob("*.pt")
    torch.save({**torch.load(file), "extra": Opens(tmp_path / "marker")}, file)
    with pytest.raises(UnsafeFileError, match="nothing of it was run"):
        load_fisher(tmp_path / "30", world.folder)
    assert not (tmp_path / "marker").exists()
