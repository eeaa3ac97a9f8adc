"""Checkpoints that cannot be read are named, with what reading them would take."""

import pytest

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import NotFoundError, UnsupportedStateError
from squisher_mergekit.optimizers.checkpoints.trainers.foreign import whose


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
