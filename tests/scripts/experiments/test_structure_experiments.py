"""Cells of the experiments on structures: their models, controls and tables."""

import json

import pytest
import torch

from scripts.experiments import (
    encoder,
    lora_language,
    lora_merging,
    merge_methods,
    merge_methods_counts,
    merge_methods_language,
    merging,
    structure,
    structure_adapters,
    structure_controls,
    structure_counts,
    structure_domains,
    structure_language,
    structure_merges,
    structure_optimizers,
    structure_report,
    structure_tasks,
)
from squisher_mergekit import Fisher
from squisher_mergekit.fisher.config import FactorsInfo, FisherConfig
from squisher_mergekit.fisher.factors.mapping import factors_in_memory
from tests.scripts.experiments.structure_models import few_models

FIRST = (structure_controls, structure_counts, structure_domains)
EXPERIMENTS = (structure, *FIRST)
LORA = (lora_language, lora_merging, structure_adapters)
METHODS = (merge_methods, merge_methods_counts, merge_methods_language)
KEPT = (*EXPERIMENTS, *LORA, *METHODS, structure_language, structure_optimizers)


@pytest.mark.parametrize(("module", "seeds"), [(structure, 5), *((module, 3) for module in FIRST)])
def test_the_seeds_are_new(module, seeds):
    """Every full cell has a seed above 40, each seed the same cells, and no seed is missing."""
    cells = module.EXPERIMENT.full
    counts = {seed: sum(one["seed"] == seed for one in cells) for seed in structure_tasks.SEEDS[:seeds]}
    assert list(counts) == [41, 42, 43, 44, 45][:seeds]
    assert set(counts.values()) == {len(cells) // seeds}


@pytest.mark.parametrize("module", KEPT)
def test_a_kept_report_has_planned_cells(module):
    """The cells of a kept report are planned ones of the current revision, in their order, and say how many are."""
    report = structure_report.results(module.EXPERIMENT.name)
    if report is None:
        pytest.skip("has not been run")
    planned = [json.loads(json.dumps(one)) for one in module.EXPERIMENT.full]
    found = [one["settings"] for one in report["cells"]]
    assert found == [one for one in planned if one in found]
    assert (report["planned"], report["revision"]) == (len(planned), module.EXPERIMENT.revision)


def test_experiments_share_the_trained_models():
    """Counts and controls fine-tune by the recipes of the six tasks."""

    def recipes(settings):
        return {merging.task_recipe(settings, number, task).key for number, task in enumerate(settings["tasks"])}

    for one, other in zip(structure.EXPERIMENT.full[:6], structure_controls.EXPERIMENT.full, strict=True):
        assert recipes(one) == recipes(other)
    six = set().union(*(recipes(one) for one in structure.EXPERIMENT.full))
    counts = [recipes(one) for one in structure_counts.EXPERIMENT.full]
    assert set().union(*counts) <= six
    assert {len(keys) for keys in counts} == {2, 3, 4}


def test_the_control_has_the_next_models_second_moments():
    """Each model has its own weights and the second moments of the next one; the last has those of the first."""
    models = few_models(3)
    found = structure_controls.another(models)
    assert found.weights is models.weights
    assert [found.fishers[name] is models.fishers[other] for name, other in ("ab", "bc", "ca")] == [True] * 3


def test_every_control_is_merged(monkeypatch):
    """The rows of the controls are those of the table, and no two merges are alike."""
    models = few_models(3, out=128, width=128)
    moments = {
        name: {"x.encoder.a": tuple(torch.cov(torch.randn(128, 300)) for _ in range(2))} for name in models.weights
    }
    monkeypatch.setattr(structure_controls, "from_data", lambda tasks, given: moments)
    shapes = {"x.encoder.a": (128, 128)}
    recorded = {}
    for name, squares in models.fishers.items():
        drawn = {side: {"x.encoder.a": torch.cov(torch.randn(128, 300))[None]} for side in ("rows", "columns")}
        factors = factors_in_memory(drawn, FactorsInfo(source="recorded", statistic="ema", decay=0.9, every=4), shapes)
        recorded[name] = Fisher(dict(squares), FisherConfig(estimator="squisher", statistic="mean"), factors=factors)
    merges = structure_controls._merges(None, models, recorded, 3)
    assert set(merges) == set(structure_controls.ROWS)
    found = [make()["x.encoder.a"] for make in merges.values()]
    assert all(not torch.equal(one, other) for n, one in enumerate(found) for other in found[:n])


def test_domains_are_scored_with_the_merged_head(tmp_path, monkeypatch):
    """The whole model is merged, head included; single models have their own, and the base is not scored."""
    from safetensors.torch import save_file

    folders = {name: tmp_path / name for name in ("base", "products", "yelp")}
    net = torch.nn.Linear(2, 2)
    for number, folder in enumerate(folders.values()):
        (folder / "final").mkdir(parents=True)
        (folder / "log.json").write_text('{"cpu_seconds": 2.5}')
        save_file(
            {"weight": torch.full((2, 2), float(number)), "bias": torch.zeros(2)},
            folder / "final" / "model.safetensors",
        )
    monkeypatch.setattr(encoder, "fine_tune", lambda recipe, work: folders.get(recipe.data, folders["base"]))
    monkeypatch.setattr(encoder, "load", lambda folder: net)
    monkeypatch.setattr(structure_domains, "load_fisher", lambda folder: folder.parent.name)
    monkeypatch.setattr(encoder.Recipe, "parts", lambda recipe: merging.Parts([], [], [(recipe.data, 1)], []))
    monkeypatch.setattr(encoder, "accuracy", lambda model, rows, length: (rows, model.weight.mean().item()))
    models, seconds = structure_domains.trained({"seed": 0, **structure_domains.QUICK}, tmp_path)
    assert (seconds, models.fishers) == (7.5, {"products": "products", "yelp": "yelp"})
    assert float(models.base["weight"].mean()) == 0
    assert models.score(None, "validation") == {"products": ([("products", 1)], 1.0), "yelp": ([("yelp", 1)], 2.0)}
    assert models.score({"weight": torch.full((2, 2), 9.0)}, "validation")["yelp"][1] == 9.0


MAIN = {"single": 90, "linear": 60, "ties": 70, "diagonal": 69, "rows": 71, "columns": 80, "kron": 82}
CONTROLS = dict.fromkeys(structure_controls.ROWS, 65)


def _cell(seed, heads, tasks, rows=MAIN, shift=0.0):
    test = {row: dict.fromkeys(tasks, value + shift + seed) for row, value in rows.items()}
    settings = {"seed": seed, "heads": heads, "tasks": list(tasks)}
    return {"settings": settings, "result": {"test": test}, "timings": {"merge": {}}}


def test_controls_stand_next_to_the_same_cells(monkeypatch):
    """A control is compared with the row of ``structure`` for the same seed; a seed without one is left out."""
    main = {"cells": [_cell(seed, "apart", "ab", shift=10.0) for seed in (1, 2)]}
    monkeypatch.setattr(structure_report, "results", lambda name: main)
    (table,) = structure_controls.tables(
        {"cells": [_cell(seed, "apart", "ab", CONTROLS) for seed in (2, 3)], "planned": 4}
    )
    rows = dict(table.rows)
    assert "over 1 seed of 2 planned" in table.title
    assert rows["`structure: kron`, from d alone"] == ["67.0", "-27.0", "-5.0"]
    assert rows["RegMean, from data"] == ["67.0", "", "-5.0"]
    assert "`kron`: do the controls lose? yes, on every seed; v adds +27.0" in table.notes[0]


def test_six_models_come_from_the_main_experiment(monkeypatch):
    """The table has a column for each count, with its number of seeds; six are the first seeds of ``structure``."""
    monkeypatch.setattr(
        structure_report,
        "results",
        lambda name: {"cells": [_cell(seed, "equal", "abcdef", shift=-39.0) for seed in (41, 45)]},
    )
    report = {"cells": [_cell(seed, "equal", tasks, shift=-40.0) for tasks in ("ab", "abc") for seed in (41, 42)]}
    (table,) = structure_counts.tables(report)
    assert list(table.columns) == ["2 models, 2 seeds", "3 models, 2 seeds", "6 models, 1 seed"]
    assert dict(table.rows)[structure_merges.ROWS["kron"]] == ["83.5 ± 0.7", "83.5 ± 0.7", "84.0"]
    assert table.notes[0].startswith("2 models: `rows` with its defaults is so far above tuned `ties`")


def test_pictures_are_small_pngs(monkeypatch):
    """Pictures of counts and domains are small PNGs, also while some cells are missing."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(structure_report, "results", lambda name: None)
    (data,) = structure_counts.pictures({"cells": [_cell(41, "equal", "ab", shift=-40.0)]}).values()
    assert data.startswith(b"\x89PNG")
    assert len(data) < 120_000
