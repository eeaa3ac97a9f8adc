"""Merges by mergekit's functions: ``--as-adapter``, models that the Hub cannot give, cards without the Hub."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from squisher_mergekit.cli.merge import command
from squisher_mergekit.merging.mergekit import commands
from tests.adapters import train
from tests.merging.reference import assert_config_refused, assert_refused, give_fisher, llama, merge, merged

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call


def _config(root: Path, *loras: dict[str, Any], **options: Any) -> dict[str, Any]:
    for i, lora in enumerate(loras):
        train(root / f"l{i}", seed=i, **options, **lora)
    base = root / "l0" / "base"
    models = [{"model": f"{base}+{root / f'l{i}' / 'adapter'}"} for i in range(len(loras))]
    return {"merge_method": "squisher", "models": models}


def _run(root: Path, config: dict[str, Any], *options: Any) -> Result:
    file = root / "merge.yml"
    file.write_text(yaml.safe_dump(config))
    return CliRunner().invoke(command, [str(file), str(root / "out"), *map(str, options)])


def _loaded(root: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the base with the written adapter, merged by peft in float32."""
    base = transformers.LlamaForCausalLM.from_pretrained(root / "l0" / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, root / "out")
    model.merge_and_unload().save_pretrained(root / "loaded")
    return load_file(root / "loaded" / "model.safetensors")


@pytest.mark.parametrize("rank", [1, 4, None])
def test_the_adapter_is_the_merged_model_within_the_stated_error(tmp_path: Path, rank: int | None) -> None:
    """For each tensor, the squared distance from the merged model is the discarded share of the change."""
    config = _config(tmp_path, {}, {"r": 2, "use_rslora": True})
    full, base = merged(config, tmp_path / "full"), load_file(tmp_path / "l0" / "base" / "model.safetensors")
    options = [] if rank is None else ["--rank", rank]
    result = _run(tmp_path, config, "--as-adapter", *options, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    report, found = json.loads((tmp_path / "report.json").read_text())["adapter"], _loaded(tmp_path)
    assert report["rank"] == (rank or 5)
    for name, tensor in found.items():
        if name not in report["modules"]:
            assert torch.equal(tensor, base[name])
            continue
        lost = (tensor.double() - full[name].double()).square().sum().item()
        energy = (full[name].double() - base[name].double()).square().sum().item()
        assert lost / energy == pytest.approx(report["modules"][name]["discarded"], abs=1e-6)
    assert f"written as an adapter of rank {rank or 5} for 6 tensors, which discards" in result.output


def test_a_base_of_bfloat16_does_not_round_the_change(tmp_path: Path) -> None:
    """The merge runs in float32, so that a rank above both LoRAs' keeps nearly all of the change."""
    config = _config(tmp_path, {}, {}, dtype=torch.bfloat16)
    result = _run(tmp_path, config, "--as-adapter", "--rank", 12, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "report.json").read_text())["adapter"]["discarded"] < 1e-9


def test_the_folder_has_the_files_of_an_adapter_alone(tmp_path: Path) -> None:
    """No weights of a full model are left, and the card names the Fishers."""
    config = _config(tmp_path, {}, {})
    assert _run(tmp_path, config, "--as-adapter").exit_code == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md", "mergekit_config.yml"}
    assert "lifted_lora" in (tmp_path / "out" / "README.md").read_text()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".out", "out."))]


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_full_model_is_refused(tmp_path: Path, place: str) -> None:
    """The change of a full model has no low rank."""
    config = _config(tmp_path, {})
    config["models"].insert(0 if place == "first" else 1, {"model": str(tmp_path / "l0" / "base")})
    assert_refused(_run(tmp_path, config, "--as-adapter"), tmp_path / "out", "--as-adapter needs LoRAs", "full model")


def test_different_kinds_of_biases_are_refused_before_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configs of the adapters tell that they cannot be one adapter, so that no merge runs for nothing."""
    config = _config(tmp_path, {}, {"bias": "lora_only"})
    monkeypatch.setattr(commands, "run_config", lambda *_, **__: pytest.fail("the merge has begun"))
    assert_refused(_run(tmp_path, config, "--as-adapter"), tmp_path / "out", "must train one kind of biases")


def test_a_rank_without_an_adapter_is_refused(tmp_path: Path) -> None:
    """``--rank`` alone has no meaning."""
    config = {"merge_method": "squisher", "models": [{"model": "org/a"}]}
    assert_refused(_run(tmp_path, config, "--rank", 4), tmp_path / "out", "--rank needs --as-adapter")


@pytest.mark.parametrize("form", ["the base of a LoRA", "a full model"])
def test_a_model_that_the_hub_cannot_give_is_named(tmp_path: Path, form: str) -> None:
    """The refusal names the model, the reason of the Hub, and BASE+ADAPTER as a cure."""
    config = _config(tmp_path, {})
    if form == "a full model":
        config["models"].append({"model": "nobody/weights"})
    else:
        file = tmp_path / "l0" / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "nobody/weights"}))
        config["models"].append({"model": str(file.parent)})
    words = ["there is no folder nobody/weights, and of the Hub:", "download the model first", "BASE+ADAPTER"]
    assert_config_refused(tmp_path, config, *words)


@pytest.mark.parametrize("name", ["model", "models/one"])
def test_stock_mergekit_yaml_needs_no_hub_for_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The card asks the Hub about a relative folder; without an answer, it has no links."""

    class UnreachableError(Exception):
        """Error of the Hub's client."""

    def unreachable(*args: object, **kwargs: object) -> bool:
        raise UnreachableError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.repo_exists", unreachable)
    for i, folder in enumerate((Path(name), Path("other"))):
        give_fisher(folder, llama(folder, i), i)
    config = {"merge_method": "squisher", "models": [{"model": name}, {"model": "other"}]}
    result = merge(config, tmp_path / "out")
    assert result.exit_code == 0, result.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# out" in card
    assert f"model: {name}" in card
    assert (tmp_path / "out" / "mergekit_config.yml").is_file()
