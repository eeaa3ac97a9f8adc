"""Experiment on merging: merges of models with a few weights, and notes on its numbers."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from scripts.experiments import encoder, merging
from scripts.experiments.texts import Parts
from squisher_mergekit import save_squisher


class Tiny(nn.Module):
    """Trunk that is merged, with a pooler under the trunk's name and a classifier."""

    def __init__(self):
        super().__init__()
        self.bert = nn.ModuleDict({"layer": nn.Linear(3, 2), "pooler": nn.Linear(2, 2)})
        self.classifier = nn.Linear(2, 2)

    def forward(self, x):
        return self.classifier(torch.tanh(self.bert["pooler"](torch.tanh(self.bert["layer"](x)))))


INPUTS = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.3, -0.7], [-0.2, 0.9, 1.1], [0.4, 0.8, -1.6], [2.0, 0.1, 0.6]])
LABELS = torch.tensor([0, 1, 1, 0, 1])


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Return three models of a few weights, each trained for some steps, with the batches of the experiment's tasks."""
    folders, trained, squares = {}, {}, {}
    for number, task in enumerate(("a", "b", "c")):
        torch.manual_seed(number)
        model = Tiny()
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
        for _ in range(number + 2):
            nn.functional.cross_entropy(model(INPUTS), LABELS).backward()
            optimizer.step()
            optimizer.zero_grad()
        folders[task] = tmp_path / task
        folders[task].mkdir()
        save_file(model.state_dict(), folders[task] / "model.safetensors")
        save_squisher(model, optimizer, folders[task])
        trained[task] = model
        debias = 1 - 0.999 ** (number + 2)
        squares[task] = {name: optimizer.state[p]["exp_avg_sq"] / debias for name, p in model.named_parameters()}
    monkeypatch.setattr(encoder, "load", lambda folder: _copy(trained[folder.name]))
    monkeypatch.setattr(encoder, "in_order", lambda rows, length, size: [(INPUTS, LABELS)])
    monkeypatch.setattr(merging.Recipe, "parts", lambda recipe: Parts(["x", "y"], [("t", 0)], [], []))
    recipes = {task: merging.Recipe(task, 0, length=7) for task in folders}
    return merging.Models(folders, recipes, 128), trained, squares


def _copy(model):
    copy = Tiny()
    copy.load_state_dict(model.state_dict())
    return copy


def _weighted(trained, fishers, name):
    """Return Equation 13 in float64."""
    theta = [model.state_dict()[name].double() for model in trained]
    weights = [fisher[name].double() for fisher in fishers]
    return sum(w * t for w, t in zip(weights, theta, strict=True)) / sum(weights)


def test_the_trunk_alone_is_merged(models):
    """The average is the mean of the trunks. The pooler stays with its task, although it has the trunk's name."""
    found, trained, _ = models
    merged = found.merged("linear")
    assert set(merged) == {"bert.layer.weight", "bert.layer.bias"}
    mean = sum(model.state_dict()["bert.layer.weight"] for model in trained.values()) / 3
    torch.testing.assert_close(merged["bert.layer.weight"], mean)


def test_squishers_and_the_control(models):
    """Each model has its own accumulator, debiased. The control gives it the accumulator of the next model."""
    found, trained, squares = models
    own, others = list(squares.values()), [squares["b"], squares["c"], squares["a"]]
    for kind, fishers in (("squisher", own), ("control", others)):
        merged = found.merged(kind)["bert.layer.weight"].double()
        torch.testing.assert_close(merged, _weighted(trained.values(), fishers, "bert.layer.weight"), rtol=1e-5, atol=0)


def test_the_fisher_is_estimated_at_each_models_own_weights(models, monkeypatch):
    """The Fisher is estimated at each model's own weights, also after a merged trunk was scored in the model."""
    found, trained, _ = models
    monkeypatch.setattr(encoder, "accuracy", lambda *arguments: 0.0)
    found.score(found.merged("linear"))
    merged = found.merged("fisher")["bert.layer.weight"].double()
    fishers = []
    for model in trained.values():
        total = torch.zeros(2, 3, dtype=torch.float64)
        for x, y in zip(INPUTS, LABELS, strict=True):
            loss = nn.functional.cross_entropy(model(x[None]), y[None])
            (gradient,) = torch.autograd.grad(loss, model.bert["layer"].weight)
            total += gradient.double() ** 2
        fishers.append({"bert.layer.weight": total})
    torch.testing.assert_close(merged, _weighted(trained.values(), fishers, "bert.layer.weight"), rtol=1e-4, atol=0)


def test_a_trunk_is_scored_under_the_tasks_own_head(models, monkeypatch):
    """A trunk is scored with each task's own pooler and head. Single models are then scored with their own trunk."""
    found, trained, _ = models
    seen = []
    monkeypatch.setattr(encoder, "accuracy", lambda model, *rest: seen.append((_copy(model), rest)) or 50.0)
    trunk = {name: torch.full_like(tensor, 7.0) for name, tensor in found.merged("linear").items()}
    assert found.score(trunk) == {"a": 50.0, "b": 50.0, "c": 50.0}
    found.score(None)
    for (scored, rest), own in zip(seen[:3], trained.values(), strict=True):
        assert (scored.bert["layer"].weight == 7).all()
        assert torch.equal(scored.bert["pooler"].weight, own.bert["pooler"].weight)
        assert torch.equal(scored.classifier.weight, own.classifier.weight)
        assert rest == ([], 7, 2)  # the texts, their length, the competing classes
    for (scored, _), own in zip(seen[3:], trained.values(), strict=True):
        assert torch.equal(scored.bert["layer"].weight, own.bert["layer"].weight)


def test_heads_start_separately_or_equal():
    """Heads that start apart are all different.

    Equal heads are the same for all tasks of a seed. Texts and order are the same.
    """
    recipes = {
        heads: [
            [merging.task_recipe(one, number, task) for number, task in enumerate(one["tasks"])]
            for one in merging.EXPERIMENT.full
            if one["heads"] == heads
        ]
        for heads in merging.HEADS
    }
    assert len({recipe.head_seed for seed in recipes["apart"] for recipe in seed}) == 18
    assert [{recipe.head_seed for recipe in seed} for seed in recipes["equal"]] == [{1}, {2}, {3}]
    assert [[recipe.seed for recipe in seed] for seed in recipes["apart"]] == [[n] * 6 for n in (1, 2, 3)]


def test_the_earliest_of_the_best_checkpoints_is_taken(monkeypatch, tmp_path):
    """The earliest of the best checkpoints by validation accuracy is used. The final one has no step in its name."""
    scores = {"step-16": 80.0, "step-28": 85.0, "final": 85.0}
    monkeypatch.setattr(encoder, "load", lambda folder: folder.name)
    monkeypatch.setattr(encoder, "accuracy", lambda name, *rest: scores[name])
    recipe = merging.Recipe("x", 0, steps=40, keep_at=(16, 28))
    parts = Parts(["x", "y"], [], [], [])
    assert merging._best_step(tmp_path, recipe, parts) == 28
    scores["final"] = 86.0
    assert merging._best_step(tmp_path, recipe, parts) == 40


def _report(squisher):
    """Return a report of two seeds; rows are 2 points higher on task b of the second; ``squisher`` is a row's mean."""
    base = {"single": 90.0, "linear": 70.0, "fisher": 74.0, "squisher": squisher, "control": 60.0}

    def result(seed):
        final = {row: {"tweets": value - 5, "bbc": value + 5 + 2 * seed} for row, value in base.items()}
        early = {row: final[row] for row in ("single", "linear", "fisher")} | {"squisher": {"tweets": 50, "bbc": 60}}
        normalize = {"squisher": "none", "fisher": "mean" if seed else "l2"}
        early["steps"] = {"tweets": 16, "bbc": 40}
        return {"final": final, "early": early, "normalize": normalize}

    cells = [
        {"settings": {"heads": heads, "seed": seed, "test": 200}, "result": result(seed)}
        for heads in merging.HEADS
        for seed in range(2)
    ]
    return {"cells": cells}


@pytest.fixture(autouse=True)
def _class_counts(monkeypatch):
    monkeypatch.setattr(merging, "classes", {"tweets": 2, "bbc": 5}.__getitem__)


def test_tables_agree_with_the_cells():
    """Tables have means over tasks and then over seeds, computed by hand."""
    apart, equal, early = merging.tables(_report(80.0))
    assert list(apart.columns) == ["mean", "tweets (2)", "bbc (5)"]
    rows = dict(apart.rows)
    assert rows["plain average (`linear`)"] == ["70.5 ± 0.7", "65.0 ± 0.0", "76.0 ± 1.4"]
    assert rows["`squisher` with Squishers"] == ["80.5 ± 0.7", "75.0 ± 0.0", "86.0 ± 1.4"]
    assert equal.rows == apart.rows
    assert "Squisher less average +10.0 ± 0.0 (above 0 in 2 of 2 seeds)" in apart.notes[0]
    assert "control less average -10.0 ± 0.0 (above 0 in 0 of 2 seeds)" in apart.notes[0]
    assert "Squisher none, none; Fisher l2, mean" in apart.notes[0]
    assert dict(early.rows)["`squisher` with Squishers"] == ["80.5 ± 0.7", "55.0 ± 0.0"]
    assert "2 of 4 after 16 steps, 2 of 4 after 40 steps" in early.notes[0]
    assert "Squisher -25.5 ± 0.7, Fisher +0.0 ± 0.0" in early.notes[0]


def test_a_missing_order_has_a_note():
    """A row below the average on one seed has a note with the likely cause. A row above it on all seeds has none."""
    assert len(merging.tables(_report(80.0))[0].notes) == 1
    notes = merging.tables(_report(69.0))[0].notes
    assert "Here Squisher is not above it on every seed" in notes[1]
    assert "the seeds do not decide" in merging.tables(_report(74.0))[0].notes[-1]


def test_the_picture_is_a_small_png():
    """The picture is one small PNG for the README."""
    pytest.importorskip("matplotlib")
    (name, data), *rest = merging.pictures(_report(80.0)).items()
    assert (name, rest) == ("merging.png", [])
    assert data.startswith(b"\x89PNG")
    assert len(data) < 120_000
