"""DeepSpeed's buffers: right slices, and refusal of slices that cannot be verified."""

import shutil

import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import CorruptFileError, MismatchError, NotFoundError, UnsupportedStateError
from squisher_mergekit.optimizers.checkpoints.deepspeed import find
from tests.checkpoints import assert_read, copy, rewrite, truth, without_stand_ins

STAGES = ["ds_zero1", "ds_zero2", "ds_zero3"]


def _model_file(folder):
    return next((folder / "global_step4").glob("*0_mp_rank_00_model_states.pt"), None) or (
        folder / "global_step4" / "mp_rank_00_model_states.pt"
    )


def _optim_file(folder, rank=0):
    return folder / "global_step4" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("below", ["", "global_step4"])
def test_the_step_is_found_from_the_checkpoint_and_from_its_own_folder(name, below, tmp_path):
    """The folder with `latest` and the folder of the step are both accepted, also without `latest`."""
    folder = copy(name, tmp_path)
    assert_read(folder / below, truth(name))
    (folder / "latest").unlink()
    assert_read(folder / below, truth(name))


def test_of_several_steps_the_one_that_latest_names_is_taken(tmp_path):
    """Without `latest`, the highest step wins, compared as a number."""
    folder = copy("ds_zero2", tmp_path)
    shutil.copytree(folder / "global_step4", folder / "global_step10")
    assert find(folder).name == "global_step4"
    (folder / "latest").unlink()
    assert find(folder).name == "global_step10"
    (folder / "latest").write_text("../elsewhere")
    assert find(folder).name == "global_step10"


@pytest.mark.parametrize("name", STAGES)
def test_more_than_nine_ranks_are_put_in_the_order_of_their_numbers(name, tmp_path):
    """Buffers redistributed over 11 ranks are read in numeric order, although 10 comes before 2 as text."""
    folder, ranks = copy(name, tmp_path), 11
    parts = [_optim_file(folder, rank) for rank in (0, 1)]
    loaded = []
    for part in parts:
        rewrite(part, loaded.append)
    for part in parts:
        part.unlink()
    shapes = torch.load(_model_file(folder), weights_only=True)["param_shapes"]
    old = [one["optimizer_state_dict"] for one in loaded]
    for rank in range(ranks):
        torch.save({"optimizer_state_dict": _dealt(old, shapes, rank, ranks, name)}, _optim_file(folder, rank))
    for file in (folder / "global_step4").glob("*model_states.pt"):
        rewrite(file, lambda model: model.update(dp_world_size=ranks))
    assert_read(folder, truth(name))


def _dealt(old, shapes, rank, ranks, name):
    """Redistribute the buffers of two ranks, and return those of one of many."""
    if name == "ds_zero3":
        inner = [one["optimizer_state_dict"] for one in old]
        tensors = {
            k: {
                key: _share([i["state"][k][key] for i in inner], shapes[k], rank, ranks)
                for key in ("exp_avg", "exp_avg_sq")
            }
            for k in range(2)
        }
        state = {k: {"step": inner[0]["state"][k]["step"], **tensors[k]} for k in range(2)}
        masters = [_share([one["fp32_flat_groups"][k] for one in old], shapes[k], rank, ranks) for k in range(2)]
        groups = {"state": state, "param_groups": inner[0]["param_groups"]}
        return {"optimizer_state_dict": groups, "fp32_flat_groups": masters, "partition_count": ranks}
    bases = [one["base_optimizer_state"] for one in old]
    state = {
        g: {
            key: value if key == "step" else _part([base["state"][g][key] for base in bases], rank, ranks)
            for key, value in bases[0]["state"][g].items()
        }
        for g in range(2)
    }
    masters = [_part([one["single_partition_of_fp32_groups"][g] for one in old], rank, ranks) for g in range(2)]
    return {
        "base_optimizer_state": {"state": state, "param_groups": bases[0]["param_groups"]},
        "single_partition_of_fp32_groups": masters,
        "partition_count": [ranks, ranks],
    }


def _part(tensors, rank, ranks):
    whole = torch.cat(tensors)
    size = -(-whole.numel() // ranks)
    return torch.cat([whole, torch.zeros(size * ranks - whole.numel())])[rank * size : (rank + 1) * size].clone()


def _share(tensors, shapes, rank, ranks):
    """Return one rank's part of each parameter, which two ranks hold in halves."""
    offset, parts = 0, []
    for shape in shapes.values():
        half = -(-shape.numel() // len(tensors))
        whole = torch.cat([tensor[offset : offset + half] for tensor in tensors])[: shape.numel()]
        parts.append(_part([whole], rank, ranks))
        offset += half
    return torch.cat(parts)


@pytest.mark.parametrize("name", ["ds_zero1", "ds_zero2"])
def test_another_order_of_equal_shapes_is_found(name, tmp_path):
    """Two parameters of one shape that are swapped in param_shapes contradict the weights in the buffers."""
    folder = copy(name, tmp_path)

    def swap(model):
        shapes = list(model["param_shapes"][0].items())
        places = [i for i, (key, _) in enumerate(shapes) if "gate_proj" in key or "up_proj" in key]
        shapes[places[0]], shapes[places[1]] = shapes[places[1]], shapes[places[0]]
        model["param_shapes"][0] = dict(shapes)

    rewrite(_model_file(folder), swap)
    with pytest.raises(MismatchError, match=r"(gate|up)_proj.* is not its weights"):
        load_fisher(folder)


def test_the_order_of_stage_3_is_compared_with_the_saved_weights(tmp_path):
    """Stage 3 has no weights in its own files, so its order is compared with the saved model."""
    folder = copy("ds_zero3", tmp_path)

    def swap(model):
        shapes = dict(model["param_shapes"][0])
        order = list(shapes)
        gate, up = (next(i for i, key in enumerate(order) if part in key) for part in ("gate_proj", "up_proj"))
        order[gate], order[up] = order[up], order[gate]
        model["param_shapes"][0] = {key: shapes[key] for key in order}

    for file in (folder / "global_step4").glob("*model_states.pt"):
        rewrite(file, swap)
    with pytest.raises(MismatchError, match=r"(gate|up)_proj.* is not its weights"):
        load_fisher(folder)


@pytest.mark.parametrize("name", STAGES)
def test_a_missing_rank_is_named(name, tmp_path):
    """A missing first or last rank is refused by its number."""
    for rank in (0, 1):
        folder = copy(name, tmp_path / str(rank))
        _optim_file(folder, rank).unlink()
        with pytest.raises(NotFoundError, match=f"that of rank {rank} is missing"):
            load_fisher(folder)


def test_files_of_too_many_ranks_are_refused(tmp_path):
    """Files of a former run with more ranks are refused."""
    folder = copy("ds_zero2", tmp_path)
    shutil.copy(_optim_file(folder, 1), _optim_file(folder, 2))
    with pytest.raises(CorruptFileError, match="of 2 ranks, found 3"):
        load_fisher(folder)


@pytest.mark.parametrize(
    "extra",
    ["mp_rank_01_model_states.pt", "layer_03-model_00-model_states.pt", "expp_rank_0_mp_rank_00_optim_states.pt"],
)
def test_split_models_are_refused(extra, tmp_path):
    """Tensor, pipeline and expert parallelism are refused, because they slice differently."""
    folder = copy("ds_zero2", tmp_path)
    (folder / "global_step4" / extra).touch()
    with pytest.raises(UnsupportedStateError, match="parallelism"):
        load_fisher(folder)


def test_a_bf16_model_is_verified_in_its_own_dtype(tmp_path):
    """Weights saved in bfloat16 are compared after the same rounding."""
    folder = copy("ds_zero2", tmp_path)

    def narrow(model):
        model["module"] = {name: tensor.bfloat16() for name, tensor in model["module"].items()}

    rewrite(_model_file(folder), narrow)
    assert_read(folder, truth("ds_zero2"))


def test_paddings_between_parameters_are_skipped(tmp_path):
    """Padding between aligned parameters is part of no parameter."""
    folder = copy("ds_zero2", tmp_path)
    shapes = torch.load(_model_file(folder), weights_only=True)["param_shapes"]
    pads = [[(3 * i) % 7 for i, _ in enumerate(group)] for group in shapes]
    loaded = []
    for rank in (0, 1):
        rewrite(_optim_file(folder, rank), loaded.append)
    old = [one["optimizer_state_dict"] for one in loaded]
    for g, group in enumerate(shapes):
        stuffed = {}
        for key in ("exp_avg", "exp_avg_sq"):
            stuffed[key] = _padded([one["base_optimizer_state"]["state"][g][key] for one in old], group, pads[g])
        master = _padded([one["single_partition_of_fp32_groups"][g] for one in old], group, pads[g])
        for rank, one in enumerate(old):
            one["param_alignment_paddings"] = pads
            for key, whole in stuffed.items():
                one["base_optimizer_state"]["state"][g][key] = _part([whole], rank, 2)
            one["single_partition_of_fp32_groups"][g] = _part([master], rank, 2)
    for rank, one in enumerate(old):
        torch.save(without_stand_ins({"optimizer_state_dict": one}), _optim_file(folder, rank))
    assert_read(folder, truth("ds_zero2"))


def _padded(tensors, shapes, pads):
    whole, offset, parts = torch.cat(tensors), 0, []
    for shape, pad in zip(shapes.values(), pads, strict=True):
        parts += [whole[offset : offset + shape.numel()], torch.full((pad,), 9e9)]
        offset += shape.numel()
    return torch.cat(parts)


def test_damaged_states_raise_errors_of_the_package(tmp_path):
    """A damaged state raises an error of one line from this package."""
    for number, change in enumerate(
        [
            lambda o: o["optimizer_state_dict"].pop("base_optimizer_state"),
            lambda o: o["optimizer_state_dict"]["base_optimizer_state"]["state"].pop(0),
            lambda o: o["optimizer_state_dict"]["single_partition_of_fp32_groups"].pop(),
            lambda o: o["optimizer_state_dict"].update(single_partition_of_fp32_groups=3),
            lambda o: o.pop("optimizer_state_dict"),
        ]
    ):
        folder = copy("ds_zero2", tmp_path / str(number))
        rewrite(_optim_file(folder, 0), change)
        with pytest.raises((CorruptFileError, MismatchError)):
            load_fisher(folder)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("change", [lambda v: v[:-1].clone(), lambda v: torch.cat([v, v[:1]])])
def test_a_buffer_of_another_length_than_the_weights_is_refused(name, change, tmp_path):
    """A buffer with a missing or extra entry is refused, because it would shift all later parameters."""
    folder = copy(name, tmp_path)

    def spoil(loaded):
        inner = loaded["optimizer_state_dict"]
        inner = inner.get("base_optimizer_state") or inner["optimizer_state_dict"]
        inner["state"][1]["exp_avg_sq"] = change(inner["state"][1]["exp_avg_sq"])

    rewrite(_optim_file(folder, 0), spoil)
    with pytest.raises(CorruptFileError, match="length of exp_avg_sq"):
        load_fisher(folder)
