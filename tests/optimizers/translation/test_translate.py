"""Translation of slots: what it needs, what it says without it, and how numbered states are ordered."""

import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import MismatchError, NamingError, NotFoundError
from squisher_mergekit.optimizers.translation.translate import dimensions_of, family_of
from tests.other_trainers import (
    SHAPES,
    World,
    adam,
    assert_moments,
    save_distributed,
    to_litgpt,
    to_nanogpt,
    to_olmo_core,
    to_torchtitan,
    to_torchtune,
)

GPT2 = [{"n_embd": 24, "n_head": 3, "n_positions": 16, "vocab_size": 31},
        {"n_embd": 16, "n_head": 4, "n_positions": 8, "vocab_size": 9, "n_inner": 16}]  # fmt: skip


@pytest.mark.parametrize("make", [to_torchtune, to_olmo_core, to_litgpt])
def test_names_without_a_config_are_kept_and_said(make, tmp_path, caplog):
    """The warning has the trainer and the cure."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[1])
    own = make(world, world.moments)
    torch.save(adam(own), tmp_path / "state.pt")
    assert_moments(load_fisher(tmp_path / "state.pt"), own)
    assert "names are not those of a Hugging Face model, but those of" in caplog.text
    assert "give --model DIR" in caplog.text


def test_names_of_a_hugging_face_model_are_not_translated(tmp_path, caplog):
    """A state with such names is read as before, without a word."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[1])
    torch.save(adam(world.moments), tmp_path / "state.pt")
    assert_moments(load_fisher(tmp_path / "state.pt"), world.moments)
    assert_moments(load_fisher(tmp_path / "state.pt", world.folder), world.moments)
    assert "not those of a Hugging Face model" not in caplog.text


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_torchtune_numbers_in_its_own_order(shape, tmp_path):
    """With equal widths, the order of Hugging Face would fit as well, and be wrong."""
    shape = {**shape, "intermediate_size": shape["hidden_size"]}
    world = World(tmp_path / "model", tie_word_embeddings=False, **shape)
    bundle = {"optimizer": adam(to_torchtune(world, world.moments), numbered=True), "epochs_run": 1, "seed": 1}
    torch.save(bundle, tmp_path / "recipe_state.pt")
    torch.save(bundle, tmp_path / "renamed.pt")
    for file in ("recipe_state.pt", "renamed.pt"):
        assert_moments(load_fisher(tmp_path / file, world.folder), world.moments)
    with pytest.raises(NamingError, match=r"numbered in the order of torchtune, .*give --model DIR"):
        load_fisher(tmp_path / "renamed.pt")


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_litgpt_numbers_in_the_order_of_the_model_in_the_file(shape, tmp_path):
    """The head is the first parameter there."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **shape)
    model, own = to_litgpt(world, world.weights), to_litgpt(world, world.moments)
    torch.save({"model": model, "optimizer": adam(own, numbered=True), "step_count": 30}, tmp_path / "lit_model.pth")
    assert_moments(load_fisher(tmp_path / "lit_model.pth", world.folder), world.moments)


@pytest.mark.parametrize("shape", GPT2)
@pytest.mark.parametrize("name", ["ckpt.pt", "ckpt_of_mine.pt"])
def test_nanogpt_has_transposed_matrices_under_the_names_of_gpt2(name, shape, tmp_path):
    """A square matrix passes every check of shapes, so the keys of the file tell the trainer."""
    world = World(tmp_path / "model", "gpt2", **shape)
    model, own = to_nanogpt(world, world.weights), to_nanogpt(world, world.moments)
    saved = {f"_orig_mod.{key}": tensor for key, tensor in model.items()}
    saved["_orig_mod.lm_head.weight"] = saved["_orig_mod.transformer.wte.weight"]
    saved["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    groups = [[n for n in own if own[n].ndim >= 2], [n for n in own if own[n].ndim < 2]]
    bundle = {"model": saved, "optimizer": adam(own, numbered=True, groups=groups), "iter_num": 30}
    torch.save(bundle | {"model_args": {"n_layer": 2}, "config": {}}, tmp_path / name)
    assert_moments(load_fisher(tmp_path / name, world.folder), world.moments)


def test_composer_keeps_the_model_in_an_attribute(tmp_path):
    """The state is three containers deep, and its names begin with that of the attribute."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[0])
    own = {f"model.{name}": tensor for name, tensor in world.moments.items()}
    model = {f"model.{name}": tensor for name, tensor in world.weights.items()}
    state = {"model": model, "optimizers": {"DecoupledAdamW": adam(own)}, "timestamp": {"Timestamp": {"batch": 30}}}
    torch.save({"state": state, "rng": []}, tmp_path / "ep1-ba30-rank0.pt")
    assert_moments(load_fisher(tmp_path / "ep1-ba30-rank0.pt", world.folder), world.moments)
    assert_moments(load_fisher(tmp_path / "ep1-ba30-rank0.pt"), world.moments)  # the model in the file has the shapes


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_sharded_checkpoints_of_composer_have_the_attribute_as_well(shape, tmp_path):
    """The optimizer is below its class in the distributed checkpoint; the run and the step are accepted."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **shape)
    state = adam({f"model.{name}": tensor for name, tensor in world.moments.items()})
    save_distributed({"state": {"optimizers": {"DecoupledAdamW": state}}}, tmp_path / "run" / "ep1-ba30")
    for source in ("run", "run/ep1-ba30"):
        assert_moments(load_fisher(tmp_path / source, world.folder), world.moments)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_distributed_checkpoints_of_torchtitan_are_translated(shape, tmp_path):
    """The run and the step are accepted."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **shape)
    state = adam(to_torchtitan(world, world.moments))
    save_distributed({"model": to_torchtitan(world, world.weights), "optimizer": state}, tmp_path / "run" / "step-30")
    for source in ("run", "run/step-30"):
        assert_moments(load_fisher(tmp_path / source, world.folder), world.moments)


def test_a_parameter_that_was_never_stepped_has_no_parts(tmp_path):
    """A fused parameter without state leaves all its parts without a Fisher."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[0])
    state = adam(to_litgpt(world, world.moments))
    del state["state"]["transformer.h.1.attn.qkv.weight"]
    torch.save(state, tmp_path / "state.pt")
    fisher = load_fisher(tmp_path / "state.pt", world.folder)
    gone = {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"}
    assert set(world.moments) - set(fisher) == gone
    assert {fisher.config.coverage.without[name] for name in gone} == {"never stepped (frozen or unused)"}


def test_a_config_without_sizes_is_refused():
    """The number of heads is needed to cut rows."""
    with pytest.raises(MismatchError, match="must have num_attention_heads, found none"):
        dimensions_of({"model_type": "llama", "hidden_size": 8})


@pytest.mark.parametrize(
    "names", [["model.layers.0.self_attn.q_proj.weight"], ["a.b"], ["transformer.h.0.attn.c_attn.weight"]]
)
def test_other_names_are_of_no_trainer(names):
    """Neither Hugging Face's nor a user's own names are taken for those of a trainer."""
    assert family_of(names) is None


@pytest.mark.parametrize("attribute", ["model", "pretrained_model"])
def test_the_attribute_of_a_users_module_is_dropped_where_all_names_have_it(attribute, tmp_path):
    """Fabric's and Lightning's FSDP, value heads: the names that remain must all be the model's."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[0])
    state = adam({f"{attribute}.{name}": tensor for name, tensor in world.moments.items()})
    torch.save(state, tmp_path / "state.pt")
    assert_moments(load_fisher(tmp_path / "state.pt", world.folder), world.moments)
    save_distributed({"optimizer_0": state}, tmp_path / "dcp")
    assert_moments(load_fisher(tmp_path / "dcp", world.folder), world.moments)
    weights = {f"{attribute}.{name}": tensor for name, tensor in world.weights.items()}
    bundle = {"pytorch-lightning_version": "2.6", "state_dict": weights, "optimizer_states": [state]}
    torch.save(bundle, tmp_path / "x.ckpt")
    assert_moments(load_fisher(tmp_path / "x.ckpt"), world.moments)
    state["state"]["other"] = state["state"].pop(f"{attribute}.lm_head.weight")
    state["param_groups"][0]["params"][-1] = "other"
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(MismatchError, match="must be those of the model"):
        load_fisher(tmp_path / "state.pt", world.folder)


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("epoch=0-step=9.ckpt", "epoch=1-step=30.ckpt"), 1),
        (("ep1-ba9-rank0.pt", "ep1-ba30-rank0.pt"), 1),
        (("checkpoint-9.pth.tar", "checkpoint-30.pth.tar"), 1),
        (("ep1-ba30-rank0.pt", "latest-rank0.pt"), 1),
        (("model_best.pth.tar", "checkpoint-30.pth.tar", "last.pth.tar"), 2),
        (("model_best.pth.tar", "checkpoint-30.pth.tar"), None),
        (("a.pt", "b.pt"), None),
    ],
)
def test_the_newest_of_several_files_is_taken(names, taken, tmp_path, caplog):
    """By a name such as last, or by the step in all names; where neither tells, the user is asked."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[1])
    (tmp_path / "run").mkdir()
    for number, name in enumerate(names):
        torch.save({"optimizer": adam(world.moments, steps=30 if number == taken else 9)}, tmp_path / "run" / name)
    if taken is None:
        with pytest.raises(NotFoundError, match=f"give the one of {min(names)}"):
            load_fisher(tmp_path / "run", world.folder)
        return
    assert_moments(load_fisher(tmp_path / "run", world.folder), world.moments)
    assert f"taking {names[taken]}" in caplog.text


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize(("kind", "more"), [("qwen3", {"head_dim": 8}), ("qwen2", {})])
def test_a_config_of_another_kind_is_refused(kind, more, numbered, tmp_path):
    """All shapes fit, but rotary rows of torchtune's Llamas are in pairs, those of its Qwens in halves."""
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}
    world = World(tmp_path / "model", tie_word_embeddings=False, vocab_size=19, **shape)
    other = World(tmp_path / "other", kind, tie_word_embeddings=False, vocab_size=19, **shape, **more)
    own = to_torchtune(world, world.moments)
    torch.save({"optimizer": adam(own, numbered=numbered), "epochs_run": 1}, tmp_path / "recipe_state.pt")
    assert_moments(load_fisher(tmp_path / "recipe_state.pt", world.folder), world.moments)
    with pytest.raises(MismatchError, match="has that parameter in no layer"):
        load_fisher(tmp_path / "recipe_state.pt", other.folder)
