"""Missing, unreadable or foreign Fishers: one line, exit code 1, no output folder."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from squisher_mergekit.models.fingerprint import fingerprint
from tests.merging.reference import (
    assert_refused,
    assert_within,
    draw_fisher,
    give_fisher,
    largest,
    llama,
    merge,
    merge_raw,
    merged,
    squisher_reference,
    store_fisher,
)


def _remove_fisher(folder: Path) -> None:
    for file in folder.glob("fisher*"):
        file.unlink()


def test_no_fisher(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A folder without a Fisher or optimizer state is refused with its name and the expected files."""
    _remove_fisher(tmp_path / "m1")
    assert_refused(
        merge(pair, tmp_path / "out"), tmp_path / "out", str(tmp_path / "m1"), "optimizer.pt", "fisher: PATH"
    )


def test_a_path_that_does_not_exist(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A mistyped path is refused by name, without a look-up on the Hub."""
    pair["models"][0]["parameters"]["fisher"] = str(tmp_path / "nowhere")
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "nowhere", "working directory")


def test_names_that_do_not_fit(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A Fisher with other names than the weights is refused for any value of `missing`."""
    store_fisher(tmp_path / "other", {"encoder.weight": torch.ones(3, 5)})
    pair["models"][1]["parameters"]["fisher"] = str(tmp_path / "other")
    pair["parameters"]["missing"] = "average"
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "encoder.weight", str(tmp_path / "m1"))


def test_a_truncated_file(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A truncated Fisher is refused from its header."""
    file = tmp_path / "m0" / "fisher.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", str(file), "whole safetensors file")


def test_metadata_missing(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A Fisher without metadata is refused, because its scale is unknown."""
    (tmp_path / "m0" / "fisher_config.json").unlink()
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "fisher_config.json", str(tmp_path / "m0"))


def test_another_models_fisher_is_a_warning(
    tmp_path: Path, pair: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A Fisher with the right names, made at other weights, gives a warning that states the difference."""
    pair["models"][1]["parameters"]["fisher"] = str(tmp_path / "m0")
    assert merge(pair, tmp_path / "out").exit_code == 0
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    (warning,) = [text for text in warnings if "no digests" not in text]
    assert str(tmp_path / "m1") in warning
    assert "same names, shapes and dtypes, but other values" in warning


def test_a_fisher_that_is_0_everywhere(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A Fisher without any positive entry would leave its model out in silence; one entry is enough."""
    tensors = {name: torch.zeros_like(tensor) for name, tensor in _weights(tmp_path / "m1").items()}
    store_fisher(tmp_path / "zero", tensors)
    pair["models"][1]["parameters"]["fisher"] = str(tmp_path / "zero")
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "is 0 everywhere", str(tmp_path / "m1"))
    tensors["model.layers.0.mlp.up_proj.weight"][2, 3] = 1e-9
    store_fisher(tmp_path / "one", tensors)
    pair["models"][1]["parameters"]["fisher"] = str(tmp_path / "one")
    assert merge(pair, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int8])
def test_quantised_weights(tmp_path: Path, pair: dict[str, Any], dtype: torch.dtype) -> None:
    """Weights in float8 or packed integers are refused while planning."""
    file = tmp_path / "m0" / "model.safetensors"
    tensors = _weights(tmp_path / "m0")
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].to(dtype)
    save_file(tensors, file, {"format": "pt"})
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", str(dtype)[6:], "before it was quantised")


@pytest.mark.parametrize(
    ("method", "listed", "cure"),
    [
        ("squisher", True, "out of models:"),
        ("ubgm_squisher", False, "under models: with parameters: {fisher: none}"),
        ("ubgm_squisher", True, "fisher: none"),
    ],
)
def test_a_base_without_a_fisher(tmp_path: Path, pair: dict[str, Any], method: str, listed: bool, cure: str) -> None:
    """The cure for a base is another than for a model, and differs between the methods."""
    llama(tmp_path / "base", 5)
    models = [*([{"model": str(tmp_path / "base")}] if listed else []), *pair["models"]]
    config = {"merge_method": method, "base_model": str(tmp_path / "base"), "models": models}
    assert_refused(merge(config, tmp_path / "out"), tmp_path / "out", f"no Fisher for {tmp_path / 'base'}", cure)


def test_a_merge_has_no_fisher(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A model that is a merge is refused as one, with the ways to go on."""
    assert merge(pair, tmp_path / "first", "--write-model-card").exit_code == 0
    pair["models"][0]["model"] = str(tmp_path / "first")
    words = ("a merge has no Fisher", "merge all models in one configuration", "squisher estimate")
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", *words)


@pytest.mark.parametrize("given", [True, False])
def test_the_checkpoint_of_a_run_with_the_models_weights(tmp_path: Path, pair: dict[str, Any], given: bool) -> None:
    """Of a run's checkpoints the one with the model's own weights gives the Fisher, named or by auto, newest or not."""
    reference = merged(pair, tmp_path / "plain")
    run = tmp_path / "m0"
    for step, seed in ((2, 0), (9, 4)):
        give_fisher(run / f"checkpoint-{step}", llama(run / f"checkpoint-{step}", seed), seed)
    _remove_fisher(run)
    if given:
        pair["models"][0]["parameters"]["fisher"] = str(run)
    found = merged(pair, tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in reference.items())


def test_adapters_merge_by_their_own_fishers(tmp_path: Path) -> None:
    """Fishers of adapters weigh the adapters' own files, entry by entry; of full weights they are refused."""
    names = [f"base_model.model.layers.{i}.q_proj.lora_{side}.weight" for i in range(2) for side in "AB"]
    generator = torch.Generator().manual_seed(3)
    entries, weights, fishers = [], [], []
    for i in range(2):
        tensors = {name: torch.randn(5, 7, generator=generator) for name in names}
        fisher = {name: draw_fisher([5, 7], generator) for name in names}
        (tmp_path / f"l{i}").mkdir()
        file = tmp_path / f"l{i}" / "adapter_model.safetensors"
        save_file(tensors, file, {"format": "pt"})
        store_fisher(tmp_path / f"f{i}", fisher, fingerprint(file), parameters="adapter")
        entries.append({"model": str(file), "parameters": {"fisher": str(tmp_path / f"f{i}")}})
        weights.append(tensors)
        fishers.append(fisher)
    result = merge_raw(tmp_path, {"merge_method": "squisher", "models": entries})
    assert result.exit_code == 0, result.output
    found = load_file(next((tmp_path / "out").glob("*.safetensors")))
    for name in names:
        thetas = [tensors[name] for tensors in weights]
        assert_within(found[name], squisher_reference(thetas, [f[name] for f in fishers], [1.0, 1.0]), largest(thetas))


@pytest.mark.parametrize("kind", ["lora_A", "lora_embedding_B"])
def test_a_merge_of_a_and_b_entry_by_entry_is_warned_of(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """``mergekit-pytorch`` merges A and B apart; the warning says what that needs, and names the other way."""
    name, entries = f"base_model.model.layers.1.up_proj.{kind}.weight", []
    for i in range(2):
        (tmp_path / f"l{i}").mkdir()
        file = tmp_path / f"l{i}" / "adapter_model.safetensors"
        save_file({name: torch.full((3, 4), float(i))}, file, {"format": "pt"})
        store_fisher(tmp_path / f"f{i}", {name: torch.ones(3, 4)}, fingerprint(file), parameters="adapter")
        entries.append({"model": str(file), "parameters": {"fisher": str(tmp_path / f"f{i}")}})
    with caplog.at_level(logging.WARNING, "squisher_mergekit"):
        result = merge_raw(tmp_path, {"merge_method": "squisher", "models": entries})
    assert result.exit_code == 0, result.output
    warned = [record.message for record in caplog.records if "one draw of A" in record.message]
    assert len(warned) == 2
    assert all("model: BASE+ADAPTER" in message for message in warned)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
