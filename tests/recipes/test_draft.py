"""Drafts of merges: YAML that the plan accepts, with what it found."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from squisher_mergekit.errors import SquisherError
from squisher_mergekit.merging.mergekit.commands import plan_config, read_config
from squisher_mergekit.recipes.draft import draft
from tests.adapters import train
from tests.merging.models import base_and_models
from tests.merging.reference import give_fisher, llama


@pytest.fixture
def three(tmp_path):
    """Return the folders of a base without a Fisher, and of two models with one."""
    base_and_models(tmp_path, 3)
    return [str(tmp_path / f"m{i}") for i in range(3)]


@pytest.mark.parametrize("structure", [None, "rows", "columns", "kron"])
def test_a_draft_is_accepted_and_states_what_it_found(three, structure):
    """The plan accepts the draft, whose comments name source, coverage and the need of a base."""
    base, *models = three
    text = draft(models, base if structure else None, structure=structure)
    assert plan_config(read_config(text))["fallbacks"] == {}
    parsed = yaml.safe_load(text)
    assert [item["model"] for item in parsed["models"]] == models
    assert parsed["parameters"].get("structure") == structure
    assert text.count("covers 100.0% of the entries") == 2
    assert ("needed by ubgm_squisher, density and structure" in text) == (structure is None)


def test_uncertainty_matching_has_its_base_and_prior(three):
    """The other method has a base, listed without a Fisher where none is found, and its prior is stated."""
    base, *models = three
    text = draft(models, base, "ubgm_squisher")
    plan_config(read_config(text))
    parsed = yaml.safe_load(text)
    assert [item["model"] for item in parsed["models"]] == [*models, base]
    assert parsed["models"][-1]["parameters"] == {"fisher": "none"}
    give_fisher(Path(base), _weights(base), 9)
    parsed = yaml.safe_load(draft(models, base, "ubgm_squisher"))
    assert (parsed["base_model"], parsed["parameters"]["prior"]) == (base, 0.0)
    assert [item["model"] for item in parsed["models"]] == models


def test_a_model_without_a_fisher_is_refused_beside_a_bare_base(three):
    """The refusal names the model, not the base, which needs none."""
    base, *models = three
    (Path(models[0]) / "fisher.safetensors").unlink()
    with pytest.raises(SquisherError, match=f"no Fisher for .*{Path(models[0]).name}"):
        draft(models, base, "ubgm_squisher")


def _weights(folder):
    return load_file(f"{folder}/model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": "rows"}, "base_model"),
        ({"method": "ubgm_squisher"}, "base_model"),
        ({"models": ["some/where/else"]}, "some/where/else"),
    ],
)
def test_a_draft_refuses_what_the_plan_refuses(three, changes, message):
    """A missing base and a missing folder are refused in one line."""
    given = {"models": three[1:], **changes}
    with pytest.raises(SquisherError, match=message) as found:
        draft(given.pop("models"), **given)
    assert "\n" not in str(found.value)


def test_the_dtype_is_that_of_the_models(tmp_path):
    """Models of one dtype keep it; with two dtypes the output is float32, and the draft says so."""
    for i, dtype in enumerate((torch.bfloat16, torch.bfloat16, torch.float16)):
        give_fisher(tmp_path / f"m{i}", llama(tmp_path / f"m{i}", i, dtype), i)
    paths = [str(tmp_path / f"m{i}") for i in range(3)]
    assert "dtype: bfloat16  # that of the models" in draft(paths[:2])
    assert "dtype: float32  # the models have bfloat16, float16" in draft(paths)


def test_a_path_with_special_characters_stays_one_line_of_yaml(tmp_path):
    """A colon, a hash and a space in a path are quoted."""
    folder = tmp_path / "a: b #1"
    give_fisher(folder, llama(folder, 0), 0)
    other = tmp_path / "c"
    give_fisher(other, llama(other, 1), 1)
    parsed = yaml.safe_load(draft([str(folder), str(other)]))
    assert parsed["models"][0]["model"] == str(folder)


def test_a_run_is_drafted_with_the_fisher_of_its_checkpoint(tmp_path):
    """The folder of a run stands in the draft as given, with the dtype and the Fisher of its last checkpoint."""
    for i, run in enumerate("ab"):
        folder = tmp_path / run / "checkpoint-3"
        give_fisher(folder, llama(folder, i, torch.bfloat16), i)
    text = draft([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [item["model"] for item in yaml.safe_load(text)["models"]] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert text.count("covers 100.0% of the entries") == 2
    assert "dtype: bfloat16  # that of the models" in text


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call
def test_loras_are_drafted_with_their_lifted_fishers(tmp_path):
    """A draft of LoRAs names them as given, states the lifted Fishers, and is planned."""
    for i in range(2):
        train(tmp_path / f"l{i}", "llama", seed=i)
    (tmp_path / "l0" / "base").rename(tmp_path / "base")
    models = [f"{tmp_path / 'base'}+{tmp_path / f'l{i}' / 'adapter'}" for i in range(2)]
    text = draft(models)
    assert text.count("lifted_lora") == 2
    assert [item["model"] for item in yaml.safe_load(text)["models"]] == models
    assert plan_config(read_config(text))["fallbacks"] == {}
