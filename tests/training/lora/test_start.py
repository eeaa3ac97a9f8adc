"""Runs of the real Trainer with the recorder: the Fisher in each checkpoint, found by a merge, and after a resume."""

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from squisher_mergekit import SquisherCallback, load_fisher
from squisher_mergekit.errors import ConfigError, UnsupportedStateError
from squisher_mergekit.models.weights import Weights
from tests.adapters import save_merged
from tests.merging.reference import assert_within, largest, merged, preview_of, squisher_reference
from tests.training.cases import STEPS, make, trainer
from tests.training.lora.reference import Reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft's call
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning"),
]
BETA = 0.75


class Watch(SquisherCallback):
    """Callback with a slow reference of its recorder."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.reference = Reference(self.recorder)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.reference.add()
        super().on_pre_optimizer_step(args, state, control, **kwargs)


def _adapted(root, seed=0, name="llama", **lora):
    """Return a LoRA of a base in ``root/base``."""
    if not (root / "base").exists():
        make(name).save_pretrained(root / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
    torch.manual_seed(seed)
    return peft.get_peft_model(base, peft.LoraConfig(**{"r": 2, "target_modules": ["v_proj", "up_proj"]} | lora))


def _run(root, folder, callback=None, resume=None, seed=0, **settings):
    callback = callback or SquisherCallback(lift="record", lift_beta=BETA)
    run = trainer("llama", folder, [callback], model=_adapted(root, seed), seed=seed + 1, **settings)
    run.train(resume_from_checkpoint=resume)
    return run


@pytest.mark.parametrize(
    ("settings", "rtol"),
    [
        ({"max_grad_norm": 0.05}, 2e-4),
        ({"bf16": True, "max_grad_norm": 0.0}, 0.05),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, 2e-4),
    ],
    ids=["clipping", "bfloat16", "checkpointing"],
)
def test_a_checkpoint_has_the_recorded_fisher(tmp_path, settings, rtol):
    """With accumulation, F is that of the gradients of the weights, at the fingerprint of the merged weights."""
    watch = Watch(lift="record", lift_beta=BETA)
    run = _run(tmp_path, tmp_path / "run", watch, **settings)
    fisher = load_fisher(tmp_path / "run" / f"checkpoint-{STEPS}")
    watch.reference.check(fisher, rtol)
    found = (fisher.config.estimator, fisher.config.parameters, fisher.config.steps, fisher.config.examples_per_step)
    assert found == ("recorded_lora", "model", STEPS, 4)
    assert fisher.config.encoding == {"default": "rank1"}
    assert fisher.config.weights_fingerprint == Weights(save_merged(run.model, tmp_path / "merged")).fingerprint
    assert set(load_fisher(tmp_path / "run")) == set(fisher)


def test_a_merge_finds_the_recorded_fishers(tmp_path):
    """``fisher: auto`` takes them in place of lifted ones; the merge is Eq. 13 with them."""
    models = []
    for i in range(2):
        run = _run(tmp_path, tmp_path / f"run{i}", seed=i)
        models.append(load_file(save_merged(run.model, tmp_path / f"merged{i}") / "model.safetensors"))
    adapters = [tmp_path / f"run{i}" / f"checkpoint-{STEPS}" for i in range(2)]
    names = [f"{tmp_path / 'base'}+{adapters[0]}", str(adapters[1])]
    config = {"merge_method": "squisher", "models": [{"model": name} for name in names]}
    preview = preview_of(tmp_path, config)
    assert [model["estimator"] for model in preview["models"]] == ["recorded_lora"] * 2
    assert "other weights" not in preview["text"]
    found = merged(config, tmp_path / "out")
    fishers = [load_fisher(adapter) for adapter in adapters]
    for name in fishers[0]:
        thetas = [model[name] for model in models]
        reference = squisher_reference(thetas, [fisher[name] for fisher in fishers], [1.0, 1.0])
        assert_within(found[name], reference, largest(thetas))


def test_lift_prefers_the_recorded_fisher(tmp_path):
    """The folder gives the recorded one, with ``lift`` or without; the optimizer's file gives the lifted one."""
    _run(tmp_path, tmp_path / "run")
    checkpoint = tmp_path / "run" / f"checkpoint-{STEPS}"
    plain, asked = load_fisher(checkpoint), load_fisher(checkpoint, base=tmp_path / "base", lift=True)
    assert all(torch.equal(plain[name], asked[name]) for name in plain)
    lifted = load_fisher(checkpoint / "optimizer.pt", base=tmp_path / "base", lift=True)
    assert lifted.config.estimator == "lifted_lora"
    assert set(lifted) == set(plain)
    assert lifted.config.coverage == plain.config.coverage
    assert lifted.config.weights_fingerprint == plain.config.weights_fingerprint


def test_a_resumed_run_continues_the_averages(tmp_path):
    """Two steps, a resume and three more give the averages of five steps at once."""
    found = []
    for folder, stops in ((tmp_path / "whole", [5]), (tmp_path / "parts", [2, 5])):
        for number, stop in enumerate(stops):
            resume = str(folder / f"checkpoint-{stops[0]}") if number else None
            _run(tmp_path, folder, resume=resume, max_steps=stop, save_steps=stop, lr_scheduler_type="constant")
        found.append(load_fisher(folder))
    assert [fisher.config.steps for fisher in found] == [5, 5]
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-4) for name in found[0])


def test_an_optimizer_without_second_moment_is_enough(tmp_path):
    """The recorder needs none of the optimizer's state."""
    _run(tmp_path, tmp_path / "run", optim="sgd", max_steps=1, save_steps=1)
    assert load_fisher(tmp_path / "run" / "checkpoint-1").config.estimator == "recorded_lora"


def test_full_weights_stop_the_run_before_the_first_step(tmp_path):
    """The refusal comes at the beginning of training, in one line."""
    run = trainer("llama", tmp_path, [SquisherCallback(lift="record")])
    with pytest.raises(UnsupportedStateError, match=r"needs a LoRA of peft, .*SquisherCallback\(beta="):
        run.train()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lift": "lift"}, "lift must be None or 'record'"),
        ({"lift": "record", "lift_beta": 0.0}, "beta of a recorder must be between 0 and 1"),
        ({"lift": "record", "factors": "rows"}, "factors must be None"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings, words):
    """The callback refuses them before training."""
    with pytest.raises(ConfigError, match=words):
        SquisherCallback(**settings)
