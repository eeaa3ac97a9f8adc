"""Tensor parallelism of nanotron: parts that the headers of the weights' files place, and headers that contradict."""

import pytest
import torch
from safetensors.torch import save_file

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import CorruptFileError, NotFoundError
from tests.other_trainers import SHAPES, World, adam, assert_moments, to_nanotron, write_json

ALL = "None,None,None"
EVEN = [
    {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16, "vocab_size": 22},
    {**SHAPES[1], "head_dim": 6},
]


def _blocks(name, world):
    """Return the numbers of rows of the tensors that are fused in one; each is cut on its own."""
    if "qkv_proj" in name:
        return [world.heads * world.width, *[world.groups * world.width] * 2]
    return [world.config.intermediate_size] * 2 if "gate_up_proj" in name else None


def _cut(name, tensor, world, parts):
    """Return the part of each rank, and the pairs of regions in the header of its file; None for a whole tensor."""
    if tensor.ndim == 1:
        return None
    if name.split(".")[-2] in ("o_proj", "down_proj"):
        width = tensor.shape[1] // parts
        return [
            (tensor[:, k * width : (k + 1) * width], f"{ALL}|0,{width},None#{ALL}|{k * width},{(k + 1) * width},None")
            for k in range(parts)
        ]
    blocks = _blocks(name, world) or [tensor.shape[0]]
    result = []
    for k in range(parts):
        rows, pairs, begin, filled = [], [], 0, 0
        for count in blocks:
            size = count // parts
            rows.append(tensor[begin + k * size : begin + (k + 1) * size])
            pairs.append(f"{filled},{filled + size},None|{ALL}#{begin + k * size},{begin + (k + 1) * size},None|{ALL}")
            begin, filled = begin + count, filled + size
        result.append((torch.cat(rows), ";".join(pairs)))
    return result


def _write(folder, world, parts=2, ranks=0, stages=1, numpy=False):
    """Write a step with tensor parallelism, and ZeRO-1 of ``ranks``; the weights' files have the regions."""
    own = to_nanotron(world, world.moments)
    (folder / "optimizer").mkdir(parents=True)
    offsets, shapes = {}, {}
    for stage in range(stages):
        names = [name for k, name in enumerate(own) if k * stages // len(own) == stage]
        for part in range(parts):
            cuts = {name: _cut(name, own[name], world, parts) for name in names}
            tensors = {n: own[n] if cut is None else cut[part][0].contiguous() for n, cut in cuts.items()}
            for name, cut in cuts.items():
                place = folder / "model" / name.rpartition(".")[0].replace(".", "/")
                place.mkdir(parents=True, exist_ok=True)
                sizes = ", ".join(f"np.int64({size})" if numpy else str(size) for size in own[name].shape)
                notes = {} if cut is None else {"version": "1.4", "local_global_slices_pairs": cut[part][1],
                                                "unsharded_shape": f"({sizes})"}  # fmt: skip
                of_rank = "" if cut is None else f"_pp-rank-{stage}-of-{stages}_tp-rank-{part}-of-{parts}"
                save_file({"data": tensors[name]}, place / f"model_weight{of_rank}.safetensors", notes)
            for rank in range(max(ranks, 1)):
                state = adam(tensors, numbered=True)
                state["names"] = dict(enumerate(names))
                for name, entry in zip(names, state["state"].values(), strict=True):
                    if ranks:
                        size = tensors[name].numel()
                        begin, end = size * rank // ranks, size * (rank + 1) // ranks
                        for key in ("exp_avg", "exp_avg_sq"):
                            entry[key] = entry[key].flatten()[begin:end].clone()
                        if stage == 0:  # the first rank writes those of its own stage alone
                            offsets.setdefault(name, {})[str(rank)] = [str(begin), str(end)]
                            shapes[name] = [str(axis) for axis in tensors[name].shape]
                of_rank = f"_dp-{rank}-of-{ranks}" if ranks else ""
                torch.save(state, folder / "optimizer" / f"optimizer_pp-{stage}-of-{stages}{of_rank}_tp-{part}-of-{parts}_exp-0-of-1.pt")  # fmt: skip # noqa: E501
    configs = {"param_name_to_dp_rank_offsets": offsets, "orig_param_shapes": shapes} if ranks else {}
    write_json(folder / "optimizer" / "optimizer_config.json", {"type": "x", "configs": configs})
    write_json(folder / "model_config.json", {"is_llama_config": True, "rope_interleaved": False})


@pytest.mark.parametrize(
    ("shape", "options"),
    [(0, {}), (1, {"ranks": 3}), (0, {"ranks": 2, "stages": 2, "numpy": True}), (1, {"stages": 3})],
)
def test_parts_are_joined(shape, options, tmp_path):
    """Fused tensors are cut block by block, and the regions in the headers put each block in its place."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **EVEN[shape])
    _write(tmp_path / "30", world, **options)
    assert_moments(load_fisher(tmp_path / "30", world.folder), world.moments)


def test_a_missing_part_is_named(tmp_path):
    """All ranks of tensor parallelism are needed."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **EVEN[0])
    _write(tmp_path / "30", world, ranks=2)
    (tmp_path / "30" / "optimizer" / "optimizer_pp-0-of-1_dp-1-of-2_tp-1-of-2_exp-0-of-1.pt").unlink()
    with pytest.raises(NotFoundError, match="that of pp 0, tp 1, dp 1 is missing"):
        load_fisher(tmp_path / "30", world.folder)


def test_without_the_weights_files_nothing_is_guessed(tmp_path):
    """Queries, keys and values are cut on their own, which the state does not tell."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **EVEN[0])
    _write(tmp_path / "30", world)
    (tmp_path / "30" / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(NotFoundError, match="copy model/ as well"):
        load_fisher(tmp_path / "30", world.folder)


@pytest.mark.parametrize("pairs", [f"0,8,None|{ALL}#0,8,None|{ALL}", f"0,9,2|{ALL}#0,9,2|{ALL}", "none"])
def test_regions_that_do_not_make_up_a_tensor_are_refused(pairs, tmp_path):
    """Regions that overlap, have steps, or are no regions are named with the file."""
    world = World(tmp_path / "model", tie_word_embeddings=False, **EVEN[0])
    _write(tmp_path / "30", world)
    place = tmp_path / "30" / "model" / "model" / "decoder" / "1" / "pp_block" / "mlp" / "gate_up_proj"
    file = place / "model_weight_pp-rank-0-of-1_tp-rank-1-of-2.safetensors"
    notes = {"local_global_slices_pairs": pairs, "unsharded_shape": "(32, 16)"}
    save_file({"data": torch.zeros(16, 16)}, file, notes)
    with pytest.raises(CorruptFileError, match=r"make up its|tell the regions"):
        load_fisher(tmp_path / "30", world.folder)
