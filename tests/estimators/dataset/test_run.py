"""``squisher estimate`` with several processes, interruptions and adapters."""

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import ConfigError, CorruptFileError
from squisher_mergekit.estimators.accumulator import FisherAccumulator
from squisher_mergekit.estimators.dataset import run
from squisher_mergekit.estimators.dataset.run import Request, estimate_from
from tests import processes
from tests.small_models import SMALL, word_tokenizer

ROOT = Path(__file__).parents[3]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "far"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a small Mixtral with its tokenizer, and 23 rows of text."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(3)
    settings = SMALL | {"hidden_size": 24, "intermediate_size": 20, "num_local_experts": 3, "num_experts_per_tok": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings, num_key_value_heads=3))
    model.save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))} for _ in range(23)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _request(saved, **changes):
    given = {"labels": "sampled", "num_samples": 2, "batch_size": 3} | changes
    return Request(str(saved / "model"), str(saved / "rows.jsonl"), "causal-lm", **given)


def _stop_after(monkeypatch, batches):
    """Interrupt the estimate after a number of batches."""
    add, seen = FisherAccumulator.add, []

    def counted(self, *args, **kwargs):
        if len(seen) == batches:
            raise KeyboardInterrupt
        seen.append(1)
        add(self, *args, **kwargs)

    monkeypatch.setattr(run.FisherAccumulator, "add", counted)


def _interrupted(saved, out, batches, monkeypatch, **changes):
    with monkeypatch.context() as patch:
        _stop_after(patch, batches)
        with pytest.raises(KeyboardInterrupt):
            estimate_from(_request(saved, **changes), out, save_every=9)


def _close(found, expected):
    """Return True if entries agree within the rounding of the largest entry of each tensor."""
    assert set(found) == set(expected)
    return max(float((found[name] - expected[name]).abs().max() / expected[name].max()) for name in expected) < 1e-6


def test_an_interrupted_estimate_resumes_to_the_bit(saved, tmp_path, monkeypatch):
    """A repeated call resumes after six batches, writes the file of a single call, and removes the checkpoint."""
    whole = estimate_from(_request(saved), tmp_path / "whole")
    _interrupted(saved, tmp_path / "out", 7, monkeypatch)
    partial = tmp_path / "out.partial.safetensors"
    assert partial.is_file()
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        _stop_after(patch, 2)  # six of eight batches are done
        again = estimate_from(_request(saved), tmp_path / "out", save_every=9)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert again.config == whole.config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_factors_resume_to_the_bit(saved, tmp_path, monkeypatch):
    """An interrupted estimate with factors continues to the factors of one that was not interrupted."""
    whole = estimate_from(_request(saved, factors="kron", block=5), tmp_path / "whole")
    _interrupted(saved, tmp_path / "out", 7, monkeypatch, factors="kron", block=5)
    again = estimate_from(_request(saved, factors="kron", block=5), tmp_path / "out", save_every=9)
    assert whole.factors.names
    for side in ("rows", "columns"):
        for name, factor in whole.factors.side(side).items():
            assert torch.equal(factor, again.factors.side(side)[name])


@pytest.mark.parametrize(
    ("change", "words"), [({"seed": 1}, "with seed 0, not 1"), ({"batch_size": 4}, "batch_size 3")]
)
def test_only_the_same_call_resumes(saved, tmp_path, monkeypatch, change, words):
    """A checkpoint of another request raises an error and stays unchanged."""
    _interrupted(saved, tmp_path / "out", 4, monkeypatch)
    before = (tmp_path / "out.partial.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=words):
        estimate_from(_request(saved, **change), tmp_path / "out", save_every=9)
    assert (tmp_path / "out.partial.safetensors").read_bytes() == before


def test_another_file_in_its_place_is_refused(saved, tmp_path):
    """A damaged checkpoint or a file of the user raises an error and stays unchanged."""
    (tmp_path / "out.partial.safetensors").write_bytes(b"mine")
    with pytest.raises(CorruptFileError, match="must be the checkpoint of an estimate"):
        estimate_from(_request(saved), tmp_path / "out")
    assert (tmp_path / "out.partial.safetensors").read_bytes() == b"mine"


def test_a_bad_last_row_is_refused_before_the_first_batch(saved, tmp_path, monkeypatch):
    """A pass of hours must not end at a row that it could have been asked about."""
    rows = [{"text": "the cat sat"}] * 22 + [{"text": "  "}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _stop_after(monkeypatch, 0)
    request = dataclasses.replace(_request(saved), data=str(tmp_path / "rows.jsonl"))
    with pytest.raises(ConfigError, match="row 22 is empty in column text"):
        estimate_from(request, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sharding_needs_processes(saved, tmp_path):
    """Sharding in one process raises an error."""
    with pytest.raises(ConfigError, match="start more, by accelerate launch or torchrun"):
        estimate_from(_request(saved), tmp_path / "out", sharded=True)


def test_bfloat16_passes_agree_within_its_precision(saved, tmp_path):
    """Passes in bfloat16 give entries within the precision of bfloat16."""
    exact = estimate_from(_request(saved, labels="true"), tmp_path / "exact")
    narrow = estimate_from(_request(saved, labels="true", precision="bf16"), tmp_path / "narrow")
    off = [float((narrow[name] - exact[name]).norm() / exact[name].norm()) for name in exact]
    assert 0 < max(off) < 0.1


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft calls transformers this way
def test_a_folder_of_an_adapter_gives_the_fisher_of_the_adapter(saved, tmp_path):
    """The adapter config names the base model. The Fisher has the names of adapter_model.safetensors."""
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(saved / "model")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    request = Request(str(tmp_path / "adapter"), str(saved / "rows.jsonl"), "causal-lm")
    fisher = estimate_from(request, tmp_path / "out")
    assert fisher.config.parameters == "adapter"
    assert all("lora_" in name for name in fisher)
    assert all(float(fisher[name].max()) > 0 for name in fisher)
    assert load_fisher(tmp_path / "out", base=saved / "model").config == fisher.config


def _launch(saved, out, *options):
    """Run the command in two processes that see the environment variables of torchrun."""
    arguments = ["estimate", saved / "model", "--task", "causal-lm", "--data", saved / "rows.jsonl", "-o", out]
    arguments += ["--labels", "sampled", "--num-samples", "2", "--batch-size", "3", "--quiet", *options]
    text = json.dumps(list(map(str, arguments)))
    folder = out.parent / "group"
    return processes.run("tests.estimators.dataset.estimate_worker", text, folder, 2, as_torchrun=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--shard",)])
def test_two_processes_agree_with_one(saved, tmp_path, options):
    """Two processes, replicated or sharded, compute the Fisher of one process within rounding."""
    one = estimate_from(_request(saved), tmp_path / "one")
    codes, said = _launch(saved, tmp_path / "two", *options)
    assert codes == [0, 0], said
    assert [text.count("num examples  23") for text in said] == [1, 0]
    two = load_fisher(tmp_path / "two", model=saved / "model")
    assert _close(two, one)
    assert (two.config.num_examples, two.config.weights_fingerprint) == (23, one.config.weights_fingerprint)


@pytest.mark.slow
def test_two_processes_resume_the_checkpoint_of_one(saved, tmp_path, monkeypatch):
    """Two processes that share the parameters resume the checkpoint of one process."""
    one = estimate_from(_request(saved), tmp_path / "one")
    _interrupted(saved, tmp_path / "two", 7, monkeypatch)
    codes, said = _launch(saved, tmp_path / "two", "--save-every", "3", "--shard")
    assert codes == [0, 0], said
    assert _close(load_fisher(tmp_path / "two"), one)
    assert not (tmp_path / "two.partial.safetensors").exists()


@pytest.mark.slow
def test_a_killed_run_resumes(saved, tmp_path):
    """SIGKILL leaves no incomplete file, and the same call then finishes to the bit."""
    rows = [json.loads(line) for line in (saved / "rows.jsonl").read_text().splitlines()] * 40
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["estimate", saved / "model", "--task", "causal-lm", "--data", many, "--num-examples", len(rows)]
    line = [sys.executable, "-m", "squisher_mergekit", *map(str, arguments), "--save-every", "16", "--quiet", "-o"]
    run = subprocess.Popen([*line, tmp_path / "out"], cwd=ROOT)
    partial = tmp_path / "out.partial.safetensors"
    while not partial.exists() and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    for out in ("out", "whole"):
        subprocess.run([*line, tmp_path / out], cwd=ROOT, check=True, capture_output=True)
    again, whole = load_fisher(tmp_path / "out"), load_fisher(tmp_path / "whole")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_offload_and_shard_are_refused_together(saved, tmp_path):
    """Offloading is for whole models."""
    with pytest.raises(ConfigError, match=r"--offload .* --shard .* give one of the two"):
        estimate_from(_request(saved), tmp_path / "out", sharded=True, offload=True)
