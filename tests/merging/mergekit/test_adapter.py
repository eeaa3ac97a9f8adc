"""Adapter: each model's weights and Fisher, found with mergekit's own names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.merging.models import entry, models_with_fishers, nets
from tests.merging.reference import (
    assert_squisher,
    assert_within,
    give_fisher,
    largest,
    llama,
    merge_raw,
    merged,
    squisher_reference,
    store_fisher,
)


@pytest.mark.parametrize("listed", [False, True])
def test_squisher_base_model_enters_only_if_listed(tmp_path: Path, listed: bool) -> None:
    """`base_model:` of squisher gives the config. It is summed, and needs a Fisher, only if it is listed as well."""
    weights, fishers = models_with_fishers(tmp_path, 3)
    if not listed:
        for file in (tmp_path / "m0").glob("fisher*"):
            file.unlink()
    models = range(0 if listed else 1, 3)
    config = {
        "merge_method": "squisher",
        "base_model": str(tmp_path / "m0"),
        "models": [entry(tmp_path, i) for i in models],
    }
    result = merged(config, tmp_path / "out")
    assert_squisher(result, [weights[i] for i in models], [fishers[i] for i in models], (1.0, 1.0, 1.0))


def test_slices_use_each_models_own_layer(tmp_path: Path) -> None:
    """Offset slices use the Fisher of the *input's* layer, also for a layer that is used twice."""
    weights, fishers = models_with_fishers(tmp_path, 2)

    def source(model: int, start: int, stop: int) -> dict[str, Any]:
        return {"model": str(tmp_path / f"m{model}"), "layer_range": [start, stop]}

    config = {
        "merge_method": "squisher",
        "slices": [{"sources": [source(0, 0, 2), source(1, 1, 3)]}, {"sources": [source(0, 1, 3), source(1, 0, 2)]}],
    }
    result = merged(config, tmp_path / "out")
    offsets = {0: (0, 1), 1: (1, 2), 2: (1, 0), 3: (2, 1)}
    seen = set()
    for name, tensor in result.items():
        parts = name.split(".")
        names = [name, name]
        if parts[1] == "layers":
            seen.add(int(parts[2]))
            names = [".".join([*parts[:2], str(layer), *parts[3:]]) for layer in offsets[int(parts[2])]]
        thetas = [weights[i][names[i]] for i in range(2)]
        reference = squisher_reference(thetas, [fishers[i][names[i]] for i in range(2)], (1.0, 1.0))
        assert_within(tensor, reference, largest(thetas))
    assert seen == {0, 1, 2, 3}


def test_tied_and_untied_inputs(tmp_path: Path) -> None:
    """The embedding of a tied model replaces its missing head, with its Fisher. Two tied models have no head."""
    tied = llama(tmp_path / "m0", 0, tie_word_embeddings=True)
    untied = llama(tmp_path / "m1", 1)
    fishers = [give_fisher(tmp_path / "m0", tied, 0), give_fisher(tmp_path / "m1", untied, 1)]
    assert "lm_head.weight" not in tied
    config = {
        "merge_method": "squisher",
        "base_model": str(tmp_path / "m1"),
        "models": [entry(tmp_path, 0), entry(tmp_path, 1)],
    }
    result = merged(config, tmp_path / "out")
    embedding = "model.embed_tokens.weight"
    thetas = [tied[embedding], untied["lm_head.weight"]]
    head = squisher_reference(thetas, [fishers[0][embedding], fishers[1]["lm_head.weight"]], (1.0, 1.0))
    assert_within(result["lm_head.weight"], head, largest(thetas))
    llama(tmp_path / "m2", 2, tie_word_embeddings=True)
    give_fisher(tmp_path / "m2", load_file(tmp_path / "m2" / "model.safetensors"), 2)
    both = {"merge_method": "squisher", "models": [entry(tmp_path, 0), entry(tmp_path, 2)]}
    assert "lm_head.weight" not in merged(both, tmp_path / "out2")


def test_an_untied_head_never_borrows_the_embeddings_fisher(tmp_path: Path) -> None:
    """A missing Fisher for an untied head is reported. The Fisher of the embedding does not replace it."""
    weights, fishers = models_with_fishers(tmp_path, 2)
    del fishers[0]["lm_head.weight"]
    store_fisher(tmp_path / "partial", fishers[0])
    config = {
        "merge_method": "squisher",
        "models": [entry(tmp_path, 0, fisher=str(tmp_path / "partial")), entry(tmp_path, 1)],
        "parameters": {"missing": "average"},
    }
    result = merged(config, tmp_path / "out")
    mean = (weights[0]["lm_head.weight"].double() + weights[1]["lm_head.weight"].double()) / 2
    assert_within(result["lm_head.weight"], mean, mean.abs())
    del result["lm_head.weight"], weights[0]["lm_head.weight"]
    assert_squisher(result, weights, fishers, (1.0, 1.0))


def test_filters_and_gradients(tmp_path: Path) -> None:
    """Filters and gradients of weights and filters of Fishers reach the tensors that they name."""
    weights, fishers = models_with_fishers(tmp_path, 2)
    other = give_fisher(tmp_path / "m0", weights[0], seed=55, out=tmp_path / "other")
    by_filter = [{"filter": "mlp", "value": str(tmp_path / "other")}, {"value": "auto"}]
    config = {
        "merge_method": "squisher",
        "models": [
            entry(tmp_path, 0, weight=[1.0, 0.5, 0.0], fisher=by_filter),
            entry(tmp_path, 1, weight=[{"filter": "self_attn", "value": 3.0}, {"value": 1.0}]),
        ],
    }
    result = merged(config, tmp_path / "out")
    for name, tensor in result.items():
        parts = name.split(".")
        # mergekit's gradient runs over the layers; other tensors have its first value.
        first = {0: 1.0, 1: 0.5, 2: 0.0}[int(parts[2])] if parts[1] == "layers" else 1.0
        second = 3.0 if "self_attn" in name else 1.0
        thetas = [model[name] for model in weights]
        chosen = [other[name] if "mlp" in name else fishers[0][name], fishers[1][name]]
        assert_within(tensor, squisher_reference(thetas, chosen, (first, second)), largest(thetas))


def test_mergekit_pytorch(tmp_path: Path) -> None:
    """`mergekit-pytorch` merges single files by the Fishers in their folders, and copies integer buffers."""
    weights, fishers = nets(tmp_path, 3)
    entries = [{"model": str(tmp_path / f"n{i}" / "net.safetensors")} for i in range(3)]
    config = {"merge_method": "squisher", "models": entries[1:], "base_model": entries[0]["model"]}
    result = merge_raw(tmp_path, config)
    assert result.exit_code == 0, result.output + repr(result.exception)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert int(found["steps"]) == 7
    for name in fishers[0]:
        thetas = [model[name] for model in weights[1:]]
        reference = squisher_reference(thetas, [f[name] for f in fishers[1:]], [1.0, 1.0])
        assert_within(found[name], reference, largest(thetas))


def test_mergekit_pytorch_averages_the_statistics_of_a_batch_norm(tmp_path: Path) -> None:
    """Running means and variances of plain torch have no Fisher: the weighted mean, without ``missing: average``."""
    _, fishers = nets(tmp_path, 2)
    statistics = [torch.randn(2, 7, generator=torch.Generator().manual_seed(i)).abs() for i in range(2)]
    for i, (mean, variance) in enumerate(statistics):
        file = tmp_path / f"n{i}" / "net.safetensors"
        save_file(load_file(file) | {"norm.running_mean": mean, "norm.running_var": variance}, file)
    models = [
        {"model": str(tmp_path / f"n{i}" / "net.safetensors"), "parameters": {"weight": i + 1.0}} for i in range(2)
    ]
    result = merge_raw(tmp_path, {"merge_method": "squisher", "models": models})
    assert result.exit_code == 0, result.output + repr(result.exception)
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = (statistics[0] + 2 * statistics[1]) / 3
    for name, reference in zip(("norm.running_mean", "norm.running_var"), wanted, strict=True):
        assert torch.allclose(found[name], reference, rtol=0, atol=1e-6)
    assert set(fishers[0]) | {"steps", "norm.running_mean", "norm.running_var"} == set(found)


def test_each_tensor_is_planned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning and the graph share one plan per tensor, so nothing is looked up on disk twice."""
    from squisher_mergekit.merging import tensor_plan

    for i in range(2):
        give_fisher(tmp_path / f"m{i}", llama(tmp_path / f"m{i}", i), i)
    planned = []
    stock = tensor_plan.plan_tensor

    def counted(method: str, name: str, *rest: Any, **options: Any) -> Any:
        planned.append(name)
        return stock(method, name, *rest, **options)

    monkeypatch.setattr(tensor_plan, "plan_tensor", counted)
    result = merged(
        {"merge_method": "squisher", "models": [{"model": str(tmp_path / f"m{i}")} for i in range(2)]}, tmp_path / "out"
    )
    assert sorted(planned) == sorted(result)
