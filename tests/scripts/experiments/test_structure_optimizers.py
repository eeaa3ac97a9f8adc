"""Merges of models trained by SOAP: their files, their rows and their tables, on tiny models."""

import json
from types import SimpleNamespace

import pytest
import torch

from scripts.experiments import encoder, structure_merges, structure_optimizers, structure_tasks
from scripts.experiments.merging import HEADS
from squisher_mergekit import Fisher, load_fisher
from squisher_mergekit.fisher.config import FactorsInfo, FisherConfig
from squisher_mergekit.fisher.factors.mapping import factors_in_memory
from tests.scripts.experiments import tiny_encoder
from tests.scripts.experiments.structure_models import few_models

RECIPE = encoder.Recipe("x", 3, steps=4, batch=4, frozen_words=True)


def test_the_cells_take_the_tasks_of_the_structures():
    """SOAP has the tasks, texts and steps of ``structure`` on its first seeds."""
    cells = structure_optimizers.EXPERIMENT.full
    shared = {name: value for name, value in structure_tasks.FULL.items() if name != "factors_every"}
    assert all(one.items() >= shared.items() for one in cells)
    assert [one["seed"] for one in cells] == [41, 42, 43]
    assert {one["optimizer"] for one in cells} == {"SOAP"}
    assert {one["heads"] for one in cells} <= set(HEADS)


def test_without_the_library_its_cells_name_the_package(tmp_path, monkeypatch):
    """Without pytorch_optimizer, a cell fails before any training with the package to install."""
    monkeypatch.setattr(structure_optimizers, "LIBRARY", "no_such_library")
    for settings in structure_optimizers.EXPERIMENT.quick:
        with pytest.raises(RuntimeError, match="pip install no_such_library"):
            structure_optimizers.cell(settings, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_fine_tuning_extracts_the_state_of_its_optimizer(tmp_path, monkeypatch):
    """The folder has the Fisher of all trained tensors from the saved state, no state, and no frozen words."""
    tiny_encoder.install(monkeypatch)
    given = []

    def adam(parameters, **options):
        given.append(options)
        return torch.optim.Adam(parameters, **options)

    monkeypatch.setattr(structure_optimizers, "library", lambda: SimpleNamespace(SOAP=adam))
    folder = structure_optimizers.fine_tune(RECIPE, "SOAP", {"lr": 1e-3}, tmp_path)
    assert given == [{"lr": 1e-3}]
    fisher = load_fisher(folder / "final")
    names = {name for name, _ in encoder.load().named_parameters()}
    assert names - set(fisher) == {"bert.embeddings.word_embeddings.weight"}
    assert fisher.config.steps == 4
    assert not list(folder.rglob("optimizer.pt"))
    assert len(json.loads((folder / encoder.LOG).read_text())["losses"]) == 4
    assert structure_optimizers.fine_tune(RECIPE, "SOAP", {"lr": 1e-3}, tmp_path) == folder
    assert len(given) == 1


@pytest.mark.parametrize("optimizer", ["SOAP", "Shampoo"])
def test_the_real_optimizers_leave_their_factors(tmp_path, monkeypatch, optimizer):
    """The Fisher of a fine-tuning by the real optimizer has a factor for both sides of each linear layer."""
    pytest.importorskip("pytorch_optimizer", reason="trains with the package, which no reader of its states needs")
    tiny_encoder.install(monkeypatch)
    options = {"lr": 1e-3} | ({"preconditioning_compute_steps": 2} if optimizer == "Shampoo" else {})
    fisher = load_fisher(structure_optimizers.fine_tune(RECIPE, optimizer, options, tmp_path) / "final")
    layers = {name for name in fisher if ".encoder." in name and len(fisher.info(name).shape) == 2}
    assert len(layers) == 6
    for side in ("rows", "columns"):
        assert layers <= set(fisher.factors.side(side))


def _with_factors(models):
    """Return the models with Fishers that have drawn factors over both sides of their matrix."""
    shapes = {name: tuple(tensor.shape) for name, tensor in models.base.items()}
    (name,) = shapes
    fishers = {}
    for number, (model, squares) in enumerate(models.fishers.items()):
        generator = torch.Generator().manual_seed(number)
        drawn = {
            side: {name: torch.cov(torch.randn(128, 300, generator=generator))[None]} for side in ("rows", "columns")
        }
        factors = factors_in_memory(drawn, FactorsInfo(source="optimizer", statistic="sum"), shapes)
        fishers[model] = Fisher(dict(squares), FisherConfig(estimator="squisher", statistic="mean"), factors=factors)
    return structure_merges.Models(models.base, models.weights, fishers, models.score)


def test_rows_are_with_and_without_the_optimizers_factors():
    """A free structure is the one of the same v without factors; with the factors it is another merge."""
    plain = few_models(3, out=128, width=128, vectors=False)
    models = _with_factors(plain)
    made = structure_optimizers.rows(3)
    assert {"single", *made} == set(structure_optimizers.ROWS)
    for kind in structure_merges.STRUCTURES:
        free = made[kind].make(models)["x.encoder.a"]
        assert torch.equal(free, structure_merges.structured(plain, kind)["x.encoder.a"])
        assert not torch.allclose(free, made[f"{kind}-optimizer"].make(models)["x.encoder.a"])


def _report(seeds):
    """Return cells whose rows are 50, 51, ... plus the seed."""
    cells = []
    for seed in range(seeds):
        test = {row: {"bbc": 50.0 + n + seed} for n, row in enumerate(structure_optimizers.ROWS)}
        result = {"test": test, "chosen": {"ties": {"density": 0.1, "lambda": 1.0}}, "searched": {}}
        settings = {"optimizer": "SOAP", "seed": seed, "heads": "equal", "test": 160}
        cells.append({"settings": settings, "result": result, "timings": {"merge": {}, "training": 7.0}})
    return {"cells": cells, "planned": 3}


def test_the_table_says_how_many_seeds_it_has():
    """The table has all rows, the points of free factors above the optimizer's, and the number of missing cells."""
    (soap,) = structure_optimizers.tables(_report(2))
    assert soap.title.startswith("**Six tasks trained by SOAP, all classifiers start alike.**")
    assert "over 2 seeds of 3 planned, 160 held-out texts" in soap.title
    assert [label for label, _ in soap.rows] == list(structure_optimizers.ROWS.values())
    assert "`rows` -3.0 ± 0.0, `columns` -3.0 ± 0.0, `kron` -3.0 ± 0.0." in soap.notes[-2]
    assert "1 cell is missing" in soap.notes[-1]


def test_the_picture_is_a_small_png():
    """The picture is a PNG and stays small."""
    pytest.importorskip("matplotlib")
    (data,) = structure_optimizers.pictures(_report(2)).values()
    assert data.startswith(b"\x89PNG")
    assert len(data) < 120_000
