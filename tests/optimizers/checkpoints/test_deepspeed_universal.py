"""Universal checkpoints of DeepSpeed."""

import shutil

import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import CorruptFileError, MismatchError, NotFoundError
from tests.checkpoints import assert_read, copy, truth

STEP = "global_step4_universal"
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("below", ["", STEP])
def test_the_step_is_found_from_the_checkpoint_and_from_its_own_folder(below, tmp_path):
    """The folder with `latest_universal` and the folder of the step are both accepted."""
    assert_read(copy("ds_universal", tmp_path) / below, truth("ds_universal"))


def test_the_original_checkpoint_comes_first(tmp_path):
    """The original checkpoint, whose slices are verified, is read if both are in the folder."""
    folder = copy("ds_universal", tmp_path)
    shutil.copytree(copy("ds_zero2", tmp_path), folder, dirs_exist_ok=True)
    assert assert_read(folder, truth("ds_zero2")).config.source.layout == "deepspeed"


def test_a_wrong_conversion_is_found(tmp_path):
    """Swapped float32 weights of two parameters are found, because their second moments are swapped too."""
    folder = copy("ds_universal", tmp_path)
    zero = folder / STEP / "zero"
    other = NAME.replace("up", "gate")
    for key in ("fp32", "exp_avg_sq", "exp_avg"):
        a, b, spare = zero / NAME / f"{key}.pt", zero / other / f"{key}.pt", zero / "spare"
        a.rename(spare)
        b.rename(a)
        spare.rename(b)
    with pytest.raises(MismatchError, match="is not its weights"):
        load_fisher(folder)


def test_a_missing_parameter_and_a_wrong_shape_are_refused(tmp_path):
    """A missing folder of a parameter and a tensor of another shape are refused by name."""
    folder = copy("ds_universal", tmp_path)
    shutil.rmtree(folder / STEP / "zero" / NAME)
    with pytest.raises(NotFoundError, match=rf"{NAME} is missing"):
        load_fisher(folder)
    folder = copy("ds_universal", tmp_path / "again")
    file = folder / STEP / "zero" / NAME / "exp_avg_sq.pt"
    file.unlink()
    torch.save({"param": torch.zeros(3, 5)}, file)
    with pytest.raises(CorruptFileError, match=r"must have the shape \[21, 15\]"):
        load_fisher(folder)
