"""State of a recorder in a checkpoint: whole, verified, and of one LoRA."""

import peft
import pytest
import torch
from torch import nn

from squisher_mergekit.errors import CorruptFileError, NotFoundError, RefusedError
from squisher_mergekit.training import LoraRecorder
from squisher_mergekit.training.lora.files import RECORDER_FOLDER, read_state, write_state


def _recorder(steps=0, width=4):
    torch.manual_seed(1)
    head = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))
    model = peft.get_peft_model(head, peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    recorder = LoraRecorder(model, 0.9, seed=4)
    for _ in range(steps):
        model(torch.randn(5, 3)).square().sum().backward()
        recorder.update()
    return recorder


def test_a_state_comes_back_bit_for_bit(tmp_path):
    """Averages, steps and draws of a recorder with weights held whole."""
    before, after = _recorder(3), _recorder()
    write_state(before, tmp_path)
    read_state(after, tmp_path)
    one, two = before.state_dict(), after.state_dict()
    averages = one.pop("averages"), two.pop("averages")
    assert one == two
    assert set(averages[0]) == set(averages[1]) == {"0.weight.rows", "0.weight.columns", "2.weight", "2.bias"}
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


def test_a_missing_damaged_or_foreign_state_is_refused(tmp_path):
    """Each in one line, and the recorder stays as it was."""
    with pytest.raises(NotFoundError, match="has none"):
        read_state(_recorder(), tmp_path)
    write_state(_recorder(1), tmp_path)
    with pytest.raises(RefusedError, match="must have the weight's shape"):
        read_state(_recorder(width=6), tmp_path)
    file = next((tmp_path / RECORDER_FOLDER).iterdir())
    data = bytearray(file.read_bytes())
    data[-3] ^= 255
    file.write_bytes(data)
    recorder = _recorder()
    with pytest.raises(CorruptFileError):
        read_state(recorder, tmp_path)
    assert not recorder.steps
