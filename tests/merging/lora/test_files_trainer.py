"""Whole path of two LoRA runs of the Hugging Face Trainer with peft: plan, stock mergekit-yaml, and --as-adapter."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file
from torch import Tensor

from squisher_mergekit import load_fisher
from squisher_mergekit.cli.main import main
from tests.merging.reference import Tensors, assert_config_refused, assert_within, largest, squisher_reference
from tests.readme_world import STEPS, arguments, fresh, rows, tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft's call
]

LORAS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "up_proj"]},
    {"r": 3, "use_rslora": True, "target_modules": ["q_proj", "o_proj", "up_proj"]},
]
SCALES = (6 / 4, 8 / 3**0.5)
KEPT = {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base and two runs, whose last checkpoints have the files that a merge reads alone."""
    root = tmp_path_factory.mktemp("runs")
    fresh("llama").save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    for i, lora in enumerate(LORAS):
        transformers.set_seed(i)
        model = peft.get_peft_model(
            transformers.LlamaForCausalLM.from_pretrained(root / "base"), peft.LoraConfig(**lora)
        )
        trainer = transformers.Trainer(model, arguments(root / f"run{i}"), train_dataset=rows("llama", i))
        trainer.train()
        trainer.save_model()
        for path in (root / f"run{i}" / f"checkpoint-{STEPS}").iterdir():
            if path.name not in KEPT:
                path.unlink()
    return root


def _names(root: Path) -> list[str]:
    """Return the models of the merge: base with a checkpoint, and the final folder of a run."""
    return [f"{root / 'base'}+{root / 'run0' / f'checkpoint-{STEPS}'}", str(root / "run1")]


def _config(root: Path) -> dict[str, Any]:
    return {"merge_method": "squisher", "models": [{"model": name} for name in _names(root)]}


def _run(command: Any, *words: object) -> str:
    result = CliRunner().invoke(command, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def _merged_weights(root: Path, i: int) -> tuple[Tensors, dict[str, Tensor]]:
    """Return W0 + s B A in float64, and the lifted Fisher, of the wrapped weights of a run."""
    base = load_file(root / "base" / "model.safetensors")
    adapter = load_file(root / f"run{i}" / "adapter_model.safetensors")
    fisher = load_fisher(root / f"run{i}" / f"checkpoint-{STEPS}", base=root / "base", lift=True)
    thetas = {}
    for name in fisher:
        a, b = (adapter[f"base_model.model.{name[:-6]}lora_{part}.weight"].double() for part in "AB")
        thetas[name] = base[name].double() + SCALES[i] * b @ a
    return thetas, {name: fisher[name] for name in fisher}


def test_the_whole_path(runs: Path, tmp_path: Path) -> None:
    """plan, mergekit-yaml and --as-adapter work on what the Trainer left; both results are Eq. 13 on W0 + s B A."""
    file = tmp_path / "lora.yml"
    file.write_text(yaml.safe_dump(_config(runs)))
    text = _run(main, "plan", file)
    assert text.count("lifted_lora") == 2
    assert "all needed Fishers are complete" in text
    _run(mergekit_yaml, file, tmp_path / "merged")
    found, base = load_file(tmp_path / "merged" / "model.safetensors"), load_file(runs / "base" / "model.safetensors")
    parts = [_merged_weights(runs, i) for i in range(2)]
    wanted = {
        name: squisher_reference([p[0][name] for p in parts], [p[1][name] for p in parts], [1.0, 1.0])
        for name in parts[0][0]
    }
    assert len(wanted) == 6
    for name, tensor in found.items():
        if name in wanted:
            assert_within(tensor, wanted[name], largest([thetas[name] for thetas, _ in parts]))
        else:
            assert torch.equal(tensor, base[name])
    # Weights that differ by entry make the rank of the merged delta larger than the sum of the ranks.
    discarded = []
    for rank in (67, None, 2):
        out, report = tmp_path / f"adapter{rank}", tmp_path / f"report{rank}.json"
        _run(main, "merge", file, out, "--as-adapter", *(["--rank", rank] if rank else []), "--json", report)
        stated = json.loads(report.read_text())["adapter"]
        model = transformers.LlamaForCausalLM.from_pretrained(runs / "base")
        state = peft.PeftModel.from_pretrained(model, out).merge_and_unload().state_dict()
        lost = {name: (state[name].double() - value).square().sum().item() for name, value in wanted.items()}
        whole = {name: (value - base[name].double()).square().sum().item() for name, value in wanted.items()}
        for name, module in stated["modules"].items():
            assert lost[name] / whole[name] == pytest.approx(module["discarded"], rel=1e-3, abs=1e-8), name
        discarded.append(stated["discarded"])
    whole_rank, of_ranks, of_two = discarded
    assert whole_rank < 1e-10 < of_ranks < 0.05 < of_two < 1


def test_a_final_folder_of_other_weights_names_the_checkpoints(runs: Path, tmp_path: Path) -> None:
    """The weights of a later step have no optimizer state: the refusal names the checkpoints to merge instead."""
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(runs / "run1", tmp_path / "run1")
    later = load_file(tmp_path / "run1" / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in later.items()}, tmp_path / "run1" / "adapter_model.safetensors")
    config = _config(runs)
    config["models"][1]["model"] = str(tmp_path / "run1")
    words = ["its weights are those of none of its checkpoints", f"checkpoint-{STEPS}", "merge one of them instead"]
    assert_config_refused(tmp_path, config, *words)


def test_a_checkpoint_without_weights_is_named_as_fisher(runs: Path, tmp_path: Path) -> None:
    """FSDP in shards leaves no adapter beside the state: the refusal names it as fisher:, and the merge takes it."""
    import shutil

    shutil.copytree(runs / "run1", tmp_path / "run1")
    last = tmp_path / "run1" / f"checkpoint-{STEPS}"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (last / name).unlink()
    config = _config(runs)
    config["models"][1] = {"model": str(tmp_path / "run1")}
    assert_config_refused(tmp_path, config, "no safetensors to compare", f"give it fisher: {last}")
    config["models"][1]["parameters"] = {"fisher": str(last)}
    file = tmp_path / "named.yml"
    file.write_text(yaml.safe_dump(config))
    assert "all needed Fishers are complete" in _run(main, "plan", file)
