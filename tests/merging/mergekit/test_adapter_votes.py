"""Adapter: options of the vote through stock `mergekit-yaml`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.merging.models import (
    EMBEDDING,
    base_and_models,
    base_without_norm,
    density_config,
    entry,
    models_with_fishers,
    nets,
    word_tokenizer,
)
from tests.merging.reference import (
    Tensors,
    assert_config_refused,
    assert_within,
    keep_largest,
    largest,
    llama,
    merge_raw,
    merged,
    preview_of,
    squisher_reference,
    store_fisher,
)
from tests.merging.votes.reference import mask_of, score_of, voted_reference

EXACT = (1.0, 0.25, 2.0, 0.75)


def _config(root: Path, count: int, models: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Return the merge of models 1 to ``count`` from the base `m0`."""
    entries = [entry(root, i, weight=EXACT[i - 1], **(models or {})) for i in range(1, count + 1)]
    return {"merge_method": "squisher", "base_model": str(root / "m0"), "models": entries, "parameters": settings}


def _assert_voted(result: Tensors, weights: list[Tensors], fishers: list[Tensors], name: str, **options: Any) -> None:
    thetas, own = [model[name] for model in weights[1:]], [fisher[name] for fisher in fishers[1:]]
    extent = options.get("extent", 1.0)
    reference = voted_reference(thetas, own, EXACT[: len(own)], weights[0][name], **options)
    assert_within(result[name], reference, largest([weights[0][name], *thetas]) * max(extent, 1) * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"lambda": 1.5}, {"extent": 1.5}),
        ({"consensus": "sign"}, {"elected": True}),
        ({"power": 0.5}, {"power": 0.5}),
        ({"power": 2, "consensus": "sign", "lambda": 0.25}, {"power": 2.0, "elected": True, "extent": 0.25}),
    ],
    ids=["lambda", "consensus", "power", "all three"],
)
def test_options(tmp_path: Path, settings: dict[str, Any], options: dict[str, Any], dtype: torch.dtype) -> None:
    """`mergekit-yaml` merges by the option."""
    weights, fishers = base_and_models(tmp_path, 4, dtype)
    result = merged(_config(tmp_path, 3, **settings), tmp_path / "out")
    for name in result:
        _assert_voted(result, weights, fishers, name, **options)


def test_defaults_are_bit_for_bit_those_without(tmp_path: Path) -> None:
    """Options at their defaults change no bit."""
    base_and_models(tmp_path, 3)
    plain = merged(_config(tmp_path, 2, {"density": 0.4}), tmp_path / "plain")
    spelt = {"power": 1, "density_by": "fisher", "density_scope": "tensor", "trimmed": "base", "consensus": "none"}
    given = merged(_config(tmp_path, 2, {"density": 0.4}, **spelt, **{"lambda": 1.0}), tmp_path / "given")
    assert all(torch.equal(plain[name], given[name]) for name in plain)


def test_gradients_and_filters(tmp_path: Path) -> None:
    """Lambda and power follow gradients over the layers, and consensus filters by name."""
    weights, fishers = base_and_models(tmp_path, 4)
    settings = {
        "lambda": [1.0, 1.5, 2.0],
        "power": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}],
        "consensus": [{"filter": "self_attn", "value": "sign"}, {"value": "none"}],
    }
    result = merged(_config(tmp_path, 3, **settings), tmp_path / "out")
    for name in result:
        layer = int(name.split(".")[2]) if ".layers." in name else 0 if name.startswith("model.embed") else 2
        options = {"extent": (1.0, 1.5, 2.0)[layer], "power": 0.5 if "mlp" in name else 1.0}
        if ".layers." in name:
            _assert_voted(result, weights, fishers, name, elected="self_attn" in name, **options)


@pytest.mark.parametrize("by", ["fisher", "change", "magnitude"])
@pytest.mark.parametrize("trimmed", ["base", "abstain"])
def test_scores_and_abstention(tmp_path: Path, by: str, trimmed: str) -> None:
    """The entries with the largest scores are kept; the others vote for the base, or not at all."""
    weights, fishers = base_and_models(tmp_path, 4)
    config = _config(tmp_path, 3, {"density": 0.3}, density_by=by, trimmed=trimmed)
    result = merged(config, tmp_path / "out")
    for name, tensor in result.items():
        base, thetas, own = weights[0][name], [m[name] for m in weights[1:]], [f[name] for f in fishers[1:]]
        positive = (by, trimmed) != ("fisher", "base")
        masks = [mask_of(score_of(by, t, base, f), 0.3, positive) for t, f in zip(thetas, own, strict=True)]
        if trimmed == "base":
            thetas = [torch.where(mask, theta, base) for mask, theta in zip(masks, thetas, strict=True)]
            reference = voted_reference(thetas, own, EXACT[:3])
        else:
            reference = voted_reference(thetas, own, EXACT[:3], base, masks=masks)
        assert_within(tensor, reference, largest([base, *thetas]))


def test_a_random_choice_repeats(tmp_path: Path) -> None:
    """A random choice keeps its share, is the same in a second merge, and differs between models."""
    weights, _ = base_and_models(tmp_path, 3)
    config = _config(tmp_path, 2, {"density": 0.4}, density_by="random", trimmed="abstain")
    first, second = merged(config, tmp_path / "one"), merged(config, tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)
    base, out = weights[0][EMBEDDING], first[EMBEDDING]
    assert 0.25 < float((out == base).float().mean()) < 0.48  # 0.6 of the entries of each of two models


def test_gradient_matching_takes_powers_and_abstention(tmp_path: Path) -> None:
    """`ubgm_squisher` trims by the change; a trimmed entry leaves both of its sums."""
    weights, fishers = base_and_models(tmp_path, 3)
    config = density_config(
        tmp_path, [0.4, 0.4], "ubgm_squisher", parameters={"density_by": "change", "trimmed": "abstain", "power": 0.5}
    )
    result = merged(config, tmp_path / "out")
    for name, tensor in result.items():
        base, thetas, own = weights[0][name].double(), [m[name] for m in weights[1:]], [f[name] for f in fishers[1:]]
        masks = [mask_of(score_of("change", t, base, f), 0.4) for t, f in zip(thetas, own, strict=True)]
        votes = [f.double().sqrt() * mask for f, mask in zip(own, masks, strict=True)]
        total = votes[0] + votes[1]
        step = sum(vote * (theta.double() - base) for vote, theta in zip(votes, thetas, strict=True))
        reference = torch.where(total > 0, base + step / total.clamp_min(1e-300), base)
        assert_within(tensor, reference, largest([base, *thetas]) * 3)


def test_a_union_of_vocabularies(tmp_path: Path) -> None:
    """Tokens that the base lacks are merged without election and lambda."""
    weights, fishers = base_and_models(tmp_path, 3)
    base_words = [f"word{i}" for i in range(28)]
    words = [base_words, *[[*base_words[:27], "extra"]] * 2]
    for i, known in enumerate(words):
        word_tokenizer(tmp_path / f"m{i}", known)
    config = _config(tmp_path, 2, consensus="sign", **{"lambda": 2.0}) | {"tokenizer": {"source": "union"}}
    out = merged(config, tmp_path / "out")[EMBEDDING]
    thetas, own = [m[EMBEDDING] for m in weights[1:]], [f[EMBEDDING] for f in fishers[1:]]
    reference = voted_reference(thetas, own, EXACT[:2], weights[0][EMBEDDING], elected=True, extent=2.0)
    assert_within(out[:28], reference[:28], largest([weights[0][EMBEDDING], *thetas])[:28] * 4)
    plain = squisher_reference([t[28] for t in thetas], [f[28] for f in own], EXACT[:2])
    assert_within(out[29], plain, largest([t[28] for t in thetas]))


def test_slices(tmp_path: Path) -> None:
    """Slices with the same layers of all models elect; slices with other layers have no common base."""
    weights, fishers = base_and_models(tmp_path, 3)

    def sources(first: tuple[int, int], second: tuple[int, int]) -> dict[str, Any]:
        ranges = zip((1, 2), (first, second), strict=True)
        return {"sources": [{"model": str(tmp_path / f"m{i}"), "layer_range": list(part)} for i, part in ranges]}

    config = {
        "merge_method": "squisher",
        "base_model": str(tmp_path / "m0"),
        "slices": [sources((1, 3), (1, 3))],
        "parameters": {"consensus": "sign"},
    }
    result = merged(config, tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    thetas, own = [m[name] for m in weights[1:]], [f[name] for f in fishers[1:]]
    reference = voted_reference(thetas, own, (1.0, 1.0), weights[0][name], elected=True)
    assert_within(result[name.replace("1", "0")], reference, largest([weights[0][name], *thetas]))
    config["slices"] = [sources((0, 2), (1, 3))]
    assert_config_refused(tmp_path / "other", config, "consensus: sign needs one weight of the base", "layers.0")


def test_single_files(tmp_path: Path) -> None:
    """`mergekit-pytorch` elects signs of steps from an unlisted base."""
    weights, fishers = nets(tmp_path, 3)
    entries = [{"model": str(tmp_path / f"n{i}" / "net.safetensors")} for i in range(3)]
    config: dict[str, Any] = {
        "merge_method": "squisher",
        "models": entries[1:],
        "base_model": entries[0]["model"],
        "parameters": {"consensus": "sign", "lambda": 1.5},
    }
    result = merge_raw(tmp_path, config)
    assert result.exit_code == 0, result.output + repr(result.exception)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in fishers[0]:
        thetas, own = [m[name] for m in weights[1:]], [f[name] for f in fishers[1:]]
        reference = voted_reference(thetas, own, (1.0, 1.0), weights[0][name], elected=True, extent=1.5)
        assert_within(found[name], reference, largest([weights[0][name], *thetas]) * 2)


def test_lambda_acts_on_tensors_without_fishers(tmp_path: Path) -> None:
    """The weighted mean of a tensor without a Fisher takes the same step from the base as the others."""
    weights, fishers = base_and_models(tmp_path, 3)
    for i in (1, 2):
        store_fisher(tmp_path / f"m{i}", {n: f for n, f in fishers[i].items() if n != EMBEDDING})
    result = merged(_config(tmp_path, 2, missing="average", **{"lambda": 3.0}), tmp_path / "out")
    base, thetas = weights[0][EMBEDDING].double(), [m[EMBEDDING].double() for m in weights[1:]]
    mean: Tensor = (thetas[0] + 0.25 * thetas[1]) / 1.25
    assert_within(result[EMBEDDING], base + 3 * (mean - base), largest([base, *thetas]) * 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lambda": 0}, ("lambda must be a finite number >= 1e-30", "found 0")),
        ({"lambda": float("nan")}, ("lambda must be a finite number", "nan")),
        ({"power": -1}, ("power must be a finite number >= 0", "found -1")),
        ({"consensus": "signs"}, ("consensus must be one of none, sign", "'signs'")),
        ({"trimmed": True}, ("trimmed must be one of base, abstain", "True")),
        ({"density_by": "change", "structure": "rows"}, ("structure: rows takes lambda", "not density_by: change")),
        ({"power": 0.5, "structure": "kron"}, ("structure: kron takes lambda", "not power: 0.5")),
        ({"consensus": "sign", "structure": "columns"}, ("structure: columns takes", "not consensus: sign")),
    ],
)
def test_refused_values(tmp_path: Path, settings: dict[str, Any], words: tuple[str, ...]) -> None:
    """A value or a combination that no merge can have is refused in one line."""
    base_and_models(tmp_path, 3)
    assert_config_refused(tmp_path / "x", _config(tmp_path, 2, **settings), *words)


@pytest.mark.parametrize("key", ["consensus", "lambda"])
def test_gradient_matching_refuses_the_options_of_the_mean(tmp_path: Path, key: str) -> None:
    """`ubgm_squisher` refuses consensus and lambda, and says that its prior and weights play their role."""
    base_and_models(tmp_path, 3)
    config = density_config(tmp_path, [1.0, 1.0], "ubgm_squisher", parameters={key: 1.5 if key == "lambda" else "sign"})
    assert_config_refused(tmp_path / "x", config, f"no parameter '{key}'", "the prior and the weights", "squisher")


@pytest.mark.parametrize(("key", "value"), [("consensus", "sign"), ("lambda", 1.5)])
def test_a_base_is_needed(tmp_path: Path, key: str, value: Any) -> None:
    """An option that starts at the base is refused without one, and where the base lacks a tensor."""
    base_and_models(tmp_path, 3)
    config = _config(tmp_path, 2, **{key: value})
    without = {name: setting for name, setting in config.items() if name != "base_model"}
    assert_config_refused(tmp_path / "x", without, f"{key}: {value} needs base_model:")
    base_without_norm(tmp_path, config)
    assert_config_refused(tmp_path / "y", config, f"{key}: {value} for", "has no model.norm.weight")


def test_the_plan_names_the_options(tmp_path: Path) -> None:
    """`squisher plan` says which options work on how many tensors, as text and in `--json`."""
    base_and_models(tmp_path, 3)
    by_name = [{"filter": "mlp", "value": 2.0}, {"value": 1.0}]
    plan = preview_of(tmp_path, _config(tmp_path, 2, consensus="sign", power=0.5, **{"lambda": by_name}))
    assert plan["options"] == {"power: 0.5": plan["tensors"], "consensus: sign": plan["tensors"], "lambda: 2": 9}
    assert "consensus: sign, for all tensors" in plan["text"]
    assert "lambda: 2, for 9 of 30 tensors" in plan["text"]


def test_density_by_fisher_is_todays_choice(tmp_path: Path) -> None:
    """Spelling out `density_by: fisher` resets the entries of today."""
    weights, fishers = base_and_models(tmp_path, 3)
    result = merged(_config(tmp_path, 2, {"density": 0.2}, density_by="fisher"), tmp_path / "out")
    for name, tensor in result.items():
        own = [f[name] for f in fishers[1:]]
        thetas = [keep_largest(m[name], weights[0][name], f, 0.2) for m, f in zip(weights[1:], own, strict=True)]
        assert_within(tensor, squisher_reference(thetas, own, EXACT[:2]), largest([weights[0][name], *thetas]))


@pytest.mark.parametrize("settings", [{"lambda": 2.0}, {"consensus": "sign"}, {"density": 0.3}])
def test_a_forced_token_keeps_its_row(tmp_path: Path, settings: dict[str, Any]) -> None:
    """A row that `force: true` sets for all models is the output's, whatever the options do with other rows."""
    weights, _ = base_and_models(tmp_path, 3)
    for i in range(3):
        word_tokenizer(tmp_path / f"m{i}", [f"word{j}" for j in range(28)])
    tokens = {"word3": {"source": str(tmp_path / "m1"), "force": True}}
    config = _config(tmp_path, 2, **settings) | {"tokenizer": {"source": "union", "tokens": tokens}}
    assert torch.equal(merged(config, tmp_path / "out")[EMBEDDING][4], weights[1][EMBEDDING][4])


def test_a_base_that_is_an_input_by_another_layer(tmp_path: Path) -> None:
    """In slices, theta_0 is the base's layer of the other models, also where the base itself is merged by another."""
    weights, fishers = models_with_fishers(tmp_path, 3)
    firsts = (1, 0, 0)
    sources = [{"model": str(tmp_path / f"m{i}"), "layer_range": [lo, lo + 2]} for i, lo in enumerate(firsts)]
    config = {
        "merge_method": "squisher",
        "base_model": str(tmp_path / "m0"),
        "slices": [{"sources": sources}],
        "parameters": {"lambda": 2.0},
    }
    name = "model.layers.{}.mlp.up_proj.weight"
    thetas, own = [[m[name.format(lo)] for m, lo in zip(of, firsts, strict=True)] for of in (weights, fishers)]
    reference = squisher_reference(thetas, own, (1.0, 1.0, 1.0))
    base = weights[0][name.format(0)]
    found = merged(config, tmp_path / "out")[name.format(0)]
    assert_within(found, 2 * reference - base.double(), largest([base, *thetas]) * 4)


def test_lambda_of_a_truncated_vocabulary_without_fishers(tmp_path: Path) -> None:
    """With --unsafe-truncate-embeddings, theta_0 has the rows of the weights, also where no Fisher tells them."""
    weights, fishers = base_and_models(tmp_path, 3)
    weights[0] = llama(tmp_path / "m0", 0, vocab_size=31)
    for i in (1, 2):
        store_fisher(tmp_path / f"m{i}", {n: f for n, f in fishers[i].items() if n != EMBEDDING})
    config = _config(tmp_path, 2, missing="average", **{"lambda": 3.0})
    result = merged(config, tmp_path / "out", "--unsafe-truncate-embeddings")
    base, thetas = weights[0][EMBEDDING].double()[:29], [m[EMBEDDING].double() for m in weights[1:]]
    mean: Tensor = (thetas[0] + 0.25 * thetas[1]) / 1.25
    assert_within(result[EMBEDDING], base + 3 * (mean - base), largest([base, *thetas]) * 4)
