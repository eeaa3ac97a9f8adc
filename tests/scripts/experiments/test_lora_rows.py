"""Merges of LoRA adapters: their equations in float64, and the files of adapters, on tiny models."""

import pytest
import torch
from safetensors.torch import load_file

from scripts.experiments import encoder, lora_rows, structure_adapters, structure_merges
from squisher_mergekit import load_fisher
from tests.scripts.experiments import tiny_encoder
from tests.scripts.experiments.structure_models import few_models

ADAPTER = {"r": 2, "lora_alpha": 6, "lr": 1e-2, "head_lr": 1e-3}
NAMES = ("x.encoder.a", "x.norm")


def test_one_number_is_the_mean_over_all_entries():
    """Each model has the mean of its Fisher over all tensors as its weight."""
    models = few_models(3, out=7, width=5)
    scales = {task: sum(f[name].double().sum() for name in NAMES) for task, f in models.fishers.items()}
    found = lora_rows.by_one_number(models)
    for name in NAMES:
        wanted = sum(scales[task] * models.weights[task][name].double() for task in scales) / sum(scales.values())
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-7)


def test_the_control_has_the_fisher_of_the_next_model():
    """Weights stay, Fishers move by one model."""
    models = few_models(3)
    moved = lora_rows.with_another(models)
    assert moved.weights is models.weights
    for task, other in {"a": "b", "b": "c", "c": "a"}.items():
        assert moved.fishers[task] is models.fishers[other]


@pytest.mark.parametrize("rank", [1, 3])
def test_an_adapter_of_a_rank_is_the_nearest_one(rank):
    """The change from the base is that of the singular value decomposition in float64, cut at the rank."""
    models = few_models(3, out=7, width=5, vectors=False)
    weights = structure_merges.diagonal(models)
    change = weights["x.encoder.a"].double() - models.base["x.encoder.a"].double()
    left, sizes, right = torch.linalg.svd(change, full_matrices=False)
    wanted = models.base["x.encoder.a"] + left[:, :rank] * sizes[:rank] @ right[:rank]
    found = lora_rows.of_rank(models, weights, rank)["x.encoder.a"]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_rank_above_the_shorter_side_keeps_the_merge():
    """The rank is at most the shorter side, where nothing is lost."""
    models = few_models(3, out=7, width=5, vectors=False)
    weights = structure_merges.diagonal(models)
    torch.testing.assert_close(lora_rows.of_rank(models, weights, 99)["x.encoder.a"], weights["x.encoder.a"])


def test_options_of_the_merge():
    """``all`` is Eq. 13, ``change`` the masked merge of the same share; the sign election is another merge."""
    models = few_models(4, out=16, width=12)
    plain = structure_merges.diagonal(models)
    for name in NAMES:
        torch.testing.assert_close(lora_rows.with_votes(models, "all")[name], plain[name])
    for share in (0.05, 0.1, 0.2):
        wanted = structure_merges.masked(models, share, 1.0)
        found = lora_rows.with_votes(models, f"change {share}")
        for name in NAMES:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(lora_rows.with_votes(models, "sign")["x.encoder.a"], plain["x.encoder.a"])


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders of two adapters, the second of which has recorded the Fisher of W."""
    tiny_encoder.install(monkeypatch)
    recipe = encoder.Recipe("x", 3, steps=3, batch=4)
    return {
        "a": structure_adapters.fine_tune(recipe, ADAPTER, 0, tmp_path),
        "b": structure_adapters.fine_tune(recipe, {**ADAPTER, "record": True}, 1, tmp_path),
    }


def _squares(folder):
    """Return the debiased second moments of A and B by the names of the adapter, read from the optimizer's file."""
    state = torch.load(folder / "adapter" / "optimizer.pt", weights_only=True)
    pairs = load_file(folder / "adapter" / "adapter_model.safetensors")
    names = [name for name in pairs if ".lora_" in name]
    found = [
        state["state"][place]["exp_avg_sq"].double() / (1 - 0.999**3) for place in state["param_groups"][0]["params"]
    ]
    # The optimizer has the order of the modules: A, then B, of each.
    ordered = sorted(names, key=lambda name: (_order(name.split(".lora_")[0]), name))
    assert [tuple(pairs[name].shape) for name in ordered] == [tuple(one.shape) for one in found]
    return dict(zip(ordered, found, strict=True))


def _order(module):
    kinds = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    return next(place for place, kind in enumerate(kinds) if module.endswith(kind))


@pytest.mark.parametrize("by_fisher", [False, True])
def test_factors_are_merged_apart(folders, by_fisher):
    """A and B are averaged entry by entry, plainly or by their second moments, and then multiplied by s."""
    pairs = {task: load_file(folder / "adapter" / "adapter_model.safetensors") for task, folder in folders.items()}
    shares = {task: _squares(folder) for task, folder in folders.items()}

    def merged(name):
        votes = [shares[task][name] if by_fisher else torch.ones((), dtype=torch.float64) for task in folders]
        values = [pairs[task][name].double() for task in folders]
        return sum(vote * value for vote, value in zip(votes, values, strict=True)) / sum(votes)

    trunk = load_file(folders["a"] / "final" / "model.safetensors")
    fisher = load_fisher(folders["a"] / "final")
    base = {name: torch.randn_like(trunk[name]) for name in fisher if not name.startswith(encoder.HEAD)}
    models = structure_merges.Models(base, {}, {}, lambda weights, part: {})
    factors = lora_rows.Factors({task: folder / "adapter" for task, folder in folders.items()}, folders["a"] / "final")
    found = factors.merged(models, by_fisher=by_fisher)
    assert set(found) == set(base)
    for name, origin in base.items():
        a, b = (merged(f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight") for part in "AB")
        torch.testing.assert_close(found[name].double(), origin.double() + 3 * b @ a, rtol=1e-5, atol=1e-6)


def test_a_recorder_changes_no_training(folders, tmp_path):
    """A run that records ends with the adapter of one that does not, and with another Fisher than the lifted one."""
    plain = structure_adapters.fine_tune(encoder.Recipe("x", 3, steps=3, batch=4), ADAPTER, 1, tmp_path)
    one, other = (load_fisher(folders["b"] / "final" / part) for part in ("", encoder.RECORDED))
    assert {name for name in one if not name.startswith(encoder.HEAD)} <= set(other)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.allclose(one[name], other[name], rtol=0.1, atol=0)
    files = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (plain, folders["b"])]
    assert files[0].keys() == files[1].keys()
    drawn = [name for name in files[0] if "lora_A" in name]
    assert drawn
    assert all(torch.allclose(files[0][name], files[1][name], atol=0.05) for name in drawn)
