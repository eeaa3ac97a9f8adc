"""`density_scope: model` through stock `mergekit-yaml` and in memory."""

from pathlib import Path

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts

from squisher_mergekit.merging.votes import threshold
from squisher_mergekit.models.fingerprint import fingerprint
from tests.merging.models import EMBEDDING, base_and_models, density_config, mixtral, packed_experts, word_tokenizer
from tests.merging.reference import (
    Tensors,
    assert_config_refused,
    assert_within,
    largest,
    merged,
    preview_of,
    store_fisher,
    write_checked,
)
from tests.merging.votes.reference import mask_of, score_of, voted_reference


def global_masks(
    by: str, weights: list[Tensors], fishers: list[Tensors], densities: list[float], names: list[str]
) -> list[Tensors]:
    """Return the mask of each model that one sort over all tensors gives."""
    result = []
    for theta, fisher, density in zip(weights[1:], fishers[1:], densities, strict=True):
        scores = {name: score_of(by, theta[name], weights[0][name], fisher[name]).float() for name in names}
        whole = mask_of(torch.cat([each.flatten() for each in scores.values()]), density)
        parts = whole.split([each.numel() for each in scores.values()])
        result.append({n: part.reshape(scores[n].shape) for n, part in zip(names, parts, strict=True)})
    return result


def assert_global(
    result: Tensors, weights: list[Tensors], fishers: list[Tensors], masks: list[Tensors], power: float = 1.0
) -> None:
    """Assert that a model is the merge of models that abstain outside their masks."""
    for name, tensor in result.items():
        thetas, own = [m[name] for m in weights[1:]], [f[name] for f in fishers[1:]]
        kept = [mask[name] for mask in masks]
        reference = voted_reference(thetas, own, [1.0] * len(own), weights[0][name], masks=kept, power=power)
        assert_within(tensor, reference, largest([weights[0][name], *thetas]))


@pytest.mark.parametrize("by", ["fisher", "change", "magnitude"])
@pytest.mark.parametrize("sample", [1 << 20, 500])
def test_a_global_sort(tmp_path: Path, by: str, sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mergekit-yaml` keeps the entries that one sort over the whole model keeps."""
    monkeypatch.setattr(threshold, "SAMPLE", sample)
    weights, fishers = base_and_models(tmp_path, 3)
    settings = {"density_by": by, "density_scope": "model", "trimmed": "abstain", "normalize": "none"}
    result = merged(density_config(tmp_path, [0.2, 0.6], parameters=settings), tmp_path / "out")
    masks = global_masks(by, weights, fishers, [0.2, 0.6], sorted(result))
    assert_global(result, weights, fishers, masks)


def test_the_smallest_scores_of_f_count(tmp_path: Path) -> None:
    """Among Fishers from 1e-38 to 1e+30 an entry far below the norm is kept where the density reaches it."""
    weights, fishers = base_and_models(tmp_path, 3)
    for i in (1, 2):
        for file in ("fisher.safetensors", "fisher_config.json"):
            (tmp_path / f"m{i}" / file).unlink()
        write_checked(tmp_path / f"m{i}", fishers[i], estimator="squisher", statistic="mean")  # with its norm
    settings = {"density_scope": "model", "trimmed": "abstain", "normalize": "none"}
    result = merged(density_config(tmp_path, [0.7, 0.75], parameters=settings), tmp_path / "out")
    assert_global(result, weights, fishers, global_masks("fisher", weights, fishers, [0.7, 0.75], sorted(result)))


def test_in_memory(device: torch.device) -> None:
    """`merge_state_dicts` keeps the entries that one sort over the whole model keeps, with Fishers on the CPU."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"encoder.weight": (17, 13), "encoder.bias": (13,), "head.weight": (5, 13)}
    weights = [{n: torch.randn(*s, generator=generator) for n, s in shapes.items()} for _ in range(4)]
    fishers: list[Tensors] = [{n: torch.rand(*s, generator=generator) for n, s in shapes.items()} for _ in range(4)]
    keys = ["base", "a", "b", "c"]
    parameters = {
        "fisher": {"base": "auto", **dict(zip(keys[1:], fishers[1:], strict=True))},
        "weight": {"base": 0.0, "a": 1.0, "b": 1.0, "c": 1.0},
        "density": 0.3,
        "density_by": "change",
        "density_scope": "model",
        "trimmed": "abstain",
        "power": 0.5,
    }
    placed = {key: {n: t.to(device) for n, t in model.items()} for key, model in zip(keys, weights, strict=True)}
    found = merge_state_dicts(placed, "squisher", base="base", parameters=parameters)
    result = {name: tensor.cpu() for name, tensor in found.items()}
    masks = global_masks("change", weights, fishers, [0.3] * 3, list(shapes))
    assert_global(result, weights, fishers, masks, power=0.5)


def test_tensors_of_density_1_are_kept_whole(tmp_path: Path) -> None:
    """A filter of density 1 takes its tensors out of the choice."""
    weights, fishers = base_and_models(tmp_path, 3)
    density = [{"filter": "mlp", "value": 1.0}, {"value": 0.3}]
    settings = {"density_scope": "model", "trimmed": "abstain"}
    result = merged(density_config(tmp_path, [density, density], parameters=settings), tmp_path / "out")
    names = [name for name in result if "mlp" not in name]
    masks = global_masks("fisher", weights, fishers, [0.3, 0.3], names)
    whole = {name: torch.ones_like(weights[0][name], dtype=torch.bool) for name in result if "mlp" in name}
    assert_global(result, weights, fishers, [mask | whole for mask in masks])


def test_a_union_of_vocabularies(tmp_path: Path) -> None:
    """The choice over the model is among the tokens that model and base share."""
    weights, fishers = base_and_models(tmp_path, 3)
    words = [f"word{i}" for i in range(28)]
    for i in range(3):
        word_tokenizer(tmp_path / f"m{i}", words if i == 0 else [*words[:27], "extra"])
    settings = {"density_scope": "model", "trimmed": "abstain", "density_by": "change"}
    config = density_config(tmp_path, [0.3, 0.3], parameters=settings, tokenizer={"source": "union"})
    result = merged(config, tmp_path / "out")
    for model in (weights, fishers):
        for tensors in model[1:]:
            tensors |= {n: t[:28] for n, t in tensors.items() if n in (EMBEDDING, "lm_head.weight")}
    weights[0] |= {n: t[:28] for n, t in weights[0].items() if n in (EMBEDDING, "lm_head.weight")}
    masks = global_masks("change", weights, fishers, [0.3, 0.3], list(result))
    cut = {n: t[:28] if n in (EMBEDDING, "lm_head.weight") else t for n, t in result.items()}
    assert_global(cut, weights, fishers, masks)


def test_one_density_for_all_tensors(tmp_path: Path) -> None:
    """A density that changes over the layers is refused: the model has one threshold."""
    base_and_models(tmp_path, 3)
    config = density_config(tmp_path, [[0.2, 0.9], 0.5], parameters={"density_scope": "model"})
    assert_config_refused(tmp_path / "x", config, "density_scope: model needs one density of", "density_scope: tensor")


def test_the_plan_counts_the_second_read(tmp_path: Path) -> None:
    """The plan of a merge with thresholds of whole models reads weights and Fishers once more."""
    base_and_models(tmp_path, 3)
    plain = preview_of(tmp_path, density_config(tmp_path, [0.3, 0.3]))
    whole = preview_of(tmp_path, density_config(tmp_path, [0.3, 0.3], parameters={"density_scope": "model"}))
    assert whole["bytes_to_read"] == {key: 2 * count for key, count in plain["bytes_to_read"].items()}
    assert "density_scope: model, for all tensors" in whole["text"]


def test_the_report_has_the_share_of_each_layer(tmp_path: Path) -> None:
    """The report of a merge has the share of each layer above the threshold."""
    import yaml
    from mergekit.options import MergeOptions

    from squisher_mergekit.merging.mergekit.commands import read_config
    from squisher_mergekit.merging.run import Run

    base_and_models(tmp_path, 3)
    config = density_config(tmp_path, [0.25, 0.5], parameters={"density_scope": "model"})
    run = Run("squisher", quiet=True)
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    object.__setattr__(options, "run", run)
    from mergekit.merge import run_merge

    run_merge(read_config(yaml.safe_dump(config)), str(tmp_path / "out"), options)
    kept = run.report()["kept"]
    assert set(kept) == {str(tmp_path / "m1"), str(tmp_path / "m2")}
    assert set(kept[str(tmp_path / "m1")]) == {"model.embed_tokens", "model.norm", "lm_head"} | {
        f"model.layers.{layer}" for layer in range(3)
    }


def test_experts_that_are_packed_at_reading(tmp_path: Path) -> None:
    """Scores of tensors that transformers builds are on the scale of all others.

    A Fisher with one tensor per expert keeps the entries that one with packed experts keeps.
    """
    weights = [mixtral(tmp_path / f"m{i}", i) for i in range(2)]
    generator = torch.Generator().manual_seed(5)
    fisher = {name: torch.rand(tensor.shape, generator=generator) * 1e-6 for name, tensor in weights[1].items()}
    entries = torch.cat([tensor.flatten() for tensor in fisher.values()]).double() / (1 - 0.9**3)
    known = {"mean": float(entries.mean()), "norm": float(entries.norm()), "optimizer": {"beta2": 0.9}}
    results = []
    for layout, tensors in (("checkpoint", fisher), ("module", packed_experts(fisher))):
        store_fisher(tmp_path / layout, tensors, fingerprint(tmp_path / "m1"), statistic="ema", steps=3, **known)
        config = density_config(tmp_path, [0.3], parameters={"density_scope": "model"})
        config["models"][0]["parameters"]["fisher"] = str(tmp_path / layout)
        results.append(merged(config, tmp_path / f"out-{layout}"))
    assert any("gate_up_proj" in name for name in results[0])
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
