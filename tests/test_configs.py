"""Examples in configs/, loaded and planned."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from squisher_mergekit.merging.parameters import METHODS, PARAMETERS
from tests.adapters import train
from tests.merging.reference import Tensors, give_fisher, llama

CONFIGS = Path(__file__).parent.parent / "configs"
README = (CONFIGS / "README.md").read_text(encoding="utf-8")
LOCAL = [path for path in sorted(CONFIGS.glob("*.yml")) if path.name != "hub.yml"]


def _model(folder: Path, seed: int, fisher: Path | None = None) -> Tensors:
    weights = llama(folder, seed)
    give_fisher(folder, weights, seed, out=fisher)
    vocabulary = {"<unk>": 0} | {f"word{seed + number}": number for number in range(1, 29)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return weights


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call
@pytest.mark.parametrize("config", LOCAL, ids=lambda path: path.stem)
def test_a_config_is_planned(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`squisher plan` accepts the example with every model covered, if the named folders exist."""
    from squisher_mergekit.cli.plan import command

    for seed, name in enumerate(("base", "sentiment", "topics")):
        weights = _model(tmp_path / "runs" / name / "checkpoint-500", seed)
        if name == "base":
            published = tmp_path / "published" / name
            give_fisher(tmp_path / "runs" / name / "checkpoint-500", weights, seed + 10, out=published)
        if name != "base":
            _model(tmp_path / "models" / name, seed, fisher=tmp_path / "fishers" / name)
    _adapters(tmp_path, config)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command, [str(config)])
    assert result.exit_code == 0, result.output
    assert "all needed Fishers are complete" in result.output
    assert result.output.count("covers 100.0%") == len({*_models(config)})


def _adapters(folder: Path, config: Path) -> None:
    """Make the adapters that a recipe names, and their base."""
    names = re.findall(r"\badapters/(\w+)/checkpoint-500", config.read_text(encoding="utf-8"))
    for seed, name in enumerate(dict.fromkeys(names)):
        train(folder / name, seed=seed)
        (folder / name / "adapter").rename(folder / name / "checkpoint-500")
        file = folder / name / "checkpoint-500" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "base"}))
        shutil.copytree(folder / name / "base", folder / "base", dirs_exist_ok=True)
        (folder / "adapters").mkdir(exist_ok=True)
        (folder / name).rename(folder / "adapters" / name)


def _models(config: Path) -> list[str]:
    data = yaml.safe_load(config.read_text(encoding="utf-8"))
    sources = [source for piece in data.get("slices", []) for source in piece["sources"]]
    return [entry["model"] for entry in data.get("models", sources)]


def _publish(cache: Path, repo: str, revision: str, files: Path, patterns: list[str]) -> None:
    """Copy files into a Hub cache in the layout of a download."""
    root = cache / f"models--{repo.replace('/', '--')}"
    commit = {"main": "a" * 40, "fisher": "b" * 40}[revision]
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit, encoding="utf-8")
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for pattern in patterns:
        for file in files.glob(pattern):
            shutil.copy(file, snapshot)


def test_the_hub_config_is_planned_from_a_cache(tmp_path: Path) -> None:
    """Hub ids resolve to Fishers in their own revision, named or found by `auto`, from a cache without network."""
    cache = tmp_path / "hub"
    for seed, name in enumerate(("sentiment", "topics")):
        _model(tmp_path / name, seed)
        _publish(cache, f"example-org/{name}", "main", tmp_path / name, ["model.safetensors", "config.json"])
        _publish(cache, f"example-org/{name}", "fisher", tmp_path / name, ["fisher*"])
    # mergekit lists a repository over the network even when it is cached; the script answers that call.
    script = (
        "import huggingface_hub\n"
        "huggingface_hub.list_repo_files = lambda *a, **k: ['model.safetensors']\n"
        "from squisher_mergekit.cli.plan import command\n"
        f"command(['{CONFIGS / 'hub.yml'}'])\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("covers 100.0%") == 2
    assert done.stdout.count("@" + "b" * 40) == 2


def test_the_table_of_parameters_agrees_with_the_code() -> None:
    """configs/README.md has every parameter in order, with its place and its default."""
    rows = re.findall(r"^\| `(\w+)` \| ((?:per model|global)[^|]*) \| `([^`]+)` \|", README, flags=re.MULTILINE)
    expected = []
    for parameter in PARAMETERS:
        only = "" if parameter.methods == METHODS else f", `{', '.join(parameter.methods)}`"
        default = str(parameter.default)
        expected.append((parameter.name, ("per model" if parameter.per_model else "global") + only, default))
    assert rows == expected


def test_every_recipe_is_listed() -> None:
    """The table of recipes in configs/README.md links to each YAML file of the folder once."""
    assert sorted(re.findall(r"^\| \[([\w.]+)\]\(\1\) \|", README, flags=re.MULTILINE)) == sorted(
        path.name for path in CONFIGS.glob("*.yml")
    )
