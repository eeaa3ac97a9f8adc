"""Warning about parameters whose change contradicts their names."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from squisher_mergekit import load_fisher
from tests.checkpoints import STATES


class _Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(47, 47, bias=False) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def _run(folder, order):
    """Train a model with the user's order of parameters in the optimizer; save before and after."""
    torch.manual_seed(7)
    model = _Tower()
    base, tuned = folder / "base", folder / "tuned"
    for place in (base, tuned):
        place.mkdir()
    save_file(model.state_dict(), base / "model.safetensors")
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW([parameters[i] for i in order], lr=1e-3)
    x, y = torch.randn(64, 47), torch.randn(64, 47)
    for _ in range(6):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    save_file(model.state_dict(), tuned / "model.safetensors")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tuned / "run.pt")
    return base, tuned


@pytest.mark.parametrize(("order", "swapped"), [((0, 1, 2), 0), ((0, 2, 1), 2), ((2, 0, 1), 3)])
def test_a_wrong_order_is_found_with_a_base(order, swapped, tmp_path, caplog):
    """Two swapped parameters of equal shape are found with the weights before training, and give a warning."""
    base, tuned = _run(tmp_path, order)
    with caplog.at_level(logging.WARNING):
        load_fisher(tuned, base=base)
    said = [line for line in caplog.messages if "were they given to the optimizer in the model's order" in line]
    assert len(said) == (1 if swapped else 0)
    assert not swapped or f"{swapped} parameters changed since base" in said[0]


def test_an_earlier_checkpoint_serves_as_well(tmp_path, caplog):
    """The previous checkpoint in a run folder serves as the base without an option."""
    base, tuned = _run(tmp_path, (1, 0, 2))
    base.rename(tmp_path / "checkpoint-2")
    tuned.rename(tmp_path / "checkpoint-8")
    load_fisher(tmp_path / "checkpoint-8")
    assert "changed since checkpoint-2" in caplog.text


def test_real_checkpoints_with_a_base_give_no_warning(caplog):
    """A right mapping of a real run gives no warning."""
    folder = STATES / "trainer_gpt2_tied_frozen"
    load_fisher(folder, base=folder / "base")
    assert "model's order" not in caplog.text


def test_a_damaged_earlier_checkpoint_does_not_stop_a_whole_one(tmp_path, caplog):
    """A damaged previous checkpoint is skipped, because it only serves the comparison."""
    base, tuned = _run(tmp_path, (1, 0, 2))
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    base.rename(tmp_path / "checkpoint-2")
    tuned.rename(tmp_path / "checkpoint-8")
    assert len(load_fisher(tmp_path / "checkpoint-8")) == 3
    assert "changed since" not in caplog.text
