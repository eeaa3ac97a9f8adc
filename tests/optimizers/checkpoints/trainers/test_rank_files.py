"""Numbered states of each rank under FSDP1 and FSDP2, as verl writes them."""

from itertools import pairwise

import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import MismatchError, NamingError, NotFoundError, UnsafeFileError, UnsupportedStateError
from squisher_mergekit.optimizers.checkpoints import fsdp_ranks, safe_pickle
from tests.checkpoints import STATES, truth
from tests.other_trainers import SHAPES, Opens, World, adam, assert_moments, write_json


def _write(actor, world, ranks=2, original=False, frozen=()):
    """Write the files of each rank under FSDP1."""
    actor.mkdir(parents=True)
    world.bare(actor / "huggingface")
    units = [[n for n in world.order if ".layers." not in n]]
    units += [[n for n in world.order if f".layers.{k}." in n] for k in range(world.layers)]
    if original:
        units = [[name] for name in world.order]
    pieces = []
    for unit in units:
        flat = torch.cat([world.moments[name].reshape(-1) for name in unit])
        size = -(-flat.numel() // ranks)
        if not original:
            flat = torch.cat([flat, torch.zeros(size * ranks - flat.numel())])
        # With original parameters a rank may own nothing of a small one.
        bounds = [
            min(size * k, flat.numel()) if not original else _bound(flat.numel(), k, ranks) for k in range(ranks + 1)
        ]
        pieces.append([flat[a:b].clone() for a, b in pairwise(bounds)])
    for rank in range(ranks):
        own = {str(k): piece[rank] for k, piece in enumerate(pieces)}
        state = adam(own, numbered=True)
        state["state"] = {
            k: entry for k, entry in state["state"].items() if entry["exp_avg_sq"].numel() and k not in frozen
        }
        torch.save(state, actor / f"optim_world_size_{ranks}_rank_{rank}.pt")
    write_json(actor / "fsdp_config.json", {"FSDP_version": 1, "world_size": ranks})


def _bound(numel, k, ranks):
    return (0, *[numel] * ranks)[k] if numel < 30 else numel * k // ranks


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 11])
@pytest.mark.parametrize("shape", SHAPES)
def test_flat_parts_are_joined_and_cut(shape, ranks, original, tmp_path):
    """The run, the step, the actor and a file are accepted; the config is that beside the files."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **shape)
    actor = tmp_path / "run" / "global_step_30" / "actor"
    _write(actor, world, ranks, original)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("30")
    for source in (tmp_path / "run", actor.parent, actor, actor / f"optim_world_size_{ranks}_rank_0.pt"):
        fisher = load_fisher(source)
        assert_moments(fisher, world.moments)
        assert fisher.config.source.layout == "verl"
    assert_moments(load_fisher(actor, world.folder), world.moments)


@pytest.mark.parametrize("tied", [False, True])
def test_original_parameters_of_a_single_rank_are_whole(tied, tmp_path):
    """FSDP1 shards nothing in a world of one process."""
    world = World(tmp_path / "model", tie_word_embeddings=tied, **SHAPES[0])
    world.bare(tmp_path / "actor" / "huggingface")
    torch.save(adam(world.moments, numbered=True), tmp_path / "actor" / "optim_world_size_1_rank_0.pt")
    assert_moments(load_fisher(tmp_path / "actor"), world.moments)


def test_a_tied_head_is_in_the_flat_parameter_of_the_root_once(tmp_path):
    """The root has the embeddings and the last norm."""
    world = World(tmp_path / "model", tie_word_embeddings=True, **SHAPES[0])
    _write(tmp_path / "actor", world)
    assert_moments(load_fisher(tmp_path / "actor"), world.moments)


def test_a_parameter_without_state_on_any_rank_is_listed(tmp_path):
    """With original parameters, a frozen one has no entry."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[0])
    _write(tmp_path / "actor", world, original=True, frozen=(3,))
    fisher = load_fisher(tmp_path / "actor")
    assert set(world.moments) - set(fisher) == {world.order[3]}


@pytest.mark.parametrize("original", [False, True])
def test_a_missing_rank_is_named_even_with_names(original, tmp_path):
    """The part of one rank is never taken for the whole."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[0])
    _write(tmp_path / "actor", world, 3, original)
    (tmp_path / "actor" / "optim_world_size_3_rank_1.pt").unlink()
    for names in (None, world.order):
        for source in (tmp_path / "actor", tmp_path / "actor" / "optim_world_size_3_rank_0.pt"):
            with pytest.raises(NotFoundError, match="that of rank 1 is missing"):
                load_fisher(source, names=names)


@pytest.mark.parametrize("changes", [{"layers": 3}, {"intermediate_size": 28}])
def test_another_model_is_refused(changes, tmp_path):
    """Another number of layers or another width does not fit the flat parameters."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[0])
    other = World(tmp_path / "other", tie_word_embeddings=False, **{**SHAPES[0], **changes})
    _write(tmp_path / "actor", world)
    with pytest.raises((MismatchError, NamingError), match="give the --model that was trained"):
        load_fisher(tmp_path / "actor", other.folder)


def test_without_a_config_nothing_is_guessed(tmp_path):
    """The refusal asks for the model."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[0])
    _write(tmp_path / "actor", world)
    (tmp_path / "actor" / "huggingface" / "config.json").unlink()
    with pytest.raises(NamingError, match="give --model DIR"):
        load_fisher(tmp_path / "actor")


@pytest.mark.parametrize("name", ["fsdp2_sharded_nodcp", "fsdp2_hybrid_nodcp"])
def test_numbered_tensors_of_fsdp2_are_joined_and_named(name, tmp_path):
    """Real shards of FSDP2 under numbers, in the order of the model."""
    expected = truth(name)
    files = sorted((STATES / name).glob("optimizer_0_rank*.bin"))
    (tmp_path / "actor" / "huggingface").mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "actor" / "huggingface" / file).write_bytes((STATES / name / file).read_bytes())
    order = [slot for slot in _order(STATES / name) if slot in expected]
    for rank, file in enumerate(files):
        with fsdp_ranks.shards_allowed():
            state = safe_pickle.load(file)
            state = {
                "state": {order.index(n): entry for n, entry in state["state"].items()},
                "param_groups": [{**state["param_groups"][0], "params": list(range(len(order)))}],
            }
            torch.save(state, tmp_path / "actor" / f"optim_world_size_{len(files)}_rank_{rank}.pt")
    fisher = load_fisher(tmp_path / "actor")
    assert set(fisher) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(fisher[key], tensor)


def _order(folder):
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return [name for name, _ in model.named_parameters()]


def test_a_malicious_pickle_runs_nothing(tmp_path):
    """The file of a rank opens no other file."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[1])
    _write(tmp_path / "actor", world)
    file = tmp_path / "actor" / "optim_world_size_2_rank_1.pt"
    torch.save({**torch.load(file), "extra": Opens(tmp_path / "marker")}, file)
    with pytest.raises(UnsafeFileError, match="nothing of it was run"):
        load_fisher(tmp_path / "actor")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("wrapped", [False, True])
def test_codes_of_each_rank_are_refused(wrapped, ranks, tmp_path):
    """Bitsandbytes cuts blocks of each rank's own part, so that the first rank's codes are not the whole tensor's."""
    _write(tmp_path / "actor", World(tmp_path / "model", **SHAPES[0]), ranks)
    for file in (tmp_path / "actor").glob("optim_*.pt"):
        loaded = torch.load(file)
        for number, entry in loaded["state"].items():
            codes = torch.zeros(entry["exp_avg_sq"].shape, dtype=torch.uint8)
            scales = torch.ones(-(-codes.numel() // 256))
            parts = {f"{key}{k}": value for k in (1, 2) for key, value in
                     (("state", codes), ("qmap", torch.linspace(0, 1, 256)), ("absmax", scales))}  # fmt: skip
            loaded["state"][number] = {"step": 30} | ({"__bnb_optimizer_quant_state__": parts} if wrapped else parts)
        torch.save(loaded, file)
    with pytest.raises(UnsupportedStateError, match="in 8-bit or 4-bit codes"):
        load_fisher(tmp_path / "actor")
