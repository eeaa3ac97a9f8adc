"""Whole merges by stock ``mergekit-yaml`` on real files, against float64 references on the same files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.merging.reference import (
    Tensors,
    assert_within,
    give_fisher,
    largest,
    llama,
    merged,
    squisher_reference,
    store_fisher,
    ubgm_reference,
)

WEIGHTS = (1.0, 0.3, 2.0, 0.7, 1.3)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _models(
    root: Path, count: int, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[list[Tensors], list[Tensors]]:
    weights = [llama(root / f"m{i}", i, dtype, **changes) for i in range(count)]
    return weights, [give_fisher(root / f"m{i}", tensors, i) for i, tensors in enumerate(weights)]


def _entry(root: Path, i: int, **parameters: Any) -> dict[str, Any]:
    return {"model": str(root / f"m{i}"), "parameters": parameters} if parameters else {"model": str(root / f"m{i}")}


def _assert_squisher(
    result: Tensors, weights: list[Tensors], fishers: list[Tensors], factors: tuple[float, ...] = WEIGHTS
) -> None:
    assert set(result) == set(weights[0])
    for name, tensor in result.items():
        thetas = [model[name] for model in weights]
        reference = squisher_reference(thetas, [model[name] for model in fishers], factors[: len(weights)])
        assert_within(tensor, reference, largest(thetas))


def _assert_ubgm(
    result: Tensors, weights: list[Tensors], fishers: list[Tensors], factors: tuple[float, ...], prior: float = 0.0
) -> None:
    for name, tensor in result.items():
        base, *thetas = [model[name] for model in weights]
        base_fisher, *others = [model[name] for model in fishers]
        size = base.double().abs() + sum(
            w * (t.double() - base.double()).abs() for w, t in zip(factors, thetas, strict=True)
        )
        assert_within(tensor, ubgm_reference(base, base_fisher, thetas, others, factors, prior), size)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_squisher_equals_the_reference(tmp_path: Path, count: int, dtype: str) -> None:
    """Fisher merging of 1, 2, 3 and 5 models in fp32, bf16 and fp16, F from 1e-38 to 1e+30, with weights."""
    weights, fishers = _models(tmp_path, count, DTYPES[dtype])
    config = {
        "merge_method": "squisher",
        "models": [_entry(tmp_path, i, weight=WEIGHTS[i]) for i in range(count)],
        "dtype": dtype,
    }
    result = merged(config, tmp_path / "out")
    assert {tensor.dtype for tensor in result.values()} == {DTYPES[dtype]}
    _assert_squisher(result, weights, fishers)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ubgm_equals_the_reference(tmp_path: Path, count: int, dtype: str) -> None:
    """Gradient matching of 1, 2, 3 and 5 models and a base in fp32, bf16 and fp16, with weights."""
    weights, fishers = _models(tmp_path, count + 1, DTYPES[dtype])
    config = {
        "merge_method": "ubgm_squisher",
        "base_model": str(tmp_path / "m0"),
        "models": [_entry(tmp_path, i + 1, weight=WEIGHTS[i]) for i in range(count)],
        "dtype": dtype,
    }
    _assert_ubgm(merged(config, tmp_path / "out"), weights, fishers, WEIGHTS[:count])


def test_ubgm_prior_and_listed_base(tmp_path: Path) -> None:
    """A base listed under models: enters once, its Fisher can be given there, its weight is not used; prior counts."""
    weights, fishers = _models(tmp_path, 3)
    other = give_fisher(tmp_path / "m0", weights[0], seed=77, out=tmp_path / "other")
    config = {
        "merge_method": "ubgm_squisher",
        "base_model": str(tmp_path / "m0"),
        "models": [
            _entry(tmp_path, 0, fisher=str(tmp_path / "other"), weight=9.0),
            _entry(tmp_path, 1),
            _entry(tmp_path, 2),
        ],
        "parameters": {"prior": 0.25},
    }
    _assert_ubgm(merged(config, tmp_path / "out"), weights, [other, *fishers[1:]], (1.0, 1.0), 0.25)


def test_ubgm_base_without_fisher(tmp_path: Path) -> None:
    """`fisher: none` for the base means F_0 = 0; the base then needs no Fisher on disk."""
    weights, fishers = _models(tmp_path, 3)
    for file in (tmp_path / "m0").glob("fisher*"):
        file.unlink()
    config = {
        "merge_method": "ubgm_squisher",
        "base_model": str(tmp_path / "m0"),
        "models": [_entry(tmp_path, 0, fisher="none"), _entry(tmp_path, 1), _entry(tmp_path, 2)],
    }
    zeros = {name: torch.zeros_like(tensor) for name, tensor in fishers[0].items()}
    _assert_ubgm(merged(config, tmp_path / "out"), weights, [zeros, *fishers[1:]], (1.0, 1.0))


@pytest.mark.parametrize("listed", [False, True])
def test_squisher_base_model_enters_only_if_listed(tmp_path: Path, listed: bool) -> None:
    """In squisher `base_model:` gives the config; it is summed, and needs a Fisher, only if it is listed as well."""
    weights, fishers = _models(tmp_path, 3)
    if not listed:
        for file in (tmp_path / "m0").glob("fisher*"):
            file.unlink()
    models = range(0 if listed else 1, 3)
    config = {
        "merge_method": "squisher",
        "base_model": str(tmp_path / "m0"),
        "models": [_entry(tmp_path, i) for i in models],
    }
    result = merged(config, tmp_path / "out")
    _assert_squisher(result, [weights[i] for i in models], [fishers[i] for i in models], (1.0, 1.0, 1.0))


def test_slices_use_each_models_own_layer(tmp_path: Path) -> None:
    """With offset slices the Fisher of the *input's* layer is used, also for a layer that is used twice."""
    weights, fishers = _models(tmp_path, 2)

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
    """A tied model's embedding stands in for its head, with the embedding's Fisher; two tied models have no head."""
    tied = llama(tmp_path / "m0", 0, tie_word_embeddings=True)
    untied = llama(tmp_path / "m1", 1)
    fishers = [give_fisher(tmp_path / "m0", tied, 0), give_fisher(tmp_path / "m1", untied, 1)]
    assert "lm_head.weight" not in tied
    config = {
        "merge_method": "squisher",
        "base_model": str(tmp_path / "m1"),
        "models": [_entry(tmp_path, 0), _entry(tmp_path, 1)],
    }
    result = merged(config, tmp_path / "out")
    embedding = "model.embed_tokens.weight"
    thetas = [tied[embedding], untied["lm_head.weight"]]
    head = squisher_reference(thetas, [fishers[0][embedding], fishers[1]["lm_head.weight"]], (1.0, 1.0))
    assert_within(result["lm_head.weight"], head, largest(thetas))
    llama(tmp_path / "m2", 2, tie_word_embeddings=True)
    give_fisher(tmp_path / "m2", load_file(tmp_path / "m2" / "model.safetensors"), 2)
    both = {"merge_method": "squisher", "models": [_entry(tmp_path, 0), _entry(tmp_path, 2)]}
    assert "lm_head.weight" not in merged(both, tmp_path / "out2")


def test_an_untied_head_never_borrows_the_embeddings_fisher(tmp_path: Path) -> None:
    """If a Fisher lacks the head of an untied model, the head is reported missing; the embedding's is not taken."""
    weights, fishers = _models(tmp_path, 2)
    del fishers[0]["lm_head.weight"]
    store_fisher(tmp_path / "partial", fishers[0])
    config = {
        "merge_method": "squisher",
        "models": [_entry(tmp_path, 0, fisher=str(tmp_path / "partial")), _entry(tmp_path, 1)],
        "parameters": {"missing": "average"},
    }
    result = merged(config, tmp_path / "out")
    mean = (weights[0]["lm_head.weight"].double() + weights[1]["lm_head.weight"].double()) / 2
    assert_within(result["lm_head.weight"], mean, mean.abs())
    del result["lm_head.weight"], weights[0]["lm_head.weight"]
    _assert_squisher(result, weights, fishers, (1.0, 1.0))


def test_ubgm_missing_average(tmp_path: Path) -> None:
    """`missing: average` gives the base plus the weighted mean difference, over all models."""
    weights, fishers = _models(tmp_path, 3)
    name = "model.norm.weight"
    del fishers[1][name]
    store_fisher(tmp_path / "partial", fishers[1])
    config = {
        "merge_method": "ubgm_squisher",
        "base_model": str(tmp_path / "m0"),
        "models": [_entry(tmp_path, 1, fisher=str(tmp_path / "partial"), weight=0.5), _entry(tmp_path, 2)],
        "parameters": {"missing": "average"},
    }
    result = merged(config, tmp_path / "out")
    base, one, two = (model[name].double() for model in weights)
    assert_within(result[name], base + (0.5 * (one - base) + (two - base)) / 1.5, base.abs() + one.abs() + two.abs())


def test_filters_and_gradients(tmp_path: Path) -> None:
    """Weights by filter and by gradient over the layers, and a Fisher by filter, reach the tensors they name."""
    weights, fishers = _models(tmp_path, 2)
    other = give_fisher(tmp_path / "m0", weights[0], seed=55, out=tmp_path / "other")
    by_filter = [{"filter": "mlp", "value": str(tmp_path / "other")}, {"value": "auto"}]
    config = {
        "merge_method": "squisher",
        "models": [
            _entry(tmp_path, 0, weight=[1.0, 0.5, 0.0], fisher=by_filter),
            _entry(tmp_path, 1, weight=[{"filter": "self_attn", "value": 3.0}, {"value": 1.0}]),
        ],
    }
    result = merged(config, tmp_path / "out")
    for name, tensor in result.items():
        parts = name.split(".")
        # mergekit: the gradient runs over the layers; tensors outside them are at its start.
        first = {0: 1.0, 1: 0.5, 2: 0.0}[int(parts[2])] if parts[1] == "layers" else 1.0
        second = 3.0 if "self_attn" in name else 1.0
        thetas = [model[name] for model in weights]
        chosen = [other[name] if "mlp" in name else fishers[0][name], fishers[1][name]]
        assert_within(tensor, squisher_reference(thetas, chosen, (first, second)), largest(thetas))


def test_dtype_and_out_dtype(tmp_path: Path) -> None:
    """`dtype` casts the weights, never the Fishers; `out_dtype` casts the result."""
    weights, fishers = _models(tmp_path, 2)
    models = [_entry(tmp_path, 0), _entry(tmp_path, 1)]
    result = merged({"merge_method": "squisher", "models": models, "out_dtype": "bfloat16"}, tmp_path / "out")
    assert {tensor.dtype for tensor in result.values()} == {torch.bfloat16}
    _assert_squisher(result, weights, fishers, (1.0, 1.0))
    narrow = merged({"merge_method": "squisher", "models": models, "dtype": "float16"}, tmp_path / "out2")
    halves = [{name: tensor.half() for name, tensor in model.items()} for model in weights]
    _assert_squisher(narrow, halves, fishers, (1.0, 1.0))


def _reference_at(
    weights: list[Tensors], fishers: list[Tensors], scales: list[float], name: str
) -> tuple[Tensor, Tensor]:
    thetas = [model[name] for model in weights]
    scaled = [fisher[name].double() * scale for fisher, scale in zip(fishers, scales, strict=True)]
    return squisher_reference(thetas, scaled, [1.0] * len(weights)), largest(thetas)


@pytest.mark.parametrize("scaling", ["raw", "debiased", "per_example"])
def test_scaling(tmp_path: Path, scaling: str) -> None:
    """The three scalings: as stored, divided by 1 - beta2^t, and that times the examples of a step."""
    weights, fishers = _models(tmp_path, 2)
    for i, (steps, examples) in enumerate(((100, 16), (1200, 48))):
        optimizer = {"class": "torch.optim.AdamW", "beta2": 0.999}
        store_fisher(
            tmp_path / f"m{i}", fishers[i], statistic="ema", steps=steps, bias_corrected=False,
            optimizer=optimizer, examples_per_step=examples,
        )  # fmt: skip
    config = {
        "merge_method": "squisher",
        "models": [_entry(tmp_path, 0, fisher_scale=3.0), _entry(tmp_path, 1)],
        "parameters": {"scaling": scaling},
    }
    result = merged(config, tmp_path / "out")
    debias = [1 / (1 - 0.999**100), 1 / (1 - 0.999**1200)]
    scales = {"raw": [1.0, 1.0], "debiased": debias, "per_example": [16 * debias[0], 48 * debias[1]]}[scaling]
    scales[0] *= 3.0
    for name, tensor in result.items():
        assert_within(tensor, *_reference_at(weights, fishers, scales, name))


def test_adagrads_sum_is_a_mean_less_its_start(tmp_path: Path) -> None:
    """A sum is taken less Adagrad's initial value and divided by the steps; a computed sum by the examples."""
    weights, _ = _models(tmp_path, 2)
    generator = torch.Generator().manual_seed(3)
    fishers = [{n: torch.rand(t.shape, generator=generator) + 0.5 for n, t in weights[0].items()} for _ in range(2)]
    optimizer = {"class": "torch.optim.Adagrad", "initial_accumulator_value": 0.25}
    store_fisher(tmp_path / "m0", fishers[0], statistic="sum", steps=7, optimizer=optimizer)
    store_fisher(tmp_path / "m1", fishers[1], estimator="empirical", statistic="sum", num_examples=64)
    models = [_entry(tmp_path, 0), _entry(tmp_path, 1)]
    config = {"merge_method": "squisher", "models": models, "parameters": {"normalize": "none"}}
    result = merged(config, tmp_path / "out")
    means = [{name: (f - 0.25) / 7 for name, f in fishers[0].items()}, {name: f / 64 for name, f in fishers[1].items()}]
    _assert_squisher(result, weights, means, (1.0, 1.0))


@pytest.mark.parametrize(("normalize", "estimator"), [("mean", "squisher"), ("l2", "squisher"), ("auto", "empirical")])
def test_normalize(tmp_path: Path, normalize: str, estimator: str) -> None:
    """Each Fisher is divided by its mean or L2 norm over the whole model; auto means mean once one is computed."""
    weights, _ = _models(tmp_path, 2)
    generator = torch.Generator().manual_seed(4)
    fishers = [{n: torch.rand(t.shape, generator=generator) ** 4 for n, t in weights[0].items()} for _ in range(2)]
    store_fisher(tmp_path / "m0", fishers[0], estimator=estimator)
    store_fisher(tmp_path / "m1", fishers[1])
    models = [_entry(tmp_path, 0), _entry(tmp_path, 1)]
    config = {"merge_method": "squisher", "models": models, "parameters": {"normalize": normalize}}
    result = merged(config, tmp_path / "out")
    flat = [torch.cat([tensor.double().flatten() for tensor in model.values()]) for model in fishers]
    scales = [1 / float(f.norm() if normalize == "l2" else f.mean()) for f in flat]
    for name, tensor in result.items():
        assert_within(tensor, *_reference_at(weights, fishers, scales, name))


def test_floor(tmp_path: Path) -> None:
    """`floor` raises every F to that share of its tensor's mean."""
    weights, _ = _models(tmp_path, 2)
    generator = torch.Generator().manual_seed(5)
    fishers = [{n: torch.rand(t.shape, generator=generator) ** 4 for n, t in weights[0].items()} for _ in range(2)]
    for i in range(2):
        store_fisher(tmp_path / f"m{i}", fishers[i])
    models = [_entry(tmp_path, 0), _entry(tmp_path, 1)]
    result = merged({"merge_method": "squisher", "models": models, "parameters": {"floor": 0.5}}, tmp_path / "out")
    floored = [{n: f.double().clamp_min(0.5 * f.double().mean()) for n, f in model.items()} for model in fishers]
    _assert_squisher(result, weights, floored, (1.0, 1.0))


def test_truncated_vocabulary(tmp_path: Path) -> None:
    """With --unsafe-truncate-embeddings the Fishers lose the same rows as the weights."""
    weights = [llama(tmp_path / "m0", 0), llama(tmp_path / "m1", 1, vocab_size=31)]
    fishers = [give_fisher(tmp_path / f"m{i}", tensors, i) for i, tensors in enumerate(weights)]
    models = [_entry(tmp_path, 0), _entry(tmp_path, 1)]
    config = {"merge_method": "squisher", "models": models}
    result = merged(config, tmp_path / "out", "--unsafe-truncate-embeddings")

    def cut(model: Tensors) -> Tensors:
        return {n: t[:29] if n in ("lm_head.weight", "model.embed_tokens.weight") else t for n, t in model.items()}

    _assert_squisher(result, [cut(m) for m in weights], [cut(m) for m in fishers], (1.0, 1.0))


@pytest.mark.parametrize("flags", [["--async-write"], ["--lazy-unpickle"], ["--out-shard-size", "2K"], ["-j", "2"]])
def test_flags_of_mergekit_change_nothing(tmp_path: Path, flags: list[str]) -> None:
    """Mergekit's own options give the same tensors."""
    from tests.merging.reference import merge

    _models(tmp_path, 2)
    config = {"merge_method": "squisher", "models": [_entry(tmp_path, 0), _entry(tmp_path, 1)]}
    plain = merged(config, tmp_path / "out")
    threads = torch.get_num_threads()
    try:
        result = merge(config, tmp_path / "flagged", *flags[:2] if flags[0] != "-j" else ["--write-threads", "2"])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    found: Tensors = {}
    for file in (tmp_path / "flagged").glob("*.safetensors"):
        found |= load_file(file)
    assert set(found) == set(plain)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
