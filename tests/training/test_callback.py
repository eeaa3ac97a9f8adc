"""Runs of the real Trainer with the callback, compared with the live optimizer or with the output of extract."""

import json
import logging
import shutil

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file

from squisher_mergekit import SquisherCallback, load_fisher
from squisher_mergekit.cli.main import main
from squisher_mergekit.errors import ConfigError, UnsupportedStateError
from squisher_mergekit.optimizers.live import TrainingInfo
from squisher_mergekit.training.callback import write_saved
from squisher_mergekit.training.clipping import ClippingMonitor
from tests.checkpoints import STATES
from tests.small_models import FROZEN, MODELS
from tests.training.cases import STEPS, accumulators, make, trainer

OTHERS = sorted(MODELS.keys() - {"bert", "mixtral"})
ROOT_FILES = {"fisher.safetensors", "fisher_config.json"}


def _run(name, folder, *callbacks, resume=None, **settings):
    run = trainer(name, folder, list(callbacks) or [SquisherCallback()], **settings)
    run.train(resume_from_checkpoint=resume)
    return run


def _extracted(checkpoint, out, *options):
    """Extract from the optimizer's file with the real command."""
    arguments = ["extract", str(checkpoint / "optimizer.pt"), "-o", str(out), "--model", str(checkpoint), "--quiet"]
    done = CliRunner().invoke(main, [*arguments, *map(str, options)])
    assert done.exit_code == 0, done.output
    return load_fisher(out)


def _same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["bert", "mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_a_checkpoint_has_the_fisher_of_extract(tmp_path, name):
    """The Fisher of a checkpoint has the live optimizer's bits, and the names, ties and fingerprint of extract."""
    run = _run(name, tmp_path / "run")
    checkpoint = tmp_path / "run" / f"checkpoint-{STEPS}"
    live, read = load_fisher(checkpoint), _extracted(checkpoint, tmp_path / "extracted")
    assert _same(live, read)
    assert _same(live, load_fisher(tmp_path / "run"))
    if name != "mixtral":  # Mixtral's experts have other names in memory
        assert _same(live, accumulators(run.model, run.optimizer))
    assert live.aliases == read.aliases
    for key in ("estimator", "statistic", "parameters", "steps", "bias_corrected", "coverage", "weights_fingerprint"):
        assert getattr(live.config, key) == getattr(read.config, key), key
    assert read.config.weights_fingerprint is not None
    assert live.config.optimizer.model_copy(update={"max_grad_norm": None}) == read.config.optimizer


def test_values_of_the_run_are_recorded(tmp_path):
    """The metadata have batch, accumulation, tokens, clipping, loss, steps, decay and class, and no path."""
    _run(
        "bert", tmp_path, SquisherCallback(datum="example"), include_num_input_tokens_seen="all",
        adam_beta2=0.9, max_grad_norm=0.7,
    )  # fmt: skip
    file = tmp_path / f"checkpoint-{STEPS}" / "fisher_config.json"
    found = json.loads(file.read_text())
    assert found["optimizer"] == {
        "class": "torch.optim.AdamW", "beta2": 0.9, "decoupled_weight_decay": True, "amsgrad": False,
        "max_grad_norm": 0.7,
    }  # fmt: skip
    expected = {"steps": STEPS, "examples_per_step": 4, "tokens_per_step": 44, "loss_reduction": "mean"}
    assert {key: found[key] for key in expected} == expected
    assert found["datum"] == "example"
    assert found["source"]["layout"] == "live"
    assert found["source"]["files"] == []
    assert str(tmp_path) not in file.read_text()


def test_unknown_values_are_null(tmp_path):
    """Tokens that the Trainer did not count are null. Without clipping the share is 0 and the limit null."""
    _run("bert", tmp_path, SquisherCallback(loss_reduction=None), max_grad_norm=0.0)
    config = load_fisher(tmp_path).config
    assert (config.tokens_per_step, config.loss_reduction, config.datum) == (None, None, None)
    assert (config.clipped_share, config.optimizer.max_grad_norm) == (0.0, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_clipped_share_is_that_of_the_norms_before_clipping(tmp_path, dtype):
    """The recorded share is that of the logged norms before clipping that exceed the limit."""
    limit = 0.87 if dtype is torch.float32 else 0.9
    run = _run(
        "gpt2", tmp_path, model=make("gpt2", dtype), max_steps=7, save_steps=7, logging_strategy="steps",
        logging_steps=1, max_grad_norm=limit,
    )  # fmt: skip
    norms = [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry]
    assert len(norms) == 7
    share = sum(norm > limit for norm in norms) / 7
    assert 0 < share < 1, norms
    assert load_fisher(tmp_path / "checkpoint-7").config.clipped_share == pytest.approx(share)


def test_a_step_whose_gradient_overflowed_is_not_counted():
    """A step with a norm that is not finite is skipped and not counted."""
    layer, clipping = torch.nn.Linear(2, 1, bias=False), ClippingMonitor(1.0)
    for gradient in ([[3.0, 4.0]], [[float("inf"), 0.0]], [[0.1, 0.1]]):
        layer.weight.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        clipping.watch(layer)
    assert clipping.share == 0.5


def test_frozen_parameters_are_listed(tmp_path):
    """Exactly the frozen parameters are listed as not given to the optimizer, without a base model."""
    model = make("gpt2")
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(not key.startswith(FROZEN["gpt2"]))
    run = _run("gpt2", tmp_path, model=model)
    fisher = load_fisher(tmp_path / f"checkpoint-{STEPS}")
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    why = fisher.config.coverage.without
    assert {key for key, reason in why.items() if reason == "not given to the optimizer (frozen)"} == frozen
    assert _same(fisher, accumulators(run.model, run.optimizer))
    assert why["lm_head.weight"] == "tied to transformer.wte.weight"


# peft uses a deprecated function of transformers.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_lora_has_a_fisher_of_its_adapter(tmp_path):
    """The Fisher of a LoRA has the names of adapter_model.safetensors and the bits that extract reads with the base."""
    base = make("llama")
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    _run("llama", tmp_path / "run", model=peft.get_peft_model(base, config))
    checkpoint = tmp_path / "run" / f"checkpoint-{STEPS}"
    live = load_fisher(checkpoint)
    assert live.config.parameters == "adapter"
    assert any(name.endswith("lora_A.weight") for name in live)
    read = _extracted(checkpoint, tmp_path / "extracted", "--base", tmp_path / "base")
    assert _same(live, read)
    assert live.config.weights_fingerprint == read.config.weights_fingerprint is not None


def test_a_bfloat16_model_keeps_its_bits_and_is_warned_about(tmp_path, caplog):
    """The accumulators are stored in float32 unchanged, or in bfloat16 at half the size, with one warning."""
    with caplog.at_level(logging.WARNING, "squisher_mergekit"):
        run = _run("bert", tmp_path / "a", model=make("bert", torch.bfloat16), save_steps=1)
    truth = accumulators(run.model, run.optimizer)
    wide = load_fisher(tmp_path / "a")
    assert all(torch.equal(wide[name], truth[name].float()) for name in truth)
    assert sum("stored as bfloat16 with beta2 > 0.95" in record.getMessage() for record in caplog.records) == 1
    _run("bert", tmp_path / "b", SquisherCallback(dtype="bfloat16"), model=make("bert", torch.bfloat16))
    narrow = load_fisher(tmp_path / "b")
    assert all(torch.equal(narrow[name], truth[name]) for name in truth)


def test_a_fisher_is_compressed_on_request(tmp_path):
    """compress="log8" writes 8-bit codes into the checkpoint, within 4 % of the accumulator, with exact zeros."""
    run = _run("bert", tmp_path, SquisherCallback(compress="log8"))
    fisher = load_fisher(tmp_path / f"checkpoint-{STEPS}")
    assert set(fisher.config.encoding.values()) >= {"log8"}
    for name, truth in accumulators(run.model, run.optimizer).items():
        assert torch.equal(fisher[name] == 0, truth == 0)
        assert ((fisher[name] - truth).abs() <= 0.04 * truth).all()


def test_only_the_end_is_written_on_request(tmp_path):
    """every_save=False writes no Fisher into the checkpoints, and one at the end into the given folder."""
    run = _run("bert", tmp_path / "run", SquisherCallback(every_save=False, out=tmp_path / "end"))
    assert not list((tmp_path / "run").rglob("fisher*"))
    assert _same(load_fisher(tmp_path / "end"), accumulators(run.model, run.optimizer))
    assert load_fisher(tmp_path / "end").config.weights_fingerprint is None
    _run("bert", tmp_path / "other", SquisherCallback(at_end=False))
    assert not ROOT_FILES & {file.name for file in (tmp_path / "other").iterdir()}


def test_the_output_folder_has_the_fisher_of_the_best_checkpoint(tmp_path):
    """The output folder gets the Fisher of the best checkpoint if the Trainer loads its weights at the end."""
    run = _run(
        "bert", tmp_path, save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    best, last = tmp_path.joinpath("checkpoint-1"), load_fisher(tmp_path / f"checkpoint-{STEPS}")
    assert run.state.best_model_checkpoint == str(best)  # the loss falls, and the setting takes the highest as the best
    assert _same(load_fisher(tmp_path), load_fisher(best))
    assert not _same(load_fisher(tmp_path), last)


def test_a_second_run_replaces_the_fishers_of_the_first(tmp_path):
    """Folders with Fishers of an earlier run get the new ones, without files of the old."""
    _run("bert", tmp_path)
    run = _run("bert", tmp_path, learning_rate=2e-2)
    truth = accumulators(run.model, run.optimizer)
    assert _same(load_fisher(tmp_path), truth)
    assert _same(load_fisher(tmp_path / f"checkpoint-{STEPS}"), truth)
    assert {file.name for file in tmp_path.iterdir()} == {*ROOT_FILES, f"checkpoint-{STEPS}"}


def _sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9), None


def test_an_optimizer_without_second_moment_is_refused_before_the_first_step(tmp_path):
    """SGD is refused before the first step, in one line with the cure."""
    with pytest.raises(
        UnsupportedStateError, match="but SGD keeps none; train with AdamW, or give SquisherCallback"
    ) as e:
        _run("bert", tmp_path, optim="sgd")
    assert "\n" not in str(e.value)
    assert not list(tmp_path.rglob("checkpoint-*"))


class _Unknown(torch.optim.SGD):
    """Optimizer whose state alone shows that it is unknown."""


def test_an_unsuitable_optimizer_does_not_stop_training(tmp_path, caplog):
    """An unsuitable state at the first save gives one line in the log. Training goes on, and no file is written."""
    model = make("bert")
    run = _run("bert", tmp_path, model=model, optimizers=(_Unknown(model.parameters(), lr=1e-2, momentum=0.9), None))
    assert run.state.global_step == STEPS
    lines = [record.getMessage() for record in caplog.records if "training goes on" in record.getMessage()]
    assert len(lines) == 2  # the checkpoint and the end
    assert all("needs the mean squared gradient" in line and "\n" not in line for line in lines)
    assert not list(tmp_path.rglob("*fisher*"))


class _Poison(transformers.TrainerCallback):
    """Callback that makes one entry of the last second moment NaN."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step < STEPS:
            return
        last = optimizer.param_groups[-1]["params"][-1]
        optimizer.state[last]["exp_avg_sq"].view(-1)[0] = float("nan")


def test_a_write_that_fails_in_the_middle_leaves_nothing(tmp_path, caplog):
    """NaN in the last tensor is logged, training goes on, and no file or folder of a Fisher stays."""
    run = _run("bert", tmp_path, _Poison(), SquisherCallback())
    assert run.state.global_step == STEPS
    assert any("1 NaN" in record.getMessage() for record in caplog.records)
    names = {file.name for file in tmp_path.rglob("*")}
    assert not [name for name in names if "fisher" in name or name.startswith(".")]


class _Searching(transformers.TrainerCallback):
    """Callback that marks the run as a trial of a search."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.is_hyper_param_search = True


def test_nothing_is_written_in_a_hyper_parameter_search(tmp_path, caplog):
    """A hyper-parameter search gets no Fisher, because a callback does not know the folders of its trials.

    The log says so.
    """
    _run("bert", tmp_path, _Searching(), SquisherCallback())
    assert any("hyper-parameter search" in record.getMessage() for record in caplog.records)
    assert not list(tmp_path.rglob("fisher*"))


@pytest.mark.parametrize("arguments", [{"dtype": "float16"}, {"beta": 1.0}, {"compress": "log16"}])
def test_arguments_out_of_range_are_refused_at_once(arguments):
    """An invalid dtype, decay or code is refused when the callback is made."""
    with pytest.raises(ConfigError):
        SquisherCallback(**arguments)


class _Squares(transformers.TrainerCallback):
    """Float64 average of the squared gradient before each step."""

    def __init__(self, beta):
        self.beta, self.average, self.steps = beta, {}, 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps += 1
        for name, parameter in model.named_parameters():
            old = self.average.get(name, torch.zeros_like(parameter, dtype=torch.float64))
            self.average[name] = self.beta * old + (1 - self.beta) * parameter.grad.double() ** 2


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_separate_average_is_written_as_well(tmp_path, optim):
    """beta= writes fisher_ema with its own decay and steps, equal to a float64 average. SGD has only that Fisher."""
    reference = _Squares(0.9)
    _run("bert", tmp_path, SquisherCallback(beta=0.9), reference, optim=optim, max_grad_norm=0.5)
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    for folder in (tmp_path, checkpoint):
        ema = load_fisher(folder / "fisher_ema")
        assert set(ema) == set(reference.average)
        for name, expected in reference.average.items():
            torch.testing.assert_close(ema[name].double(), expected, rtol=1e-6, atol=0.0)
        assert (ema.config.estimator, ema.config.statistic) == ("ema_empirical", "ema")
        assert (ema.config.optimizer.beta2, ema.config.steps, ema.config.bias_corrected) == (0.9, STEPS, False)
        assert ema.config.optimizer.max_grad_norm == 0.5
        assert ema.config.clipped_share is not None
        assert folder.joinpath("fisher.safetensors").exists() == (optim == "adamw_torch")
    assert load_fisher(checkpoint / "fisher_ema").config.weights_fingerprint is not None


@pytest.mark.parametrize("name", ["bert", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mixtral", "qwen2"))])
def test_average_and_share_continue_after_a_resume(tmp_path, name):
    """A run that stops at step 2 and resumes has the bits, the steps and the share of an uninterrupted one."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"save_steps": 2, "max_grad_norm": 1.0, "lr_scheduler_type": "constant"}
    _run(name, whole, SquisherCallback(beta=0.9), max_steps=4, **settings)
    _run(name, parts, SquisherCallback(beta=0.9), max_steps=2, **settings)
    # The Trainer does not load Mixtral's experts by itself.
    model = type(make(name)).from_pretrained(parts / "checkpoint-2")
    _run(
        name, parts, SquisherCallback(beta=0.9), model=model, max_steps=4, resume=str(parts / "checkpoint-2"),
        **settings,
    )  # fmt: skip
    for place in ("checkpoint-4", "checkpoint-4/fisher_ema"):
        a, b = load_fisher(whole / place), load_fisher(parts / place)
        assert _same(a, b)
        assert a.config == b.config
        assert a.config.steps == 4


def test_a_resume_from_another_folder_is_logged(tmp_path, caplog):
    """If the resumed checkpoint cannot be found, the log names the setting, and the average starts again."""
    _run("bert", tmp_path / "a", SquisherCallback(beta=0.9), max_steps=2, save_steps=2)
    _run("bert", tmp_path / "b", SquisherCallback(beta=0.9), resume=str(tmp_path / "a" / "checkpoint-2"))
    assert any("TrainingArguments.resume_from_checkpoint" in record.getMessage() for record in caplog.records)
    assert load_fisher(tmp_path / "b" / "fisher_ema").config.steps == STEPS - 2
    _run(
        "bert", tmp_path / "c", SquisherCallback(beta=0.9), resume=str(tmp_path / "a" / "checkpoint-2"),
        resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"),
    )  # fmt: skip
    assert load_fisher(tmp_path / "c" / "fisher_ema").config.steps == STEPS


@pytest.mark.parametrize(("name", "limit"), [("ds_zero2", 1.0), ("ds_zero3", 2.0)])
def test_under_deepspeed_the_checkpoint_is_read(tmp_path, name, limit):
    """A DeepSpeed checkpoint is read to the bit and replaces an older Fisher.

    The callback adds the run's values that the files lack.
    """
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(STATES / name, checkpoint)
    for _ in range(2):
        facts = TrainingInfo(examples_per_step=8.0, tokens_per_step=88.0, max_grad_norm=2.0)
        write_saved(checkpoint, checkpoint, facts, torch.float32, None)
    fisher = load_fisher(checkpoint)
    assert _same(fisher, load_file(checkpoint / "expected.safetensors"))
    assert (fisher.config.tokens_per_step, fisher.config.optimizer.max_grad_norm) == (88.0, limit)
    assert fisher.config.examples_per_step == 8.0
    assert fisher.config.source.files == ("global_step4",)


def test_a_checkpoint_without_optimizer_is_refused(tmp_path):
    """A checkpoint without optimizer state is refused with the cure."""
    with pytest.raises(UnsupportedStateError, match="save_only_model=False"):
        write_saved(tmp_path, tmp_path, TrainingInfo(), torch.float32, None)
