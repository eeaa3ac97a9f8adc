"""The experiment with EWC: its tasks, what is chosen and penalised, and what its tables say."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from experiments import digits, ewc, forgetting, forgetting_report

from squisher_mergekit.applications.ewc import EWCPenalty

ENDS = {"none": 60.0, "l2": 61.0, "fisher": 70.0, "squisher": 69.0}


@pytest.fixture
def few(monkeypatch):
    """Let 5,000 random images, 500 of each class, be the digits."""
    pixels = torch.rand(5000, digits.SIDE**2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5000) % digits.CLASSES
    monkeypatch.setattr(digits, "load", lambda seed: digits.split(pixels, labels, 1000, seed))


def _report(ends=None, lam=1e3):
    """Return a report of three made-up seeds; the others end as the Squisher does, a point lower."""
    cells = []
    for column in forgetting_report.COLUMNS:
        for name in forgetting_report.METHODS:
            if name not in forgetting_report.MAIN and column not in forgetting_report.ABLATED:
                continue
            end = 20.0 if column == "class" else {**ENDS, **(ends or {})}.get(name, ENDS["squisher"] - 1)
            cells.append(
                {
                    "settings": {
                        "column": column,
                        "method": name,
                        "lambdas": forgetting.lambdas(column, name),
                        "steps": 60,
                        "validation": 10,
                        "seeds": [0, 1, 2],
                    },
                    "result": {
                        "lambda": 0.0 if name == "none" else lam,
                        "so_far": [[99.0, 90.0, 80.0, 75.0, end + seed] for seed in range(3)],
                        "forgetting": [10.0] * 3,
                        "ratio": [1e9 if name == "own" else 2.0] * 3,
                    },
                }
            )
    return {"cells": cells}


def test_every_method_has_the_same_number_of_lambdas_but_none():
    """Four powers of ten, ten times apart; seeds reported are not the one that lambda is chosen on."""
    for settings in forgetting.EXPERIMENT.full:
        grid = settings["lambdas"]
        assert len(grid) == (1 if settings["method"] == "none" else 4)
        assert all(after == pytest.approx(10 * before) for before, after in pairwise(grid))
        assert settings["validation"] not in settings["seeds"]


def test_split_tasks_name_their_outputs(few):
    """Task: the two classes compete; domain: outputs 0 and 1; class: all classes seen, earlier tasks' too."""
    task, domain, each = (forgetting.course_of(scenario, 3) for scenario in ("task", "domain", "class"))
    for number in range(forgetting_report.TASKS):
        classes = set(task.tasks[number].labels.tolist())
        assert set(task.tasks[number].mask.nonzero().flatten().tolist()) == classes
        assert set(domain.tasks[number].labels.tolist()) == {0, 1}
        assert domain.tasks[number].mask.tolist() == [True, True] + 8 * [False]
        assert int(each.tasks[number].mask.sum()) == 2 * (number + 1)
        assert torch.equal(each.tested[4][number], torch.ones(10, dtype=torch.bool))
        assert torch.equal(each.tested[number][0], each.tasks[number].mask)
        assert len(task.tasks[number].labels) == 800
        assert len(task.tasks[number].test_labels) == 200


def test_permuted_tasks_share_the_classes_but_no_image(few):
    """All ten classes in each, the pixels of an image in another order, and no image twice."""
    course = forgetting.course_of("permuted", 3)
    sums = torch.cat([task.train.double().sum(1) for task in course.tasks])
    assert len(sums) == 4000
    assert len(sums.unique()) == 4000
    data = digits.load(3)
    assert torch.allclose(sums, data.train.double().sum(1))
    assert all(len(task.labels.unique()) == 10 and bool(task.mask.all()) for task in course.tasks)
    assert not torch.equal(course.tasks[0].train, data.train[:800])


def test_the_penalty_gets_what_the_method_says(few, monkeypatch):
    """After each task but the last: Squisher times 64, times 800, times 1; L2 ones; nothing without a penalty."""
    got = {}

    class Spy(EWCPenalty):
        def add(self, model, fisher, num_examples=None, *, examples_per_step=None):
            super().add(model, fisher, num_examples, examples_per_step=examples_per_step)
            got.setdefault(name, []).append(self._terms["0.weight"].fisher.sum().item())

    monkeypatch.setattr(forgetting, "EWCPenalty", Spy)
    course = forgetting.course_of("task", 3)
    for name in forgetting_report.METHODS:
        forgetting.learn(name, 0.0, course, 3, steps=2)
    assert "none" not in got
    assert all(len(found) == forgetting_report.TASKS - 1 for found in got.values())
    assert got["l2"][0] == 784 * 400
    assert got["squisher"][0] == pytest.approx(64 * got["unscaled"][0], rel=1e-5)
    assert got["dataset"][0] == pytest.approx(800 * got["unscaled"][0], rel=1e-5)
    assert got["own"][0] == pytest.approx(got["squisher"][0], rel=1e-4)  # one task, no penalty yet
    assert got["own"][1] - got["own"][0] != pytest.approx(got["squisher"][1] - got["squisher"][0], rel=1e-3)
    assert got["reset"][0] == got["squisher"][0]
    assert got["reset"][1] != got["squisher"][1]


def test_a_split_task_is_learnt_as_in_the_older_script(few):
    """One set of tasks, and one way to learn them: the same accuracies as ``ewc.learn``."""
    course = forgetting.course_of("task", 3)
    tasks = ewc.tasks_of(3)
    for name in forgetting_report.MAIN:
        expected = ewc.learn(name, 10.0, tasks, 3, steps=3).matrix
        assert torch.equal(forgetting.learn(name, 10.0, course, 3, steps=3).matrix, expected)


def test_a_cell_takes_the_best_lambda_and_of_equal_ones_the_smallest(monkeypatch, tmp_path):
    """By the accuracy at the end on the validation seed alone."""
    seen = []

    def learn(name, lam, course, seed, steps):
        seen.append((lam, seed))
        end = {10: {1.0: 0.5, 10.0: 0.75, 100.0: 0.75}}.get(seed, {10.0: 0.25})[lam]
        return ewc.Found(torch.full((2, 2), end, dtype=torch.float64), [1.0, 3.0])

    monkeypatch.setattr(forgetting, "learn", learn)
    monkeypatch.setattr(forgetting, "course_of", lambda column, seed: None)
    settings = {"column": "task", "method": "fisher", "lambdas": (100.0, 10.0, 1.0), "steps": 1, "validation": 10}
    result = forgetting.cell({**settings, "seeds": (0, 1)}, tmp_path)
    assert seen == [(100.0, 10), (10.0, 10), (1.0, 10), (10.0, 0), (10.0, 1)]
    assert result["lambda"] == 10.0
    assert result["swept"] == {"100.0": 75.0, "10.0": 75.0, "1.0": 50.0}
    assert result["so_far"] == [[25.0, 25.0]] * 2
    assert result["ratio"] == [3.0, 3.0]


def test_tables_tell_means_order_and_grids():
    """Means and deviations; the paper's order where it came out; class-incremental is no success; ends of grids."""
    scenarios, ablation = forgetting.tables(_report())
    assert dict(scenarios.rows)["exact Fisher"] == ["71.0 ± 1.0", "71.0 ± 1.0", "21.0 ± 1.0", "71.0 ± 1.0"]
    notes = " ".join(scenarios.notes)
    assert (
        "split (task-incremental): exact Fisher 10.0 ± 0.0, Squisher 9.0 ± 0.0, L2 (identity) 1.0 ± 0.0; the" in notes
    )
    assert notes.count("not the paper's order") == 1  # class-incremental
    assert "no success, as in the paper: 21.0 % at best" in notes
    assert notes.count("the paper's order, on every seed") == 3
    assert "exact Fisher, split (domain-incremental) (smallest)" in notes
    rows = dict(ablation.rows)
    assert rows["joint Fisher"] == ["69.0 ± 1.0", "1e+03", "69.0 ± 1.0", "1e+03"]
    assert set(rows) == {forgetting_report.METHODS[name].label for name in forgetting_report.METHODS} - {
        "no penalty",
        "L2 (identity)",
    }
    said = " ".join(ablation.notes)
    assert "joint Fisher -1.0 ± 0.0" in said
    assert "Squisher 6.4e+04, Squisher times N of a task 8.0e+05, Squisher without a factor 1.0e+03" in said
    assert "1e+09 and 2e+00" in said
    assert "neither runs away" not in said


def test_an_order_that_did_not_come_out_is_said():
    """A Squisher below no penalty is, in each column, not on every seed above, and not the paper's order."""
    scenarios, _ = forgetting.tables(_report({"squisher": 59.0}))
    notes = " ".join(scenarios.notes)
    assert notes.count("not the paper's order") == 4
    assert "Squisher -1.0 ± 0.0" in notes


def test_an_order_by_the_means_alone_is_said():
    """Where one seed of three is below no penalty, the seeds' own spread is told as the likely cause."""
    report = _report()
    for cell in report["cells"]:
        if cell["settings"]["column"] == "domain" and cell["settings"]["method"] == "none":
            for curve, end in zip(cell["result"]["so_far"], (50.0, 60.0, 76.0), strict=True):
                curve[-1] = end
    notes = " ".join(forgetting.tables(report)[0].notes)
    assert notes.count("by the means, **not on every seed**") == 1
    assert "seeds differ by ± 13.1" in notes


def test_the_picture_is_a_small_png():
    """Of the four columns."""
    pytest.importorskip("matplotlib")
    (data,) = forgetting.pictures(_report()).values()
    assert data.startswith(b"\x89PNG")
    assert len(data) < 120_000
