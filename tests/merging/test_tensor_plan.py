"""Refused plans of single tensors: one line, exit code 1, no output folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from squisher_mergekit.cli.merge import command as merge_command
from tests.merging.models import base_and_models, base_without_norm, density_config
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


def test_weights_all_zero(tmp_path: Path, pair: dict[str, Any]) -> None:
    """Weights that are all 0 are refused with the name of a tensor."""
    for model in pair["models"]:
        model["parameters"]["weight"] = 0.0
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "must not all be 0", "model.embed_tokens.weight")


def test_fisher_none_outside_a_base(tmp_path: Path, pair: dict[str, Any]) -> None:
    """`fisher: none` is valid for the base of UBGM and with a structure, not for a diagonal merge."""
    pair["models"][0]["parameters"]["fisher"] = "none"
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "base of ubgm_squisher alone")


def test_shapes_that_do_not_fit(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A Fisher of another size is refused with the tensor and both shapes."""
    wide = llama(tmp_path / "wide", 5, intermediate_size=19)
    give_fisher(tmp_path / "wide", wide, 5)
    pair["models"][1]["parameters"]["fisher"] = str(tmp_path / "wide")
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "[17, 33]", "[19, 33]", "mlp")


def test_steps_unknown(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A moving average with unknown steps cannot be debiased. It is refused with `scaling: raw` as the cure."""
    weights = llama(tmp_path / "m0", 0)
    store_fisher(tmp_path / "m0", weights, statistic="ema", optimizer={"beta2": 0.999})
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "steps", "scaling: raw")


def _no_base(root: Path, config: dict[str, Any]) -> None:
    del config["base_model"]


def _base_of_another_shape(root: Path, config: dict[str, Any]) -> None:
    llama(root / "m0", 0, intermediate_size=19)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_no_base, ["density below 1 needs base_model:", "density 0.5 of", "m1", "add it"]),
        (base_without_norm, ["every tensor", "m0 has no model.norm.weight", "density: 1"]),
        (_base_of_another_shape, ["shaped as in the base_model:", "mlp", "[17, 33]", "[19, 33]", "m0"]),
    ],
    ids=["none", "lacking", "shape"],
)
def test_a_base_that_cannot_serve(tmp_path: Path, spoil: Callable[..., None], words: list[str]) -> None:
    """A missing base, a base without a tensor, and one of another shape are refused from headers, before any output."""
    base_and_models(tmp_path, 3)
    config = density_config(tmp_path, [0.5, 1.0])
    spoil(tmp_path, config)
    assert_config_refused(tmp_path, config, *words)


def test_a_base_may_lack_tensors_without_a_choice(tmp_path: Path) -> None:
    """A base may lack a tensor if density is 1 there, or if the models with a density have weight 0."""
    base_and_models(tmp_path, 3)
    base_without_norm(tmp_path, {})
    shares = [{"filter": "norm", "value": 1.0}, {"value": 0.5}]
    assert merge(density_config(tmp_path, [shares, 1.0]), tmp_path / "out").exit_code == 0
    config = density_config(tmp_path, [0.5, 1.0])
    config["models"][0]["parameters"]["weight"] = 0.0
    assert merge(config, tmp_path / "out2").exit_code == 0


@pytest.mark.parametrize(
    ("changes", "cure"),
    [({"vocab_size": 31}, "tokenizer: {source: union}"), ({"intermediate_size": 19}, "one architecture and size")],
)
def test_models_of_different_shapes(tmp_path: Path, pair: dict[str, Any], changes: dict[str, int], cure: str) -> None:
    """Headers show shapes that differ: the plan refuses them, with the cure for vocabularies and for other tensors."""
    give_fisher(tmp_path / "m1", llama(tmp_path / "m1", 1, **changes), 1)
    assert_config_refused(tmp_path, pair, "one shape in all models", str(tmp_path / "m1"), cure)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_that_grew_after_training(tmp_path: Path, tied: bool) -> None:
    """A Fisher without the last rows of a vocabulary counts 0 there, with a warning; other rows merge as before."""
    weights = [llama(tmp_path / f"m{i}", i, vocab_size=31, tie_word_embeddings=tied) for i in range(2)]
    fishers = [give_fisher(tmp_path / f"m{i}", tensors, i) for i, tensors in enumerate(weights)]
    grown = {name: tensor[:29] if tensor.shape[0] == 31 else tensor for name, tensor in fishers[0].items()}
    store_fisher(tmp_path / "m0", grown)
    config = {"merge_method": "squisher", "models": [{"model": str(tmp_path / f"m{i}")} for i in range(2)]}
    assert "count as unseen (F = 0)" in " ".join(preview_of(tmp_path, config)["warnings"])
    found = merged(config, tmp_path / "out")
    for name, tensor in found.items():
        thetas, padded = [w[name] for w in weights], torch.zeros_like(fishers[0][name])
        padded[: len(grown[name])] = grown[name]
        reference = squisher_reference(thetas, [padded, fishers[1][name]], [1.0, 1.0])
        assert_within(tensor, reference, largest(thetas))


@pytest.mark.parametrize(
    ("name", "rows"),
    [("model.embed_tokens.weight", 35), ("lm_head.weight", 30), ("model.layers.0.mlp.up_proj.weight", -1)],
)
def test_rows_that_no_vocabulary_gained_are_refused(tmp_path: Path, pair: dict[str, Any], name: str, rows: int) -> None:
    """A Fisher with more rows than the vocabulary, or one row short elsewhere, belongs to another model."""
    weights = llama(tmp_path / "m0", 0)
    fisher = {each: torch.ones_like(tensor) for each, tensor in weights.items()}
    size = rows if rows > 0 else len(fisher[name]) + rows
    fisher[name] = torch.ones(size, *fisher[name].shape[1:])
    store_fisher(tmp_path / "m0", fisher)
    assert_config_refused(tmp_path, pair, name, "must have the weight's shape")


def test_strict_refuses_embeddings_that_grew(tmp_path: Path) -> None:
    """Under ``--strict`` the warning about new rows is an error, also where no fingerprint tells."""
    weights = [llama(tmp_path / f"m{i}", i) for i in range(2)]
    for i, tensors in enumerate(weights):
        short = {name: torch.ones_like(t)[: 27 if t.shape[0] == 29 else None] for name, t in tensors.items()}
        store_fisher(tmp_path / f"m{i}", short)
    config = {"merge_method": "squisher", "models": [{"model": str(tmp_path / f"m{i}")} for i in range(2)]}
    file = tmp_path / "c.yml"
    file.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(merge_command, [str(file), str(tmp_path / "out"), "--strict", "--no-copy-tokenizer"])
    assert_refused(result, tmp_path / "out", "count as unseen (F = 0)", "without --strict")
