"""Experiment on costs: the timed loop against a Fisher by hand, and its report."""

import json

import pytest
import torch
from torch import nn

from scripts.experiments import cost, digits, runner
from squisher_mergekit import estimate_fisher, load_fisher


def _examples(count, shape, classes):
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(count, *shape, generator=generator)
    return inputs, torch.randint(classes, (count,), generator=generator)


@pytest.mark.parametrize("labels", ["true", "exact"])
def test_the_loop_is_the_fisher(labels):
    """The Fisher of a linear layer is the mean of ((p - y) x)^2 in float64. ``exact`` weights all labels by p."""
    torch.manual_seed(2)
    model = nn.Linear(3, 5, bias=False)
    inputs, targets = _examples(7, (3,), 5)
    found = cost.loop(model, list(zip(inputs.split(1), targets.split(1), strict=True)), labels)["weight"]
    chances = (inputs.double() @ model.weight.detach().double().T).softmax(-1)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for x, target, p in zip(inputs.double(), targets, chances, strict=True):
        for label in range(5):
            weight = p[label] if labels == "exact" else float(label == target)
            expected += weight * torch.outer(p - torch.eye(5, dtype=torch.float64)[label], x) ** 2 / 7
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-10)


def test_both_methods_agree_for_the_convolutional_network():
    """Both methods give the same Fisher for the convolutional network, so their times are comparable."""
    torch.manual_seed(3)
    model = cost.convolutional()
    inputs, targets = _examples(5, (digits.SIDE**2,), digits.CLASSES)
    looped = cost.loop(model, list(zip(inputs.split(1), targets.split(1), strict=True)), "true")
    found = estimate_fisher(model, [(inputs, targets)])
    assert looped.keys() == dict(model.named_parameters()).keys()
    for name, tensor in looped.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.max()))


def test_the_squisher_is_the_optimizers_state(tmp_path):
    """The Squisher has all tensors of the optimizer's state under their names. Frozen parameters are not trained."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5))
    model[0].bias.requires_grad_(False)
    batches = [_examples(11, (3,), 5)] * 2
    names = cost.checkpoint(model, batches, tmp_path)
    assert names == ["0.weight", "2.weight", "2.bias"]
    state = torch.load(tmp_path / "optimizer.pt")["state"]
    fisher = load_fisher(tmp_path / "optimizer.pt", model=tmp_path, names=names)
    assert cost.touched(tmp_path / "optimizer.pt", model=tmp_path, names=names) == 3
    for number, name in enumerate(names):
        assert torch.equal(fisher[name], state[number]["exp_avg_sq"])


def test_differences_are_in_units_of_their_tensor():
    """Differences are relative to their tensor.

    Tensors of rounding errors count relative to 1e-12 of the largest entry.
    """
    expected = {"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([0.5, 0.25]), "c": torch.tensor([1e-20])}
    found = {"a": torch.tensor([4.0, 2.0]), "b": torch.tensor([0.5, 0.5]), "c": torch.tensor([3e-20])}
    assert cost.apart(found, expected) == 0.5
    assert cost.apart({"c": found["c"], "a": expected["a"]}, {n: expected[n] for n in "ac"}) == pytest.approx(5e-9)


def test_a_cell_has_the_difference_of_both_methods(tmp_path, monkeypatch):
    """A cell has the difference of both methods and the repeats of each, and leaves no files."""
    inputs, targets = _examples(9, (digits.SIDE**2,), digits.CLASSES)
    monkeypatch.setattr(digits, "load", lambda seed: digits.Sets(inputs, targets, inputs, targets))
    setting = cost.Setting("made up", 1.0, cost.images_of(cost.convolutional), "exact")
    monkeypatch.setitem(cost.SETTINGS, "made up", setting)
    found = cost.cell({"setting": "made up", "examples": 8, "repeats": 2}, tmp_path)
    assert found["apart"] < 1e-4
    assert {way: len(spent) for way, spent in found["cpu_seconds"].items()} == {
        "loop": 2,
        "estimate": 2,
        "optimizer": 5,
        "portable": 5,
    }
    assert list(tmp_path.iterdir()) == []


def _report(**estimate):
    cells = [
        {
            "settings": {"setting": name, "examples": 128, "repeats": 3},
            "result": {
                "parameters": 2_500_000,
                "apart": 2e-6,
                "cpu_seconds": {
                    "loop": [10.0, 12.0, 11.0],
                    "estimate": [estimate.get(name, 2.2)] * 3,
                    "optimizer": [0.02, 0.01, 0.5],
                    "portable": [0.005] * 3,
                },
            },
        }
        for name in ("merging", "ewc")
    ]
    return {"cells": cells}


def test_the_table_has_medians_and_ratios():
    """The table has medians and ratios, and the note has the smallest ratio."""
    (table,) = cost.tables(_report(ewc=1.0))
    assert table.rows[0][1] == ["2.50 M", "128", "11.00", "2.20 (5.0 times less)", "0.0200", "0.0050", "110", "29,266"]
    assert "at least 50 times cheaper than `estimate_fisher` (EWC" in table.notes[0]
    assert len(table.notes) == 1


def test_the_note_names_rows_where_the_loop_was_as_fast():
    """The note names the rows where the loop was as fast."""
    (table,) = cost.tables(_report(ewc=11.5))
    assert table.notes[1] == "`estimate_fisher` was not faster than one example at a time in: " + (
        f"{cost.SETTINGS['ewc'].title}."
    )


def test_the_picture_is_a_png():
    """The PNG is small enough for a README."""
    ((name, data),) = cost.pictures(_report()).items()
    assert name == "cost.png"
    assert data.startswith(b"\x89PNG")
    assert len(data) < 120_000


def test_the_kept_report_has_the_current_cells():
    """The kept report has the cells of all current settings, and both methods gave the same Fisher in each."""
    report = json.loads((runner.RESULTS / "cost.json").read_text())
    assert [cell["settings"] for cell in report["cells"]] == [dict(settings) for settings in cost.EXPERIMENT.full]
    assert report["revision"] == cost.EXPERIMENT.revision
    assert max(cell["result"]["apart"] for cell in report["cells"]) < 1e-3
