"""DeepSpeed's pipelines: files of layers, stages, and ranks of tensor parallelism."""

import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import MismatchError, NamingError, UnsupportedStateError
from tests.other_trainers import World, assert_moments, to_bloom, to_neox

NEOX = [{"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 20},
        {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 10}]  # fmt: skip
BLOOM = [{"hidden_size": 16, "n_head": 2, "vocab_size": 30}, {"hidden_size": 24, "n_head": 6, "vocab_size": 18}]
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.97), "eps": 1e-8, "weight_decay": 0.1}


def _part(own, rank, ranks):
    result = {}
    for name, tensor in own.items():
        rows = any(
            part in name
            for part in (
                "query_key_value",
                "dense_h_to_4h",
                "word_embeddings.weight",
                "final_linear",
                "w1",
                "w3",
                "linear1",
            )
        )
        columns = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight", "w2.weight", "linear2.weight"))
        result[name] = tensor.chunk(ranks, 0)[rank] if rows else tensor.chunk(ranks, 1)[rank] if columns else tensor
    return {name: tensor.contiguous() for name, tensor in result.items()}


def _stages(own, count):
    """Return the names of each stage of a pipeline; the last one has a copy of tied embeddings."""
    numbers = {name: 0 if name.startswith("tied") else int(name.partition(".")[0]) for name in own}
    last = max(numbers.values())
    stages = [[n for n in own if min(numbers[n] * count // (last + 1), count - 1) == stage] for stage in range(count)]
    tied = [name for name in own if name.startswith("tied")]
    return (
        stages if count == 1 else [*stages[:-1], [*stages[-1], *(n for n in tied if n.endswith("embeddings.weight"))]]
    )


def _write(folder, moments, weights, data=2, stages=1, parts=1, prefix="", layers=True):
    """Write the step's folder of ZeRO-1 over a pipeline."""
    folder.mkdir(parents=True)
    for stage, names in enumerate(_stages(moments, stages)):
        for part in range(parts):
            rank = stage * parts + part
            own = _part({name: moments[name] for name in names}, part, parts)
            masters = _part({name: weights[name] for name in names}, part, parts)
            groups = [[n for n in names if own[n].ndim > 1], [n for n in names if own[n].ndim == 1]]
            shapes = [{name: own[name].shape for name in group} for group in groups]
            flat = [
                [torch.cat([source[n].reshape(-1) for n in group]) for group in groups] for source in (own, masters)
            ]
            cut = [[list(torch.nn.functional.pad(f, (0, -len(f) % data)).chunk(data)) for f in one] for one in flat]
            for number in range(data):
                state = {
                    g: {
                        "step": 30,
                        "exp_avg": torch.randn(cut[0][g][number].shape),
                        "exp_avg_sq": cut[0][g][number].clone(),
                    }
                    for g in (0, 1)
                }
                base = {"state": state, "param_groups": [{**SETTINGS, "params": [g]} for g in (0, 1)]}
                inner = {"base_optimizer_state": base, "partition_count": [data] * 2,
                         "single_partition_of_fp32_groups": [cut[1][g][number].clone() for g in (0, 1)]}  # fmt: skip
                torch.save(
                    {"optimizer_state_dict": inner},
                    folder / f"{prefix}zero_pp_rank_{number}_mp_rank_{rank:02}_optim_states.pt",
                )
            model = {"module": None, "param_shapes": shapes, "dp_world_size": data, "global_steps": 30}
            torch.save(model, folder / f"mp_rank_{rank:02}_model_states.pt")
            for number in sorted({n.partition(".")[0] for n in masters if n[0].isdigit()}) if layers else ():
                layer = {n.partition(".")[2]: t.bfloat16() for n, t in masters.items() if n.startswith(f"{number}.")}
                torch.save(layer, folder / f"layer_{int(number):02}-model_{part:02}-model_states.pt")


@pytest.mark.parametrize("shape", NEOX)
@pytest.mark.parametrize(
    "options", [{}, {"parts": 2}, {"stages": 2}, {"stages": 2, "parts": 2, "data": 3}, {"layers": False}]
)
def test_gpt_neox_over_stages_and_parts(options, shape, tmp_path):
    """A pipeline of one stage, several stages, and parts of tensors give the same Fisher."""
    world = World(tmp_path / "model", "gpt_neox", tie_word_embeddings=False, **shape)
    _write(tmp_path / "global_step30", to_neox(world, world.moments), to_neox(world, world.weights), **options)
    assert_moments(load_fisher(tmp_path / "global_step30", world.folder), world.moments)


def _to_neox_of_llama(world, tensors):
    """Return GPT-NeoX's names of a Llama; each query head has its rows, then its share of keys and of values."""
    names = {"self_attn.o_proj": "attention.dense", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    result = {"0.word_embeddings.weight": tensors["model.embed_tokens.weight"]}
    for number in range(world.layers):
        block = f"model.layers.{number}."
        parts = [tensors[f"{block}self_attn.{part}_proj.weight"] for part in "qkv"]
        heads = [torch.cat([part.chunk(world.heads)[head] for part in parts]) for head in range(world.heads)]
        result[f"{number + 2}.attention.query_key_value.weight"] = torch.cat(heads)
        for name, tensor in tensors.items():
            if name.startswith(block) and not name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                own = name.removeprefix(block).replace("layernorm.weight", "layernorm.scale")
                for theirs, ours in names.items():
                    own = own.replace(theirs, ours)
                result[f"{number + 2}.{own}"] = tensor
    result[f"{world.layers + 3}.norm.scale"] = tensors["model.norm.weight"]
    return result | {f"{world.layers + 4}.final_linear.weight": tensors["lm_head.weight"]}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("groups", [2, 4])
def test_a_llama_of_gpt_neox_fuses_its_projections_by_query_head(groups, parts, tmp_path):
    """Grouped queries share the rows of a head of keys; shapes alone would allow other orders."""
    shape = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 28, "vocab_size": 22}
    world = World(tmp_path / "model", tie_word_embeddings=False, num_key_value_heads=groups, **shape)
    moments, weights = (_to_neox_of_llama(world, tensors) for tensors in (world.moments, world.weights))
    _write(tmp_path / "global_step30", moments, weights, parts=parts)
    assert_moments(load_fisher(tmp_path / "global_step30", world.folder), world.moments)


def _with_two_matrices(world, tensors, blocks, parts):
    """Return the names since September 2024: the MLP has two matrices, and rows are fused block by block."""
    result = {}
    for name, tensor in _to_neox_of_llama(world, tensors).items():
        block = f"model.layers.{int(name.partition('.')[0]) - 2}."
        if ".w1." in name:
            pairs = [tensors[f"{block}mlp.{part}_proj.weight"].chunk(parts) for part in ("up", "gate")]
            result[name.replace("w1", "linear1")] = torch.cat(
                [half for rank in zip(*pairs, strict=True) for half in rank]
            )
        elif "query_key_value" in name:
            fused = [tensors[f"{block}self_attn.{part}_proj.weight"].chunk(blocks) for part in "qkv"]
            result[name] = torch.cat([part for one in zip(*fused, strict=True) for part in one])
        elif ".w3." not in name:
            result[name.replace("w2", "linear2")] = tensor
    return result


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("by_rank", [False, True])
def test_the_weights_tell_the_order_of_grouped_queries(by_rank, parts, tmp_path):
    """The order changed in November 2024; the names and shapes did not, and no file tells the version."""
    shape = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 28, "vocab_size": 22}
    world = World(tmp_path / "model", tie_word_embeddings=False, num_key_value_heads=2, **shape)
    blocks = parts if by_rank else world.heads
    own = [_with_two_matrices(world, tensors, blocks, parts) for tensors in (world.moments, world.weights)]
    _write(tmp_path / "global_step30", *own, parts=parts)
    assert_moments(load_fisher(tmp_path / "global_step30", world.folder), world.moments)
    with pytest.raises(NamingError, match=r"one query head after another, or, since November 2024"):
        load_fisher(tmp_path / "global_step30", world.bare(tmp_path / "bare"))


@pytest.mark.parametrize("parts", [1, 2])
def test_heads_of_their_own_keys_have_one_order(parts, tmp_path):
    """Without grouped queries the config is enough; each rank has its halves of the fused MLP."""
    shape = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 28, "vocab_size": 22}
    world = World(tmp_path / "model", tie_word_embeddings=False, **shape)
    own = [_with_two_matrices(world, tensors, world.heads, parts) for tensors in (world.moments, world.weights)]
    _write(tmp_path / "global_step30", *own, parts=parts)
    assert_moments(load_fisher(tmp_path / "global_step30", world.bare(tmp_path / "bare")), world.moments)


@pytest.mark.parametrize("shape", BLOOM)
@pytest.mark.parametrize("options", [{}, {"stages": 2}, {"stages": 3, "parts": 2}])
def test_bloom_has_tied_embeddings_in_two_stages(options, shape, tmp_path):
    """The copy of the last stage is not joined to the first."""
    world = World(tmp_path / "model", "bloom", n_layer=2, **shape)
    moments, weights = to_bloom(world, world.moments), to_bloom(world, world.weights)
    _write(tmp_path / "global_step30", moments, weights, prefix="bf16_", **options)
    assert_moments(load_fisher(tmp_path / "global_step30", world.folder), world.moments)


def test_files_of_layers_verify_the_cuts(tmp_path):
    """Other weights in the file of a layer mean that the buffers have another layout."""
    world = World(tmp_path / "model", "gpt_neox", tie_word_embeddings=False, **NEOX[0])
    _write(tmp_path / "global_step30", to_neox(world, world.moments), to_neox(world, world.weights))
    file = tmp_path / "global_step30" / "layer_03-model_00-model_states.pt"
    torch.save({name: tensor.flip(0) for name, tensor in torch.load(file).items()}, file)
    with pytest.raises(MismatchError, match=r"the copy of 3\."):
        load_fisher(tmp_path / "global_step30", world.folder)


def test_parts_of_an_unknown_kind_are_refused(tmp_path):
    """It is not known along which axis they follow one another."""
    world = World(tmp_path / "model", "gpt_neox", tie_word_embeddings=False, **NEOX[0])
    own = {n.replace("dense_h_to_4h", "other"): t for n, t in to_neox(world, world.moments).items()}
    weights = dict(zip(own, to_neox(world, world.weights).values(), strict=True))
    _write(tmp_path / "global_step30", own, weights, parts=2, layers=False)
    with pytest.raises(UnsupportedStateError, match=r"other\.\w+ .*in a way that is not known"):
        load_fisher(tmp_path / "global_step30", world.folder)
