"""Checkpoints written by the installed trainers during the test, compared with the live optimizer."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from squisher_mergekit import load_fisher
from tests.checkpoints import assert_read, named_on_disk
from tests.small_models import FROZEN, MODELS, Tokens

STEPS = 3


RUNS = [*((name, False) for name in MODELS), *((name, True) for name in FROZEN)]


@dataclass
class Run:
    checkpoint: Path
    base: Path
    model: Any
    optimizer: Any

    def accumulators(self):
        """Return a mapping from names in memory to accumulators, by the live parameter objects."""
        parameters = dict(self.model.named_parameters())
        return {n: self.optimizer.state[p]["exp_avg_sq"] for n, p in parameters.items() if p in self.optimizer.state}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function that trains one architecture, once, with the real Trainer."""
    runs = {}

    def train(name, frozen):
        if (name, frozen) not in runs:
            runs[name, frozen] = _train(name, frozen, tmp_path_factory.mktemp(name))
        return runs[name, frozen]

    return train


def _train(name, frozen, folder):
    transformers.set_seed(3)
    model = MODELS[name]()
    model.save_pretrained(folder / "base")
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and key.startswith(FROZEN[name])))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "run"), max_steps=STEPS, save_steps=STEPS, per_device_train_batch_size=2,
        learning_rate=1e-2, weight_decay=0.01, use_cpu=True, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Tokens(name))
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return Run(folder / "run" / f"checkpoint-{STEPS}", folder / "base", model, optimizer)


@pytest.mark.parametrize(("name", "frozen"), RUNS)
def test_every_accumulator_of_a_real_run_gets_its_name(trained, name, frozen):
    """The Fisher of a parameter equals its accumulator in the live optimizer, under the name of the parameter."""
    run = trained(name, frozen)
    expected = named_on_disk(run.accumulators())
    fisher = load_fisher(run.checkpoint, base=run.base if frozen else None)
    assert set(fisher) == set(expected)
    assert all(torch.equal(fisher[key], tensor) for key, tensor in expected.items())
    assert len({tensor.double().sum().item() for tensor in expected.values()}) == len(expected)  # all differ
    assert fisher.config.steps == STEPS
    assert fisher.config.optimizer.class_ == "torch.optim.AdamW"
    assert set(fisher) | set(fisher.config.coverage.without) >= {*expected, *_weights(run)}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_layers_of_a_real_run_are_listed(trained, name):
    """Exactly the frozen parameters are listed as not given to the optimizer."""
    run = trained(name, True)
    without = load_fisher(run.checkpoint, base=run.base).config.coverage.without
    frozen = {key for key in _weights(run) if key.startswith(FROZEN[name])}
    assert {key for key, why in without.items() if why == "not given to the optimizer (frozen)"} == frozen


def _weights(run):
    with safe_open(run.checkpoint / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "t5"])
def test_tied_embeddings_share_one_accumulator(trained, name):
    """The other names of a tied embedding find the same Fisher and are listed as tied."""
    run = trained(name, False)
    fisher = load_fisher(run.checkpoint)
    tied = {key: why for key, why in fisher.config.coverage.without.items() if why.startswith("tied to ")}
    assert "lm_head.weight" in tied
    shared = run.accumulators()["shared.weight" if name == "t5" else next(iter(run.accumulators()))]
    assert all(torch.equal(fisher[key], shared) for key in tied)


def test_numbering_named_parameters_is_wrong_for_all_models(trained):
    """Index i is not the i-th of named_parameters().

    For every architecture some shapes agree, so no check of shapes finds it.
    """
    wrong, unnoticed = set(), set()
    for name in MODELS:
        run = trained(name, False)
        state = torch.load(run.checkpoint / "optimizer.pt", weights_only=True)["state"]
        truth = run.accumulators()
        for index, (key, parameter) in zip(sorted(state), run.model.named_parameters(), strict=True):
            found = state[index]["exp_avg_sq"]
            if found.shape != parameter.shape or not torch.equal(found, truth[key]):
                wrong.add(name)
                if found.shape == parameter.shape:
                    unnoticed.add(name)
    assert wrong == set(MODELS)
    assert unnoticed == set(MODELS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "layout"), [("accelerate", "accelerate"), ("lightning", "lightning"), ("fabric", "torch")]
)
def test_checkpoints_of_other_trainers_are_read_bit_for_bit(trainer, layout, tmp_path):
    """Every accumulator has its name, bits, steps and decay."""
    script = Path(__file__).with_name("live_runs.py")
    folder = tmp_path / "run"
    done = subprocess.run([sys.executable, script, trainer, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    config = assert_read(folder, load_file(folder / "expected.safetensors")).config
    assert (config.steps, config.optimizer.beta2, config.optimizer.class_) == (3, 0.98, "torch.optim.AdamW")
    assert config.source.layout == layout
