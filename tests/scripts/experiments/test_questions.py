"""Experiment on open questions: its measurements on made-up tensors and a model, and its report."""

import copy
import json

import pytest
import torch

from scripts.experiments import encoder, questions, questions_report, runner
from squisher_mergekit import load_fisher
from tests.scripts.experiments import tiny_encoder


def test_entries_are_every_eleventh_of_the_merged_tensors():
    """The entries are every eleventh of the merged tensors in the order of names, without heads and word embeddings."""
    fisher = {
        "bert.encoder.b": torch.arange(23.0),
        "bert.encoder.a": torch.arange(100.0, 126.0).view(2, 13),
        questions.WORDS: torch.ones(50),
        "bert.pooler.dense.weight": torch.ones(50),
        "classifier.bias": torch.ones(50),
    }
    assert questions.entries(fisher).tolist() == [100.0, 111.0, 122.0, 0.0, 11.0, 22.0]


def test_rank_is_the_mean_over_the_tasks():
    """The rank correlation is 1 for the same order at another scale and -1 for the reverse.

    It is the mean over the tasks.
    """
    order = {"w": torch.arange(1.0, 60.0)}
    assert questions.rank([order, order], [{"w": 7 * order["w"]}, {"w": -(order["w"] ** 3)}]) == 0.0
    assert questions.rank([order], [{"w": order["w"] ** 2}]) == 1.0


def test_the_control_rotates_the_fishers():
    """Each model in the control has the Fisher of the next one, and the last has that of the first."""
    assert questions.swapped(["a", "b", "c"]) == ["b", "c", "a"]


def test_zeros_that_codes_raise():
    """Shares of zeros and of raised zeros are percentages, mean over the tasks."""
    exact = [{"w": torch.tensor([0.0, 0.0, 1.0, 2.0]).repeat_interleave(11)}, {"w": torch.tensor([0.0])}]
    coded = [{"w": torch.tensor([0.0, 0.5, 1.0, 0.0]).repeat_interleave(11)}, {"w": torch.tensor([0.0])}]
    assert questions._zeros(exact) == 75.0
    assert questions._raised(exact, coded) == 25.0
    assert questions._apart({"w": torch.tensor([1.0, 5.0])}, {"w": torch.tensor([2.0, 8.0])}) == 3 / 8


@pytest.fixture
def tiny(monkeypatch):
    """Replace the encoder by a BERT of one layer, and return batches of random words."""
    tiny_encoder.install(monkeypatch)


def test_averages_along_a_run_are_those_of_its_gradients(tiny, tmp_path):
    """The average with Adam's beta2 after the last step equals its second moment.

    Earlier ones follow the recurrence in float64.
    """
    seen = []
    kept = questions.Averages(tmp_path / "averages", [0.5, 0.999], [2, 5])

    def watch(step, model):
        seen.append({name: copy.deepcopy(p.grad).double() for name, p in model.named_parameters()})
        kept.watch(step, model)

    recipe = encoder.Recipe("x", 3, steps=5, batch=4, clip=0.1)
    encoder.train(recipe, tmp_path, tmp_path / "model", watch)
    adams = load_fisher(tmp_path / "model" / "final")
    last = load_fisher(tmp_path / "averages" / questions.place(0.999, 5))
    assert questions._apart(last, adams) <= 1e-6
    early = load_fisher(tmp_path / "averages" / questions.place(0.5, 2))
    for name in early:
        expected = 0.25 * seen[0][name] ** 2 + 0.5 * seen[1][name] ** 2
        torch.testing.assert_close(early[name].double(), expected, rtol=1e-5, atol=1e-15)
    assert len(seen) == 5


def test_a_fine_tuning_takes_the_optimizer_it_is_given(tiny, tmp_path):
    """A fine-tuning uses the given optimizer class, with its groups and decays."""
    given = []

    def built(groups, betas):
        given.append((len(groups), betas))
        return torch.optim.AdamW(groups, betas=betas)

    encoder.train(encoder.Recipe("x", 3, steps=1, batch=4, beta2=0.98), tmp_path, tmp_path, optimizer_class=built)
    assert given == [(2, (0.9, 0.98))]


def test_without_bitsandbytes_its_cells_name_the_package(tmp_path, monkeypatch):
    """Without bitsandbytes, the cells fail before any training with the package to install."""
    monkeypatch.setattr(questions, "BITS8", "no_such_library")
    with pytest.raises(RuntimeError, match="pip install no_such_library"):
        questions.cell({"question": "8bit"}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def _report(shift=0.0):
    """Return a report of two seeds; ``shift`` is added to each Squisher's accuracy."""
    cells = []
    for seed in (1, 0):
        own = 80.0 + seed + shift
        found = {
            "steps": {
                "rows": [
                    {"beta2": beta2, "step": step, "accuracy": own + step / 10, "rank": 0.8 + step / 100}
                    for beta2 in (0.9, 0.999)
                    for step in (2, 5)
                ],
                "average": 70.0 + seed,
                "fisher": 79.0 + seed,
                "ceiling": 0.9,
                "unlike_adams": 3e-8,
            },
            "forms": {
                "rows": [
                    {"form": form, "bytes": 100 // (n + 1), "accuracy": own - n}
                    for n, form in enumerate(questions_report.FORMS)
                ],
                "model_bytes": 200,
                "average": 70.0 + seed,
                "swapped": 60.0 + seed,
            },
            "8bit": {
                "average": 70.0 + seed,
                "accuracy": {"float32": own, "8bit": own - 2},
                "zeros": {"float32": 50.0, "8bit": 40.0},
                "raised": 20.0,
                "rank": 0.95,
                "version": "0.0",
            },
            "data": {
                "rows": [
                    {"kind": kind, "accuracy": own - n, "rank": 1 - n / 10}
                    for n, kind in enumerate(questions_report.DATA)
                ],
                "ceiling": 0.9,
                "swapped": 60.0,
            },
        }
        for question, result in found.items():
            settings = {"question": question, "seed": seed, "tasks": ["a", "b"], "test": 200, "fisher_texts": 128}
            cells.append({"settings": settings, "result": result})
    return {"cells": cells}


def test_tables_hold_means_and_differences_seed_by_seed():
    """Each row has its own mean. The deviation of a difference is that of the differences per seed."""
    steps, forms, bits8, data = (dict(table.rows) for table in questions_report.tables(_report()))
    assert steps["accuracy of the merge, β2 = 0.9"] == ["80.7 ± 0.7", "81.0 ± 0.7"]
    assert steps["rank correlation, β2 = 0.999"] == ["0.820 ± 0.000", "0.850 ± 0.000"]
    assert forms["`log8`"] == ["16.5 %", "78.5 ± 0.7", "-2.0 ± 0.0"]
    assert forms["plain average (`linear`)"] == ["", "70.5 ± 0.7", "-10.0 ± 0.0"]
    assert bits8["the optimizer's own state, 8 bits"] == ["78.5 ± 0.7", "+8.0 ± 0.0"]
    assert data["Fisher on movie reviews, labels drawn"] == ["76.5 ± 0.7", "+6.0 ± 0.0", "0.600 ± 0.000"]
    assert data["control: each model with another's Fisher"] == ["60.0 ± 0.0", "-10.5 ± 0.7", ""]


def test_notes_follow_the_numbers():
    """The notes have the largest loss, the side of the ceiling, and the paper's order."""
    steps, forms, _, _ = (" ".join(table.notes) for table in questions_report.tables(_report()))
    assert "best of a Squisher's 0.850, below it" in steps
    assert "after 2 steps +10.2 ± 0.0 points over the plain average" in steps
    assert "not above it" not in steps
    assert "loses most is `rank1`: 4.0 of the 10.0 points" in forms
    below = [" ".join(table.notes) for table in questions_report.tables(_report(shift=-11.0))]
    assert "here the Squisher is not above it on every seed" in below[0]
    assert "Squisher and the computed Fisher are not above it" in below[3]


def test_the_picture_is_a_png():
    """The PNG is small enough for a README."""
    ((name, data),) = questions_report.pictures(_report()).items()
    assert name == "quality_against_steps.png"
    assert data.startswith(b"\x89PNG")
    assert len(data) < 120_000


def test_the_kept_report_has_the_current_cells():
    """The report has three seeds per cell.

    The average after the last step merges like the optimizer's own state, to the digit.
    """
    report = json.loads((runner.RESULTS / "questions.json").read_text())
    wanted = [json.loads(json.dumps(settings)) for settings in questions.EXPERIMENT.full]
    assert [cell["settings"] for cell in report["cells"]] == wanted
    along, forms = (questions_report.results(report, question) for question in ("steps", "forms"))
    last = questions_report.values(along, "accuracy", beta2=0.999, step=50)
    assert last == questions_report.values(forms, "accuracy", form="float32")
    assert questions_report.of(along, "average") == questions_report.of(forms, "average")


@pytest.mark.parametrize(
    ("one", "text"), [([1.0, 2.0], "0.0 ± 0.0"), ([1.5, 2.5], "+0.5 ± 0.0"), ([0.5, 1.5], "-0.5 ± 0.0")]
)
def test_differences_have_a_sign_unless_they_are_zero(one, text):
    """A difference has a sign unless it rounds to 0, also where rounding gives a negative zero."""
    assert questions_report.gain(one, [1.0, 2.0]) == text
    assert questions_report.gain([value - 1e-9 for value in one], [1.0, 2.0]) == text


def test_a_trained_model_is_reused(tmp_path, monkeypatch):
    """Fine-tuning returns the kept model of an equal recipe without training."""
    recipe, made = encoder.Recipe("tweets", 0), tmp_path / "made"
    (made / "final").mkdir(parents=True)
    (made / "final" / "weights").write_text("x")
    monkeypatch.setattr(encoder, "train", lambda *args: pytest.fail("trained again"))
    kept = encoder.keep(recipe, tmp_path / "work", made)
    assert encoder.fine_tune(recipe, tmp_path / "work") == kept
    assert (kept / "final" / "weights").read_text() == "x"
