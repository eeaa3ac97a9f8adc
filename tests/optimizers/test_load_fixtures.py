"""Real checkpoints of the fixtures, each read bit for bit under its names or refused with the reason."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from squisher_mergekit import extract, load_fisher
from squisher_mergekit.errors import (
    CorruptFileError,
    MismatchError,
    NotFoundError,
    UnsafeFileError,
    UnsupportedStateError,
)
from tests.checkpoints import STATES
from tests.environments import make

# case -> further arguments of load_fisher: a file in the folder, and the base model
ACCEPTED = {
    "plain_adam": {},
    "plain_adamw_named": {},
    "plain_amsgrad": {},
    "plain_adagrad": {},
    "plain_rmsprop_centered": {},
    "plain_frozen_in_group": {},
    "plain_bundle_ddp_compile_prefix": {"file": "ckpt.pt"},
    "trainer_llama_decay": {},
    "trainer_bert_cls": {},
    "trainer_gpt2_tied_frozen": {"base": "base"},
    "trainer_mixtral_packed": {},
    "trainer_sharded_index": {},
    "trainer448_qwen2": {},
    "trainer_lora_llama": {"base": "base_config"},
    "accel_ddp": {},
    "lightning_ckpt": {},
    "plain_torch_adafactor": {},
    "trainer_t5_adafactor": {},
    "trainer_bnb8bit": {},
    "trainer_torchao8bit": {},
    "fsdp1_full": {},
    "fsdp1_sharded": {},
    "fsdp2_sharded_nodcp": {},
    "dcp_nested": {},
    "ds_zero1": {},
    "ds_zero2": {},
    "ds_zero3": {},
    "ds_universal": {},
    "ds_universal_3_small": {},
    "ds_zero2_aligned_bf16": {},
    "ds_zero2_robin_bf16_frozen": {},
    "ds_zero3_small_bf16_frozen": {},
    "fsdp1_nodcp": {},
    "fsdp2_hybrid_nodcp": {},
    "dcp_titan_few": {},
    "torchao_4bit_few": {},
}
# The product of their row and column means has its own order of operations.
FACTORED = ("plain_torch_adafactor", "trainer_t5_adafactor")
STATISTIC = {"plain_adagrad": "sum"}
LAYOUT = {
    "trainer": "transformers-trainer",
    "plain": "torch",
    "accel": "accelerate",
    "lightning": "lightning",
    "torchao": "torch",
    "fsdp1_full": "accelerate",
    "fsdp": "accelerate-fsdp",
    "dcp": "torch-distributed",
    "ds": "deepspeed",
    "ds_universal": "deepspeed-universal",
    "ds_universal_3_small": "deepspeed-universal",
}
FILES = {"fsdp1_full": "optimizer.bin", "fsdp1_sharded": "optimizer_0"}
FILES |= dict.fromkeys(("fsdp2_sharded_nodcp", "fsdp1_nodcp", "fsdp2_hybrid_nodcp"), "optimizer_0_rank0.bin")
FILES |= {"dcp_nested": "step-4"} | dict.fromkeys(("ds_universal", "ds_universal_3_small"), "global_step4_universal")
FILES |= {name: "global_step4" for name in ACCEPTED if name.startswith("ds_zero")}


def _case(name):
    return json.loads((STATES / name / "case.json").read_text())


def _source(name):
    return STATES / name / ACCEPTED[name].get("file", "")


def _base(name):
    return STATES / name / ACCEPTED[name]["base"] if "base" in ACCEPTED[name] else None


def _open(name):
    return load_fisher(_source(name), base=_base(name))


def _copy(name, to):
    return Path(shutil.copytree(STATES / name, to / name))


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_accumulator_is_found_bit_for_bit_under_its_own_name(name):
    """Names, shapes and bits equal those of the accumulators in memory, with none missing and none extra."""
    fisher, expected = _open(name), load_file(STATES / name / "expected.safetensors")
    assert set(fisher) == set(expected)
    for key, tensor in expected.items():
        assert fisher[key].dtype == tensor.dtype
        assert fisher.info(key).shape == tuple(tensor.shape)
        if name in FACTORED:
            torch.testing.assert_close(fisher[key], tensor, rtol=1e-6, atol=0)
        else:
            assert torch.equal(fisher[key], tensor), key


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_config_describes_the_run(name):
    """Estimator, statistic, class, decay, steps and layout are those of the run. Unknown values are null."""
    config, case = _open(name).config, _case(name)
    assert (config.estimator, config.statistic) == ("squisher", STATISTIC.get(name, "ema"))
    unnamed = "bnb" in name or "torchao" in name  # all their optimizers write the same keys
    assert unnamed or config.optimizer.class_.split(".")[-1] == case["optimizer"].split(".")[-1]
    assert config.optimizer.beta2 == (None if name in FACTORED else case["beta2"])
    without_amsgrad = (*FACTORED, "plain_adagrad", "trainer_bnb8bit", "plain_rmsprop_centered")
    assert config.optimizer.amsgrad == (None if name in without_amsgrad else name == "plain_amsgrad")
    assert config.steps == case["step"]
    assert config.bias_corrected is (name in FACTORED)
    assert config.parameters == ("adapter" if name == "trainer_lora_llama" else "model")
    family = name.split("_")[0].replace("448", "").rstrip("12")
    assert config.source.layout == LAYOUT.get(name, LAYOUT[family])
    assert config.source.files == (case.get("optimizer_file") or FILES[name],)
    assert config.coverage.with_ == len(load_file(STATES / name / "expected.safetensors"))
    assert name == "ds_universal" or config.weights_fingerprint.startswith("fp1:")  # it has no weights
    effective = case["per_device_train_batch_size"] * case["gradient_accumulation_steps"] * case["world_size"]
    assert config.examples_per_step == (effective if family == "ds" else None)
    assert (config.tokens_per_step, config.num_examples, config.mean) == (None,) * 3


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_config_holds_no_absolute_path(name):
    """The metadata has neither the folder of the checkpoint nor any of its parents."""
    text = _open(name).config.to_json()
    assert str(STATES) not in text
    assert str(STATES.parents[1]) not in text


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_extracted_fisher_opens_unchanged(name, tmp_path):
    """An extracted Fisher opens with the same float32 bits and metadata, plus mean and norm."""
    original = _open(name)
    written = extract(_source(name), tmp_path / "out", base=_base(name))
    again = load_fisher(tmp_path / "out")
    assert set(again) == set(original)
    assert all(torch.equal(again[key], original[key]) for key in original)
    wide = torch.cat([original.scaled(key).double().flatten() for key in original])
    assert math.isclose(again.config.mean, wide.mean().item(), rel_tol=1e-6)
    assert math.isclose(again.config.norm, wide.norm().item(), rel_tol=1e-6)
    assert again.config.model_copy(update={"mean": None, "norm": None}) == original.config
    assert again.config == written.config
    assert again.aliases == original.aliases
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


REFUSED = {
    "plain_sgd_refuse": (UnsupportedStateError, ["SGD", "optimizer.pt", "AdamW"]),
    "bad_malicious_pickle": (UnsafeFileError, ["optimizer.pt", "nothing of it was run", "state_dict"]),
    "bad_malicious_dcp_metadata": (UnsafeFileError, [".metadata", "io.open", "nothing of it was run", "again"]),
    "bad_missing_ds_rank": (NotFoundError, ["global_step4", "rank 1 is missing", "copy it"]),
    "bad_truncated": (CorruptFileError, ["optimizer.pt", "truncated, damaged or of another format", "copy it again"]),
    "bad_wrong_model_shape": (MismatchError, ["optimizer.pt", "embed_tokens", "[32, 8]", "[32, 16]", "--model"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_checkpoints_are_refused_in_one_line(name):
    """A refusal has the right error, in one line with the place, the wrong value and the cure."""
    error, words = REFUSED[name]
    with pytest.raises(error) as caught:
        load_fisher(STATES / name)
    message = str(caught.value)
    assert type(caught.value) is error
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_checkpoint_leaves_nothing_behind(name, tmp_path):
    """A refused extraction leaves neither the output folder nor a temporary one."""
    with pytest.raises(REFUSED[name][0]):
        extract(STATES / name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


LIBRARIES = (
    *("deepspeed", "bitsandbytes", "torchao", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics"),
    *("galore_torch", "apollo_torch", "schedulefree", "optimi", "pytorch_optimizer", "ivon"),
)
# Runs the command line for each case, and prints exit code and output as JSON, one line per case.
SCRIPT = """
import importlib.util, json, sys
from pathlib import Path
from click.testing import CliRunner
from squisher_mergekit.cli.main import main
there = [name for name in json.loads(sys.argv[3]) if importlib.util.find_spec(name)]
assert not there, there
for case in sorted(Path(sys.argv[1]).iterdir()):
    base = next(([ "--base", str(case / name)] for name in ("base", "base_config") if (case / name).is_dir()), [])
    out = Path(sys.argv[2]) / case.name
    done = CliRunner().invoke(main, ["extract", str(case), "-o", str(out), "--quiet", *base])
    foreign = None if done.exception is None or isinstance(done.exception, SystemExit) else repr(done.exception)
    print(json.dumps([case.name, done.exit_code, done.output, foreign]), flush=True)
"""


@pytest.mark.slow
def test_every_fixture_is_read_or_refused_without_the_library_that_wrote_it(tmp_path):
    """torch, transformers and safetensors suffice to read every fixture to the bit, or to refuse it in one line."""
    environment = make(tmp_path / "environment")
    environment.see_dependencies(hide=LIBRARIES)
    environment.pip("install", "--no-deps", "--no-build-isolation", str(STATES.parents[2]))
    out = tmp_path / "out"
    done = environment.run("-c", SCRIPT, str(STATES), str(out), json.dumps(LIBRARIES), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-2000:]
    results = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert set(results) == {case.name for case in STATES.iterdir()}
    for name, (code, output, foreign) in results.items():
        expect = json.loads((STATES / name / "case.json").read_text())["expect"]
        assert foreign is None, (name, foreign)
        if expect.startswith("refuse"):
            assert code == 1, (name, output)
            assert [line for line in output.splitlines() if line.startswith("Error: ")], (name, output)
            assert not (out / name).exists()
            continue
        assert code == 0, (name, output)
        found = load_file(out / name / "fisher.safetensors")
        truth = STATES / name / "expected.safetensors"
        for key, tensor in load_file(truth).items() if truth.exists() else ():
            exact = 0.0 if "adafactor" not in name else 1e-6
            assert ((found[key] - tensor.float()).abs() <= exact * tensor.float().abs()).all(), (name, key)
    assert not [*STATES.rglob("SQUISHER_MARKER"), *environment.root.rglob("SQUISHER_MARKER"), *out.rglob("*MARKER*")]
