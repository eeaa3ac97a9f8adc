"""Checkpoints that cannot be read are named, with what reading them would take."""

import pytest
import torch
from safetensors.torch import save_file

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import NamingError, NotFoundError, UnsupportedStateError
from squisher_mergekit.optimizers.checkpoints.trainers.foreign import whose
from tests.other_trainers import adam


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.ckpt-1000000.index", "TensorFlow"),
        ("bert_model.ckpt.data-00000-of-00001", "TensorFlow"),
        ("model.weights.h5", "Keras"),
        ("last.keras", "Keras"),
        ("state.param_states.encoder/v/.zarray", "Orbax, T5X or Levanter"),
        ("default/manifest.ocdbt", "Orbax"),
        ("flax_model.msgpack", "Flax"),
        ("mp_rank_00/distrib_optim.pt", "Megatron-LM"),
        ("optim/rank3.pt", "unshard"),
    ],
)
def test_the_format_and_the_cure_are_named(name, words, tmp_path):
    """From the folder, and from the file where it is not inside of another."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"x" * 99)
    with pytest.raises(NotFoundError, match=words) as caught:
        load_fisher(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedStateError, match=words):
        load_fisher(tmp_path / name)


@pytest.mark.parametrize("name", ["optimizer.pt", "epoch_3.pt", "model.safetensors", "notes.txt"])
def test_files_that_may_be_read_are_of_no_foreign_trainer(name, tmp_path):
    """No file of a known layout is refused by its name."""
    (tmp_path / name).touch()
    assert whose(tmp_path) is whose(tmp_path / name) is None


@pytest.mark.parametrize(
    ("file", "name", "whose"),
    [
        ("model.safetensors", "lora_unet_down_blocks_0_proj_in.lora_down.weight", "kohya's sd-scripts"),
        ("model.safetensors", "lora_te1_text_model_mlp_fc1.lora_down.weight", "kohya's sd-scripts"),
        ("pytorch_lora_weights.safetensors", "unet.proj_in.lora_A.weight", "diffusers"),
    ],
)
def test_a_lora_whose_order_no_file_tells_is_refused_as_such(file, name, whose, tmp_path):
    """The states of accelerate are numbered, and no config.json would help; with names they are read."""
    moments = {name: torch.rand(2, 5), name.replace("down", "up").replace("lora_A", "lora_B"): torch.rand(5, 2)}
    save_file(moments, tmp_path / file)
    torch.save(adam(moments, numbered=True), tmp_path / "optimizer.bin")
    with pytest.raises(NamingError, match=rf"{whose}.* no file tells .*give --names FILE"):
        load_fisher(tmp_path)
    fisher = load_fisher(tmp_path, names=list(moments))
    assert all(torch.equal(fisher[key], tensor) for key, tensor in moments.items())
