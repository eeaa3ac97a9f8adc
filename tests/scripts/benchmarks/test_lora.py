"""The benchmark of merges of LoRAs: its adapters, its commands and its verdicts."""

import json

import pytest

from scripts.benchmarks import lora
from squisher_mergekit import load_fisher
from tests.estimators.models import make

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call


def test_an_adapter_has_the_state_that_its_run_would_leave(tmp_path):
    """Its Fisher can be lifted, and the commands name base and adapter."""
    make("llama").save_pretrained(tmp_path / lora.BASE)
    lora.make_adapter(lora.ADAPTERS[0], tmp_path, rank=2)
    fisher = load_fisher(tmp_path / lora.ADAPTERS[0], base=tmp_path / lora.BASE, lift=True)
    assert fisher.config.steps == lora.STEPS
    assert "model.layers.0.self_attn.q_proj.weight" in fisher
    command = lora.command(lora.LIFTED, tmp_path)
    assert "--lora-merge-cache" not in command
    assert "--lora-merge-cache" in lora.command(lora.LINEAR, tmp_path)
    models = json.loads((tmp_path / "squisher_lora.yml").read_text())["models"]
    assert models[0]["model"] == f"{tmp_path / lora.BASE}+{tmp_path / lora.ADAPTERS[0]}"


@pytest.mark.parametrize(
    ("cpu", "memory", "verdicts"), [(11.0, 1.1, ["met", "met"]), (13.0, 1.3, ["missed", "missed"])]
)
def test_the_lines_have_the_verdicts(cpu, memory, verdicts):
    """The lifted merge is compared with both ways of mergekit, by the minima of the rounds."""
    run = {"cpu_s": 10.0, "anonymous_gb": 1.0}
    samples = {lora.LINEAR: [run], lora.COPIES: [run], lora.LIFTED: [{"cpu_s": cpu, "anonymous_gb": memory}]}
    report = {"parameters": 3e8, "rank": 16, "samples": samples, "load_average": [1.0, 2.0]}
    found = [line for line in lora.lines(report) if line.startswith("squisher against")]
    assert len(found) == 2
    for line in found:
        assert [word.strip("),") for word in line.split() if word.strip("),") in ("met", "missed")] == verdicts
