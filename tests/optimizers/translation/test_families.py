"""Table of names: second moments under the names of each trainer come back under those of Hugging Face, bit for bit."""

from functools import partial

import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import MismatchError, NamingError, UnsupportedStateError
from tests.other_trainers import (
    SHAPES,
    World,
    adam,
    assert_moments,
    to_litgpt,
    to_megatron,
    to_nanotron,
    to_neox,
    to_olmo,
    to_olmo_core,
    to_torchtitan,
    to_torchtune,
)

OLMO = [{"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 31},
        {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 16, "vocab_size": 9}]  # fmt: skip
NEOX = [{"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 31},
        {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 8}]  # fmt: skip
GEMMA = [{**SHAPES[0], "head_dim": 6}, {**SHAPES[2], "head_dim": 10}]
QWEN3 = [{**SHAPES[0], "head_dim": 6}, {**SHAPES[1], "head_dim": 14}]
PHI3 = [{**shape, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} for shape in SHAPES[:2]]
_torchtune_in_halves = partial(to_torchtune, rotary=False)
_torchtitan_in_halves = partial(to_torchtitan, rotary=False)
_fused_torchtitan = partial(to_torchtitan, fuse=True)
_fused_torchtitan_in_halves = partial(to_torchtitan, rotary=False, fuse=True)
_to_early_litgpt = partial(to_litgpt, early=True)
CASES = [
    *(("llama", shape, make) for shape in SHAPES for make in (to_torchtune, to_torchtitan, to_litgpt, to_megatron)),
    *(("llama", shape, to_nanotron) for shape in SHAPES),
    *(("mistral", shape, make) for shape in SHAPES[:2] for make in (to_torchtune, to_litgpt, to_megatron)),
    *(("qwen2", shape, make) for shape in SHAPES[:2] for make in (to_litgpt, to_megatron, to_nanotron)),
    *(("llama", shape, to_olmo_core) for shape in SHAPES[:2]),
    *(("olmo", shape, to_olmo) for shape in OLMO),
    *(("olmo2", shape, make) for shape in OLMO for make in (to_olmo, to_olmo_core)),
    *(("gpt_neox", shape, make) for shape in NEOX for make in (to_neox, to_litgpt)),
    *((kind, shape, to_torchtune) for kind in ("gemma", "gemma2") for shape in GEMMA),
    *(("gemma2", shape, to_litgpt) for shape in GEMMA),
    *(("qwen3", shape, make) for shape in QWEN3 for make in (_torchtune_in_halves, _torchtitan_in_halves, to_litgpt)),
    *(("phi3", shape, make) for shape in PHI3 for make in (_torchtune_in_halves, to_litgpt)),
    *(("llama", shape, make) for shape in SHAPES for make in (_to_early_litgpt, _fused_torchtitan)),
    *(("qwen3", shape, _fused_torchtitan_in_halves) for shape in QWEN3),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "shape", "make"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_names_and_rows_come_back(kind, shape, make, tmp_path):
    """The config alone chooses the translation; every fused, permuted or stacked tensor gives its parts exactly."""
    world = World(tmp_path / "model", kind, tie_word_embeddings=False, **shape)
    torch.save(adam(make(world, world.moments)), tmp_path / "state.pt")
    assert_moments(load_fisher(tmp_path / "state.pt", world.folder), world.moments)
    saved = {
        name.replace("lm_head", "embed_out") if kind == "gpt_neox" else name: t for name, t in world.moments.items()
    }
    assert_moments(load_fisher(tmp_path / "state.pt", world.bare(tmp_path / "config")), saved)


@pytest.mark.parametrize("make", [to_torchtune, to_nanotron, to_olmo_core, to_torchtitan, to_megatron, to_litgpt])
def test_a_tied_head_is_once_in_the_state(make, tmp_path):
    """The embeddings hold the second moment of both uses, and the head is listed as tied."""
    world = World(tmp_path / "model", tie_word_embeddings=True, **SHAPES[0])
    assert "lm_head.weight" not in world.moments
    torch.save(adam(make(world, world.moments)), tmp_path / "state.pt")
    fisher = load_fisher(tmp_path / "state.pt", world.folder)
    assert_moments(fisher, world.moments)
    assert fisher.aliases == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_rotary_rows_follow_the_kind_of_model(shape, tmp_path):
    """The Qwen2 of torchtune has rows in halves, its Llama in pairs; the shapes are equal, so the config decides."""
    world = World(tmp_path / "model", "qwen2", tie_word_embeddings=False, **shape)
    torch.save(adam(to_torchtune(world, world.moments, rotary=False)), tmp_path / "state.pt")
    assert_moments(load_fisher(tmp_path / "state.pt", world.folder), world.moments)


def test_layers_need_not_be_stacked(tmp_path):
    """Megatron-Core writes them one by one in later versions."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[0])
    torch.save(adam(to_megatron(world, world.moments, stacked=False)), tmp_path / "state.pt")
    assert_moments(load_fisher(tmp_path / "state.pt", world.folder), world.moments)


def test_a_model_that_is_not_in_the_table_is_refused(tmp_path):
    """An OLMo 2 with torchtune's names has other norms; nothing is guessed."""
    world = World(tmp_path / "llama", tie_word_embeddings=False, **SHAPES[0])
    other = World(tmp_path / "olmo2", "olmo2", **OLMO[0])
    torch.save(adam(to_torchtune(world, world.moments)), tmp_path / "state.pt")
    with pytest.raises(UnsupportedStateError, match=r"those of torchtune, .* llama, mistral, .* but .* is of olmo2"):
        load_fisher(tmp_path / "state.pt", other.folder)


def test_a_name_that_is_not_in_the_table_is_refused(tmp_path):
    """An adapter or an expert of the trainer has no counterpart that is known."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[0])
    own = to_torchtune(world, world.moments) | {"layers.0.mlp.router.weight": torch.rand(3, 24)}
    torch.save(adam(own), tmp_path / "state.pt")
    with pytest.raises(MismatchError, match=r"layers\.0\.mlp\.router\.weight is not"):
        load_fisher(tmp_path / "state.pt", world.folder)


@pytest.mark.parametrize("make", [to_litgpt, to_megatron, to_nanotron])
def test_another_model_of_the_same_kind_is_refused(make, tmp_path):
    """Fewer heads, or fewer layers, do not fit the tensors."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **SHAPES[0])
    torch.save(adam(make(world, world.moments)), tmp_path / "state.pt")
    for number, changes in enumerate(({"num_key_value_heads": 4}, {"layers": 1}, {"layers": 3})):
        other = World(tmp_path / f"other{number}", tie_word_embeddings=False, **{**SHAPES[0], **changes})
        if changes == {"layers": 3} and make is not to_megatron:  # a state that lacks a layer is a partial one
            assert (
                "model.layers.2.mlp.up_proj.weight"
                in load_fisher(tmp_path / "state.pt", other.folder).config.coverage.without
            )
            continue
        with pytest.raises(MismatchError):
            load_fisher(tmp_path / "state.pt", other.folder)


def test_a_part_of_a_fused_tensor_must_not_be_missing(tmp_path):
    """Phi-3 fuses gate and up; the one without the other makes up no tensor."""
    world = World(tmp_path / "model", "phi3", tie_word_embeddings=False, **PHI3[0])
    own = to_torchtune(world, world.moments, rotary=False)
    own.pop("layers.1.mlp.w3.weight")
    torch.save(adam(own), tmp_path / "state.pt")
    with pytest.raises(MismatchError, match="must have second moments of its 2 parts"):
        load_fisher(tmp_path / "state.pt", world.folder)


@pytest.mark.parametrize("shape", PHI3)
def test_parts_are_numbered_in_the_order_of_the_trainer(shape, tmp_path):
    """The down projection has its number between those of gate and up, which Phi-3 fuses."""
    world = World(tmp_path / "model", "phi3", tie_word_embeddings=False, **shape)
    state = adam(to_torchtune(world, world.moments, rotary=False), numbered=True)
    torch.save({"optimizer": state, "epochs_run": 1, "seed": 0}, tmp_path / "recipe_state.pt")
    assert_moments(load_fisher(tmp_path, world.folder), world.moments)


# The grid of traps: kind of model, sizes and names of each trainer; every test below is of all of them.
EVERY = [("llama", SHAPES[0], to_torchtune), ("llama", SHAPES[0], to_torchtitan), ("llama", SHAPES[0], to_litgpt),
         ("llama", SHAPES[0], to_megatron), ("llama", SHAPES[0], to_nanotron), ("olmo2", OLMO[1], to_olmo),
         ("olmo2", OLMO[1], to_olmo_core), ("gpt_neox", NEOX[0], to_neox)]  # fmt: skip
every = pytest.mark.parametrize(("kind", "shape", "make"), EVERY, ids=lambda value: getattr(value, "__name__", None))


@every
def test_a_trained_state_that_counts_no_steps_is_read_without_their_number(kind, shape, make, tmp_path):
    """Step 0 beside trained second moments is a count that was never made; untrained ones are still refused."""
    world = World(tmp_path / "model", kind, tie_word_embeddings=False, **shape)
    own = make(world, world.moments)
    torch.save(adam(own, steps=0), tmp_path / "state.pt")
    assert_moments(load_fisher(tmp_path / "state.pt", world.folder), world.moments, steps=None)
    torch.save(adam({name: torch.zeros_like(t) for name, t in own.items()}, steps=0), tmp_path / "state.pt")
    with pytest.raises(UnsupportedStateError, match="must come from an optimizer that has stepped"):
        load_fisher(tmp_path / "state.pt", world.folder)


@every
def test_a_part_of_the_rows_is_never_taken_for_the_whole(kind, shape, make, tmp_path):
    """The file of one of two ranks, without its rank in the name, contradicts the config."""
    world = World(tmp_path / "model", kind, tie_word_embeddings=False, **shape)
    own = {n: t[: t.shape[0] // 2] if t.ndim > 1 else t for n, t in make(world, world.moments).items()}
    torch.save(adam(own), tmp_path / "state.pt")
    with pytest.raises(MismatchError):
        load_fisher(tmp_path / "state.pt", world.bare(tmp_path / "config"))
    torch.save(adam(own), tmp_path / "state_rank_0.pt")
    with pytest.raises(NamingError, match="one of several ranks or shards"):
        load_fisher(tmp_path / "state_rank_0.pt", names=list(own))


@every
def test_flat_slices_of_a_rank_are_refused(kind, shape, make, tmp_path):
    """Each tensor as one flat slice, as sharding optimizers hold it."""
    world = World(tmp_path / "model", kind, tie_word_embeddings=False, **shape)
    own = {n: t.reshape(-1)[: t.numel() // 2] for n, t in make(world, world.moments).items()}
    torch.save(adam(own), tmp_path / "state.pt")
    with pytest.raises(MismatchError):
        load_fisher(tmp_path / "state.pt", world.bare(tmp_path / "config"))


@every
def test_an_untied_head_does_not_vanish_in_a_tied_model(kind, shape, make, tmp_path):
    """The config of a tied model has no place for the head that was trained."""
    world = World(tmp_path / "model", kind, tie_word_embeddings=False, **shape)
    tied = World(tmp_path / "tied", kind, tie_word_embeddings=True, **shape)
    torch.save(adam(make(world, world.moments)), tmp_path / "state.pt")
    with pytest.raises(MismatchError, match=r"ties them; give the --model|must be those of the model"):
        load_fisher(tmp_path / "state.pt", tied.folder)


@every
def test_a_vocabulary_with_fewer_rows_is_refused(kind, shape, make, tmp_path):
    """Rows of padding are cut where the trainer pads; rows that are missing are never invented."""
    world = World(tmp_path / "model", kind, tie_word_embeddings=False, **shape)
    larger = World(tmp_path / "larger", kind, tie_word_embeddings=False, **{**shape, "vocab_size": 57})
    torch.save(adam(make(world, world.moments)), tmp_path / "state.pt")
    with pytest.raises(MismatchError):
        load_fisher(tmp_path / "state.pt", larger.bare(tmp_path / "config"))


@every
def test_the_names_of_the_model_stay_where_they_are_those_of_the_state(kind, shape, make, tmp_path):
    """A wrapper's attribute before a trainer's own names hides no trainer."""
    world = World(tmp_path / "model", kind, tie_word_embeddings=False, **shape)
    torch.save(adam({f"module.{name}": t for name, t in make(world, world.moments).items()}), tmp_path / "state.pt")
    assert_moments(load_fisher(tmp_path / "state.pt", world.folder), world.moments)
