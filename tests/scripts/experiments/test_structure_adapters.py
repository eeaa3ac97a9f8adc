"""Merges of LoRA adapters with a structure: their files, their rows and their tables, on tiny models."""

import json

import pytest
import torch
from safetensors.torch import load_file

from scripts.experiments import encoder, structure_adapters, structure_merges, structure_tasks
from squisher_mergekit import load_fisher
from tests.scripts.experiments import tiny_encoder
from tests.scripts.experiments.structure_models import few_models

RECIPE = encoder.Recipe("x", 3, steps=3, batch=4)
ADAPTER = {"r": 2, "lora_alpha": 6, "lr": 1e-2, "head_lr": 1e-3}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Folder of a fine-tuned adapter."""
    tiny_encoder.install(monkeypatch)
    return structure_adapters.fine_tune(RECIPE, ADAPTER, 0, tmp_path)


def test_the_cells_take_the_tasks_of_the_structures():
    """Each cell has the tasks, texts and steps of ``structure``, for three seeds and both starts of the heads."""
    cells = structure_adapters.EXPERIMENT.full
    shared = {name: value for name, value in structure_tasks.FULL.items() if name != "factors_every"}
    assert all(one.items() >= shared.items() for one in cells)
    assert [(one["seed"], one["heads"]) for one in cells] == [
        (seed, heads) for seed in (41, 42, 43) for heads in ("apart", "equal")
    ]


def test_the_merged_weights_are_those_of_the_adapter(folder):
    """Each linear layer of the encoder is ``W0 + s B A``; the rest of the trunk is the base's."""
    encoder.start(RECIPE, folder)
    torch.manual_seed(RECIPE.seed)
    base = dict(encoder.load().named_parameters())
    merged, pairs = (
        load_file(folder / "final" / "model.safetensors"),
        load_file(folder / "adapter" / "adapter_model.safetensors"),
    )
    names = {name.split("base_model.model.")[1].split(".lora_")[0] for name in pairs if ".lora_" in name}
    assert len(names) == 6
    for name in names:
        a, b = (pairs[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 3 * b @ a)
        assert not torch.equal(merged[f"{name}.weight"], base[f"{name}.weight"])
    others = [n for n in merged if n.removesuffix(".weight") not in names and not n.startswith(encoder.HEAD)]
    assert others
    assert all(torch.equal(merged[name], base[name]) for name in others)


def test_the_fisher_is_lifted_to_the_merged_weights(folder):
    """The Fisher has the adapted weights under the names of the base, as row means times column means."""
    fisher = load_fisher(folder / "final")
    trunk = [name for name in fisher if not name.startswith(encoder.HEAD)]
    assert len(trunk) == 6
    for name in trunk:
        found = fisher[name].double()
        assert found.mean() > 0
        torch.testing.assert_close(found, torch.outer(found.mean(1), found.mean(0)) / found.mean(), rtol=1e-4, atol=0)
    assert len(json.loads((folder / encoder.LOG).read_text())["losses"]) == 3


def test_each_task_draws_matrices_of_its_own(folder, tmp_path):
    """Another number of a task draws another A; the same number finds the kept folder."""
    other = structure_adapters.fine_tune(RECIPE, ADAPTER, 1, tmp_path)
    assert structure_adapters.fine_tune(RECIPE, ADAPTER, 0, tmp_path) == folder
    one, two = (load_file(place / "adapter" / "adapter_model.safetensors") for place in (folder, other))
    drawn = [name for name in one if "lora_A" in name]
    assert drawn
    assert not any(torch.allclose(one[name], two[name], atol=0.1) for name in drawn)


def test_only_the_adapted_weights_are_merged(folder, tmp_path, monkeypatch):
    """The tensors of the merge are those of the trunk with a Fisher; the others are equal in all models."""
    trunk = {name: p.detach() for name, p in encoder.load().named_parameters() if not name.startswith(encoder.HEAD)}
    monkeypatch.setattr(structure_tasks, "published", lambda work, layers: trunk)
    _, models, seconds = structure_tasks.opened({"x": folder}, {"x": RECIPE}, tmp_path)
    layers = {name for name in trunk if ".encoder." in name and trunk[name].ndim == 2}
    assert set(models.base) == set(models.weights["x"]) == layers
    assert seconds == json.loads((folder / encoder.LOG).read_text())["cpu_seconds"]


def test_rows_are_with_and_without_the_lifted_fisher():
    """The rows are those of the table, and a structure from d alone is another merge than that with v."""
    models = few_models(3)
    made = structure_adapters.rows(3)
    assert {"single", *made} == set(structure_adapters.ROWS)
    for kind in structure_merges.STRUCTURES:
        with_v = made[kind].make(models)["x.encoder.a"]
        assert not torch.allclose(with_v, made[f"{kind}-d"].make(models)["x.encoder.a"])


def _report(starts, seeds=3):
    """Return cells of some starts of the heads, whose rows are 50, 51, ... plus the seed."""
    cells = []
    for heads in starts:
        for seed in range(seeds):
            test = {row: {"bbc": 50.0 + n + seed} for n, row in enumerate(structure_adapters.ROWS)}
            result = {"test": test, "chosen": {"ota": {"share": 0.1, "lambda": 1.0}}, "searched": {}}
            settings = {"seed": seed, "heads": heads, "test": 160}
            cells.append({"settings": settings, "result": result, "timings": {"merge": {}, "training": 7.0}})
    return {"cells": cells, "planned": 6}


def test_each_start_of_the_heads_has_a_table():
    """A table a start, compared with the best other row, and the points of v; a missing start has no table."""
    (equal,) = structure_adapters.tables(_report(["equal"]))
    assert equal.title.startswith("**Six tasks trained as LoRA adapters, all classifiers start alike.**")
    assert [label for label, _ in equal.rows] == list(structure_adapters.ROWS.values())
    assert "`kron` with its defaults is above the diagonal, the best without a structure" in equal.notes[0]
    assert "`rows` -3.0 ± 0.0, `columns` -3.0 ± 0.0, `kron` -3.0 ± 0.0." in equal.notes[-2]
    assert len(structure_adapters.tables(_report(["apart", "equal"]))) == 2


def test_the_picture_is_a_small_png():
    """The picture has a panel for each start of the heads and stays small."""
    pytest.importorskip("matplotlib")
    (data,) = structure_adapters.pictures(_report(["apart", "equal"])).values()
    assert data.startswith(b"\x89PNG")
    assert len(data) < 120_000
