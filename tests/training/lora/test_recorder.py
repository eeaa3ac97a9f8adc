"""Recorder of merged weights: against gradients of the weights themselves, in loops of torch."""

import peft
import pytest
import torch
from torch import nn

from squisher_mergekit.errors import ConfigError, MismatchError, UnsupportedStateError
from squisher_mergekit.training import LoraRecorder
from tests.small_models import MODELS
from tests.training.lora.reference import Reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft's call
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to:UserWarning"),
]
BETA = 0.75
RUNS = {
    "a rank pattern": ("llama", {"target_modules": ["v_proj", "up_proj"], "rank_pattern": {"up_proj": 5}}),
    "rsLoRA": ("t5", {"target_modules": ["wo", "k"], "use_rslora": True}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"]}),
    "dropout": ("qwen2", {"target_modules": ["k_proj", "gate_proj"], "lora_dropout": 0.5}),
    "a head of its own": ("bert", {"target_modules": ["key", "output.dense"], "modules_to_save": ["classifier"]}),
    "biases": ("gpt2", {"target_modules": ["c_fc"], "bias": "all"}),
}


def _adapted(name, seed=0, **lora):
    torch.manual_seed(seed)
    settings = {"r": 3, "lora_alpha": 6, "init_lora_weights": True} | lora
    model = peft.get_peft_model(MODELS[name]().train(), peft.LoraConfig(**settings))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.1)
    return model


def _batch(name, step, rows=4):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 50, (rows, 9), generator=generator)
    labels = torch.randint(0, 5, (rows,), generator=generator) if name == "bert" else ids.clone()
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    if name != "bert":
        labels[0, 5:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _train(name, model, recorder, reference, steps=3, parts=1, clip=1e9, checkpointing=None):
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n], lr=1e-2)
    for step in range(steps):
        for part in range(parts):
            (model(**_batch(name, step * parts + part)).loss / parts).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        reference.add()
        assert recorder.update()
        optimizer.step()
        model.zero_grad()


def _check(recorder, reference, rtol):
    fisher = recorder.fisher()
    for name in reference.weights:
        expected = reference.expected(name)
        assert torch.allclose(fisher[name].double(), expected, rtol=rtol, atol=float(expected.max()) * rtol), name
    return fisher


@pytest.mark.parametrize("run", RUNS)
def test_a_recorded_fisher_equals_the_reference(run):
    """F is that of the gradients of the weights themselves, after accumulation and clipping, with padded rows."""
    name, lora = RUNS[run]
    model = _adapted(name, **lora)
    recorder = LoraRecorder(model, BETA, seed=5)
    reference = Reference(recorder)
    _train(name, model, recorder, reference, parts=2, clip=0.05 if run != "dropout" else 1e9)
    fisher = _check(recorder, reference, 2e-4)
    assert set(reference.weights) <= set(fisher)
