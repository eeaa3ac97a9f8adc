"""Files under the names of other trainers: found at every level, with the folder of the model's config."""

import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import UnsafeFileError
from tests.other_trainers import SHAPES, Opens, World, adam, assert_moments, to_litgpt, to_olmo, to_torchtune


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_torchtune_is_read_at_every_level(shape, named, tmp_path):
    """The run, the folder and the file of the state, and the epoch after which it was saved, are accepted."""
    run = tmp_path / "run"
    world = World(run / "epoch_1", tie_word_embeddings=False, **shape)
    World(run / "epoch_0", tie_word_embeddings=False, seed=5, **shape)
    (run / "recipe_state").mkdir()
    state = adam(to_torchtune(world, world.moments), numbered=not named)
    bundle = {"optimizer": state, "seed": 1, "epochs_run": 2, "total_epochs": 3, "max_steps_per_epoch": None}
    torch.save(bundle, run / "recipe_state" / "recipe_state.pt")
    for source in (run, run / "recipe_state", run / "recipe_state" / "recipe_state.pt", run / "epoch_1"):
        fisher = load_fisher(source)
        assert_moments(fisher, world.moments)
        assert fisher.config.source.layout == "torchtune"


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_litgpt_has_the_config_beside(shape, tmp_path):
    """The run, the step and the file are accepted."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **shape)
    step = tmp_path / "run" / "step-00000030"
    world.bare(step)
    state = adam(to_litgpt(world, world.moments), numbered=True)
    torch.save({"model": to_litgpt(world, world.weights), "optimizer": state, "iter_num": 30}, step / "lit_model.pth")
    for source in (step.parent, step, step / "lit_model.pth"):
        assert_moments(load_fisher(source), world.moments)


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("kind", ["olmo", "olmo2"])
def test_olmo_sorts_its_names(kind, numbered, tmp_path):
    """Numbers count through ``param_names``, which are not in the model's order."""
    shape = {
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 31,
    }
    world = World(tmp_path / "model", kind, tie_word_embeddings=False, **shape)
    own = to_olmo(world, world.moments)
    state = adam({name: own[name] for name in sorted(own)}, numbered=numbered)
    state["param_groups"][0]["param_names"] = sorted(own)
    step = tmp_path / "run" / "step30-unsharded"
    step.mkdir(parents=True)
    torch.save(state, step / "optim.pt")
    for source in (step.parent, step, step / "optim.pt"):
        assert_moments(load_fisher(source, world.folder), world.moments)


@pytest.mark.parametrize("name", ["recipe_state.pt", "lit_model.pth", "optim.pt", "ckpt.pt"])
def test_a_malicious_pickle_runs_nothing(name, tmp_path):
    """The refusal names the callable."""
    torch.save({"optimizer": {}, "epochs_run": Opens(tmp_path / "marker")}, tmp_path / name)
    with pytest.raises(UnsafeFileError, match="nothing of it was run"):
        load_fisher(tmp_path)
    assert not (tmp_path / "marker").exists()
