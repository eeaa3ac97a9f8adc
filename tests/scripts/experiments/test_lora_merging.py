"""Experiment on merges of LoRA adapters: its cells, and one of them on a tiny encoder."""

import pytest
import torch
from safetensors.torch import load_file

from scripts.experiments import encoder, lora_merging, lora_report, structure_language, structure_tasks, texts
from scripts.experiments.runner import TIMINGS
from tests.scripts.experiments import tiny_encoder

SETTINGS = {
    **lora_merging.EXPERIMENT.quick[0],
    "steps": 3,
    "adapter": {"r": 2, "lora_alpha": 4, "lr": 1e-2, "head_lr": 1e-3, "record": True},
}


def test_each_seed_has_both_ranks_and_both_starts():
    """Twenty cells; alpha is the same for both ranks, and every run records the Fisher of W."""
    cells = lora_merging.EXPERIMENT.full
    assert len(cells) == 20
    assert len({(one["seed"], one["adapter"]["r"], one["heads"]) for one in cells}) == 20
    assert {one["adapter"]["lora_alpha"] for one in cells} == {16}
    assert all(one["adapter"]["record"] for one in cells)


def test_a_cell_has_every_row_and_reads_test_texts_once_a_row(monkeypatch, tmp_path):
    """All rows but that of a generative base are scored; alike tasks share a draw of A, others do not."""
    tiny_encoder.install(monkeypatch)
    trunk = {name: p.detach() for name, p in encoder.load().named_parameters() if not name.startswith(encoder.HEAD)}
    monkeypatch.setattr(structure_tasks, "published", lambda work, layers: trunk)
    rows = [("", n % 3) for n in range(40)]
    monkeypatch.setattr(texts, "parts", lambda *_: texts.Parts(["a", "b", "c"], rows, rows[:8], rows[:12]))
    scored = []

    def accuracy(model, rows, length, classes):
        scored.append(len(rows))
        return 100.0 * len(scored) / 1000

    monkeypatch.setattr(encoder, "accuracy", accuracy)
    result = lora_merging.cell(SETTINGS, tmp_path)
    assert set(result["test"]) == set(lora_report.ROWS) - {structure_language.BEFORE}
    assert set(result["chosen"]) == {"task_arithmetic", "ties", "dare_ties", "lifted-options"}
    assert set(result[TIMINGS]["merge"]) == set(result["test"]) - {"single"}
    assert scored.count(12) == 2 * len(result["test"])
    first, second = (load_file(file) for file in sorted(tmp_path.glob("models/*/adapter/adapter_model.safetensors")))
    drawn = [name for name in first if "lora_A" in name]
    assert all(torch.allclose(first[name], second[name], atol=0.1) for name in drawn)


def _report(seeds=2, planned=20):
    """Return cells of all groups; row n has 50 + n, the lifted F and the control are 10 above and 5 below linear."""
    cells = []
    for one in lora_merging.EXPERIMENT.full:
        if one["seed"] < lora_merging.SEEDS[0] + seeds:
            shift = one["seed"] - lora_merging.SEEDS[0]
            test = {
                row: {"bbc": 50.0 + shift, "spam": 60.0 + shift}
                for row in lora_report.ROWS
                if row != structure_language.BEFORE
            }
            test["lifted"] = {"bbc": 60.0 + shift, "spam": 70.0 + 2 * shift}
            test["control"] = {"bbc": 45.0 + shift, "spam": 55.0 + shift}
            chosen = {"ties": {"density": 0.1, "lambda": 1.0}}
            cells.append({"settings": one, "result": {"test": test, "chosen": chosen}, "timings": {"training": 8.0}})
    return {"cells": cells, "planned": planned}


def test_the_tables_have_a_column_for_each_rank_and_start():
    """Means, differences to the average and to lifted F, and worst tasks, computed by hand."""
    means, average, lifted, worst = lora_merging.tables(_report())
    assert list(means.columns) == ["r = 8, apart", "r = 8, alike", "r = 32, apart", "r = 32, alike"]
    assert dict(means.rows)["plain average (`linear`)"] == ["55.5 ± 0.7"] * 4
    assert dict(average.rows)["`squisher`, lifted F"] == ["+10.2 ± 3.2"] * 4
    assert "plain average (`linear`)" not in dict(average.rows)
    assert dict(lifted.rows)["plain average (`linear`)"] == ["-10.2 ± 3.2"] * 4
    assert dict(worst.rows)["`squisher`, lifted F"] == ["60.5 ± 0.7"] * 4
    assert "80 held-out texts a task" in means.title
    assert "lifted F less the plain average +10.2 ± 3.2 (above 0 in 8 of 8 cells)" in means.notes[0]
    assert means.notes[1] == (
        "The merge by lifted F is above the plain average on 2 of 2 seeds; the control, with the F of another model, "
        "is below it on 2 of 2."
    )
    assert worst.notes[-1] == (
        "Unfinished: 12 cells are missing, which `python -m scripts.experiments.lora_merging --full` runs."
    )
    assert worst.notes[0].startswith("r = 8, apart. Chosen on the validation texts, seed by seed: `ties` density 0.1")


def test_a_group_without_cells_has_no_column():
    """A report of the first cell has one column, without intervals."""
    report = _report()
    (means, *_) = lora_merging.tables({**report, "cells": report["cells"][:1]})
    assert list(means.columns) == ["r = 8, apart"]
    assert dict(means.rows)["plain average (`linear`)"] == ["55.0"]


def test_the_picture_is_a_small_png():
    """The picture has a panel for each group and stays small."""
    pytest.importorskip("matplotlib")
    ((name, data),) = lora_merging.pictures(_report()).items()
    assert name == "lora_merging.png"
    assert data.startswith(b"\x89PNG")
    assert len(data) < 120_000
