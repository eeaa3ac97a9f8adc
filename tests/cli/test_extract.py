"""``squisher extract`` as a command: output, report and refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from squisher_mergekit.cli.main import main
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.optimizers import load
from tests.adapters import train

STATES = Path(__file__).parents[1] / "fixtures" / "optimizer_states"


def _run(*arguments):
    return CliRunner().invoke(main, ["extract", *map(str, arguments)])


def test_a_checkpoint_becomes_a_fisher(tmp_path):
    """Tensors equal the accumulators bit for bit. The report has source, optimizer, steps and coverage."""
    result = _run(STATES / "trainer_llama_decay", "-o", tmp_path / "out", "--quiet", "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    expected = load_file(STATES / "trainer_llama_decay" / "expected.safetensors")
    written = load_file(tmp_path / "out" / "fisher.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    for words in ("transformers-trainer: optimizer.pt", "torch.optim.AdamW, beta2 0.99", "steps      5", "21 tensors"):
        assert words in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["config"] == json.loads((tmp_path / "out" / "fisher_config.json").read_text())
    assert report["bytes"] == sum(tensor.numel() * 4 for tensor in expected.values())


def test_numbers_of_the_run_are_recorded(tmp_path):
    """The metadata has examples per step, tokens per step and the dtype."""
    options = ["--examples-per-step", 64, "--tokens-per-step", 32768, "--dtype", "bfloat16", "--quiet"]
    result = _run(STATES / "plain_adam", "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    fisher = read_fisher(tmp_path / "out")
    assert (fisher.config.examples_per_step, fisher.config.tokens_per_step) == (64, 32768)
    expected = load_file(STATES / "plain_adam" / "expected.safetensors")
    assert all(torch.equal(fisher[name], expected[name].bfloat16()) for name in expected)


def test_a_partial_fisher_is_no_failure(tmp_path):
    """With --base, frozen layers of GPT-2 are listed, and the exit code is 0."""
    checkpoint = STATES / "trainer_gpt2_tied_frozen"
    result = _run(checkpoint, "--base", checkpoint / "base", "-o", tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    assert "15 tensors with a Fisher, 14 without" in result.output
    assert "tied to transformer.wte.weight:\n    lm_head.weight\n" in result.output
    assert "    transformer.h.0.attn.c_attn.weight\n" in result.output


def test_model_and_names_options_reach_the_reader(tmp_path):
    """A state alone is refused. With --model (a config.json suffices) or --names it is read."""
    shutil.copy(STATES / "plain_adam" / "optimizer.pt", tmp_path / "optimizer.pt")
    refused = _run(tmp_path / "optimizer.pt", "-o", tmp_path / "a", "--quiet")
    assert refused.exit_code == 1
    assert "--model" in refused.output
    assert "--names" in refused.output
    (tmp_path / "config").mkdir()
    shutil.copy(STATES / "plain_adam" / "config.json", tmp_path / "config")
    by_model = _run(tmp_path / "optimizer.pt", "--model", tmp_path / "config", "-o", tmp_path / "b", "--quiet")
    assert by_model.exit_code == 0, by_model.output
    state = torch.load(STATES / "plain_adamw_named" / "optimizer.pt", weights_only=True)
    (tmp_path / "names.txt").write_text("\n".join(state["param_groups"][0]["param_names"]) + "\n")
    by_names = _run(tmp_path / "optimizer.pt", "--names", tmp_path / "names.txt", "-o", tmp_path / "c", "--quiet")
    assert by_names.exit_code == 0, by_names.output
    b, c = read_fisher(tmp_path / "b"), read_fisher(tmp_path / "c")
    assert set(b) == set(c)
    assert all(torch.equal(b[name], c[name]) for name in b)


@pytest.mark.parametrize("name", ["bad_nan", "bad_truncated", "bad_malicious_pickle", "plain_sgd_refuse"])
def test_a_refusal_is_one_line_and_leaves_nothing(tmp_path, name, monkeypatch):
    """A refusal exits with 1 and one line on stderr, without an output folder. No code of a pickle runs."""
    monkeypatch.chdir(tmp_path)
    result = _run(STATES / name, "-o", tmp_path / "out", "--quiet")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_fisher_is_not_overwritten(tmp_path):
    """A folder that holds a Fisher is left as it is."""
    assert _run(STATES / "plain_adam", "-o", tmp_path / "out", "--quiet").exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    result = _run(STATES / "plain_adagrad", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path / 'out'} must not hold a Fisher yet"), "one line, without a bar"
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_misuse_is_exit_code_2(tmp_path):
    """A missing -o, an unknown dtype and a count of 0 are usage errors."""
    assert _run(STATES / "plain_adam").exit_code == 2
    assert _run(STATES / "plain_adam", "-o", tmp_path / "out", "--dtype", "float16").exit_code == 2
    assert _run(STATES / "plain_adam", "-o", tmp_path / "out", "--examples-per-step", 0).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_quiet_disables_the_progress_bar(tmp_path, monkeypatch):
    """A progress bar goes to stderr after two seconds, and --quiet disables it."""
    assert _run(STATES / "plain_adam", "-o", tmp_path / "short").stderr == ""
    monkeypatch.setattr(load, "_BAR_DELAY", 0)
    loud = _run(STATES / "plain_adam", "-o", tmp_path / "a")
    assert "Extracting" in loud.stderr
    quiet = _run(STATES / "plain_adagrad", "-o", tmp_path / "b", "--quiet")
    assert quiet.exit_code == 0
    assert quiet.stderr == ""


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True, "bias": "lora_only"}], ids=["plain", "rsLoRA"])
def test_lift_writes_the_fisher_of_the_merged_weights(lora, tmp_path):
    """With --lift the file is of full weights in row means and column means; without, of the adapter."""
    train(tmp_path, "qwen2", **lora)
    options = ["--base", tmp_path / "base", "--quiet"]
    lifted = _run(tmp_path / "adapter", *options, "--lift", "-o", tmp_path / "lifted")
    plain = _run(tmp_path / "adapter", *options, "-o", tmp_path / "plain")
    assert (lifted.exit_code, plain.exit_code) == (0, 0), lifted.output + plain.output
    assert "lifted_lora ema of the model" in lifted.output
    weights = set(load_file(tmp_path / "base" / "model.safetensors"))
    assert set(read_fisher(tmp_path / "lifted")) <= weights
    assert not set(read_fisher(tmp_path / "plain")) & weights
