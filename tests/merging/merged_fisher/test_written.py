"""`write_fisher`: the Fisher of a merged model, and merges of merges."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.models.fingerprint import fingerprint
from squisher_mergekit.tensors.safetensors import read_header
from tests.merging.models import EMBEDDING, base_and_models, entry, models_with_fishers
from tests.merging.reference import (
    assert_config_refused,
    assert_refused,
    assert_within,
    give_fisher,
    largest,
    llama,
    merge,
    merged,
    preview_of,
    squisher_reference,
    store_fisher,
)

TRACE = {"write_fisher": True}


def _config(models: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    return {"merge_method": "squisher", "models": models, "parameters": settings}


def _assert_flat(tensor: Tensor, thetas: list[Tensor], fishers: list[Tensor], weights: tuple[float, ...]) -> None:
    """Assert that a tensor is Eq. 13 of all models where one of them has information."""
    known = torch.stack(fishers).sum(0) > 0
    reference = squisher_reference(thetas, fishers, weights)
    assert_within(tensor[known], reference[known], largest(thetas)[known], units=2)


@pytest.mark.parametrize("normalize", ["none", "auto"])
def test_a_merge_of_a_merge_is_the_flat_one(tmp_path: Path, normalize: str) -> None:
    """((A, B), C) is (A, B, C) with any weights; the second stage finds the Fisher by `fisher: auto`."""
    weights, fishers = models_with_fishers(tmp_path, 3)
    pair = _config([entry(tmp_path, 0, weight=1.5), entry(tmp_path, 1, weight=0.25)], normalize=normalize, **TRACE)
    merged(pair, tmp_path / "pair")
    config = _config([{"model": str(tmp_path / "pair")}, entry(tmp_path, 2, weight=0.5)], normalize=normalize)
    result = merged(config, tmp_path / "out")
    for name, tensor in result.items():
        _assert_flat(tensor, [model[name] for model in weights], [fisher[name] for fisher in fishers], (1.5, 0.25, 0.5))


def test_the_file_is_a_portable_fisher(tmp_path: Path) -> None:
    """The file has digests, the fingerprint of the written weights, and the sum at the scale of the merge."""
    weights, fishers = models_with_fishers(tmp_path, 2, torch.bfloat16)
    ema = {"statistic": "ema", "steps": 5, "optimizer": {"beta2": 0.9}}
    store_fisher(tmp_path / "m1", fishers[1], fingerprint(tmp_path / "m1"), **ema)
    merged(_config([entry(tmp_path, i, weight=1.0 + i, fisher_scale=0.5) for i in range(2)], **TRACE), tmp_path / "out")
    fisher = read_fisher(tmp_path / "out")
    header = read_header(tmp_path / "out" / "fisher.safetensors")
    assert set(header.digests) == set(weights[0])
    config = fisher.config
    assert (config.estimator, config.statistic, config.steps) == ("merged", "mean", None)
    assert config.weights_fingerprint == fingerprint(tmp_path / "out")
    assert config.coverage.with_ == len(weights[0])
    for name in weights[0]:
        expected = 0.5 * fishers[0][name].double() + fishers[1][name].double() / (1 - 0.9**5)
        assert_within(fisher[name], expected, expected.clamp_max(1e30))
    assert "warning" not in preview_of(tmp_path, _config([{"model": str(tmp_path / "out")}]))["text"]


def test_models_without_a_vote_leave_no_information(tmp_path: Path) -> None:
    """The Fisher of an elected or trimmed merge is that of the voters."""
    weights, fishers = base_and_models(tmp_path, 3)
    config = _config([entry(tmp_path, i) for i in (1, 2)], consensus="sign", **TRACE)
    merged(config | {"base_model": str(tmp_path / "m0")}, tmp_path / "out")
    fisher = read_fisher(tmp_path / "out")
    steps = [m[EMBEDDING].double() - weights[0][EMBEDDING].double() for m in weights[1:]]
    own = [f[EMBEDDING].double() for f in fishers[1:]]
    blank = (own[0] + own[1]) == 0
    pull = torch.where(blank, steps[0] + steps[1], own[0] * steps[0] + own[1] * steps[1])
    expected = sum(f * (d.sign() == pull.sign()) for f, d in zip(own, steps, strict=True))
    assert_within(fisher[EMBEDDING], expected, expected.clamp_max(1e30))


@pytest.mark.parametrize("structure", ["rows", "kron"])
def test_structures_write_the_diagonal(tmp_path: Path, structure: str) -> None:
    """A merge by structure writes the sum of the diagonals, trimmed where models abstain."""
    from tests.merging.votes.reference import mask_of

    weights, fishers = base_and_models(tmp_path, 3)
    models = [entry(tmp_path, i, density=0.5) for i in (1, 2)]
    config = _config(models, structure=structure, trimmed="abstain", block=8, **TRACE)
    merged(config | {"base_model": str(tmp_path / "m0")}, tmp_path / "out")
    fisher, name = read_fisher(tmp_path / "out"), "model.layers.1.mlp.up_proj.weight"
    own = [f[name].double() for f in fishers[1:]]
    expected = sum(f * mask_of(f, 0.5) for f in own)
    assert_within(fisher[name], expected, expected.clamp_max(1e30))
    assert weights


def test_gradient_matching_adds_the_base(tmp_path: Path) -> None:
    """The Fisher of `ubgm_squisher` counts the base's once."""
    _, fishers = models_with_fishers(tmp_path, 3)
    config = _config([entry(tmp_path, 0), entry(tmp_path, 1, weight=2.0), entry(tmp_path, 2)], **TRACE)
    merged(config | {"merge_method": "ubgm_squisher", "base_model": str(tmp_path / "m0")}, tmp_path / "out")
    expected = fishers[0][EMBEDDING].double() + 2 * fishers[1][EMBEDDING].double() + fishers[2][EMBEDDING].double()
    assert_within(read_fisher(tmp_path / "out")[EMBEDDING], expected, expected.clamp_max(1e30))


def test_mergekit_multi_chains(tmp_path: Path) -> None:
    """`mergekit-multi` merges the merge of an earlier document by its written Fisher."""
    from mergekit.scripts.multimerge import main

    weights, fishers = models_with_fishers(tmp_path, 3)
    first = _config([entry(tmp_path, 0), entry(tmp_path, 1)], **TRACE) | {"name": "pair"}
    second = _config([{"model": "pair"}, entry(tmp_path, 2)])
    file = tmp_path / "multi.yml"
    file.write_text(yaml.safe_dump_all([first, second]), encoding="utf-8")
    flags = ["--out-path", str(tmp_path / "out"), "--intermediate-dir", str(tmp_path / "between"), "--quiet"]
    result = CliRunner().invoke(main, [str(file), *flags, "--no-copy-tokenizer"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in found.items():
        _assert_flat(tensor, [model[name] for model in weights], [f[name] for f in fishers], (1.0, 1.0, 1.0))


def test_a_merge_without_a_fisher_says_how_to_get_one(tmp_path: Path) -> None:
    """A merge of a merge that wrote no Fisher names `write_fisher`."""
    models_with_fishers(tmp_path, 3)
    merged(_config([entry(tmp_path, 0), entry(tmp_path, 1)]), tmp_path / "pair")
    config = _config([{"model": str(tmp_path / "pair")}, entry(tmp_path, 2)])
    assert_config_refused(tmp_path / "x", config, "it is a merge", "write_fisher: true", "squisher estimate")


def test_tensors_without_fishers_are_named(tmp_path: Path) -> None:
    """The metadata say which tensors the merge gave no Fisher, and why."""
    weights, fishers = models_with_fishers(tmp_path, 2)
    store_fisher(tmp_path / "m1", {n: f for n, f in fishers[1].items() if n != EMBEDDING}, fingerprint(tmp_path / "m1"))
    merged(_config([entry(tmp_path, i) for i in range(2)], missing="average", **TRACE), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "fisher_config.json").read_text(encoding="utf-8"))
    assert config["coverage"] == {
        "with": len(weights[0]) - 1,
        "without": {EMBEDDING: "without a Fisher in some model"},
    }


def test_an_earlier_fisher_in_the_folder_is_replaced(tmp_path: Path) -> None:
    """A merge into a folder with the shards of an earlier Fisher leaves the new Fisher alone."""
    models_with_fishers(tmp_path, 2)
    out = tmp_path / "out"
    tensors = llama(out, 5)
    give_fisher(out, tensors, 5)
    (out / "fisher.safetensors").rename(out / "fisher-00001-of-00001.safetensors")
    (out / "fisher.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "fisher-00001-of-00001.safetensors")}), encoding="utf-8"
    )
    merged(_config([entry(tmp_path, i) for i in range(2)], **TRACE), out)
    assert sorted(path.name for path in out.glob("fisher*")) == ["fisher.safetensors", "fisher_config.json"]


def test_a_sum_beyond_float32_is_refused(tmp_path: Path) -> None:
    """A Fisher of the result that leaves float32 is refused in one line, and nothing stays."""
    models_with_fishers(tmp_path, 2)
    config = _config([entry(tmp_path, i, fisher_scale=1e20) for i in range(2)], **TRACE)
    assert_refused(merge(config, tmp_path / "out"), tmp_path / "out", "must stay within float32", "write_fisher")
