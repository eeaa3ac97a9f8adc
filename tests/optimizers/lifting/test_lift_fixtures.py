"""Real checkpoints of LoRAs by ``scripts.checkpoints.make``: 8-bit AdamW of bitsandbytes, and FSDP2 in shards."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from squisher_mergekit import load_fisher
from tests.optimizers.lifting.reference import reference

STATES = Path(__file__).parents[2] / "fixtures" / "lora_states"
# Folder -> folder of its adapter.
CASES = {"bnb_8bit": ".", "fsdp2_sharded": "final"}
SCALE = 2.0  # alpha / r of both


def _opened(name, lift):
    folder = STATES / name
    return load_fisher(folder, model=folder / CASES[name], base=folder / "base", lift=lift)


@pytest.mark.parametrize("name", CASES)
def test_the_moments_of_a_and_b_are_those_of_the_live_optimizer(name):
    """Names, shapes and bits equal those that the optimizer held, with none missing and none extra."""
    fisher, expected = _opened(name, lift=False), load_file(STATES / name / "expected.safetensors")
    assert set(fisher) == set(expected)
    assert all(torch.equal(fisher[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", CASES)
def test_the_lifted_fisher_is_the_formula_on_them(name):
    """The lifted Fisher equals the slow reference on A, B and the live moments without bias."""
    case = json.loads((STATES / name / "case.json").read_text())
    factors = load_file(STATES / name / CASES[name] / "adapter_model.safetensors")
    moments = load_file(STATES / name / "expected.safetensors")
    lifted = _opened(name, lift=True)
    assert len(lifted) == len(factors) / 2 == 3
    for key in lifted:
        pair = [f"base_model.model.{key.removesuffix('weight')}lora_{part}.weight" for part in "AB"]
        unbiased = [moments[part].double() / (1 - case["beta2"] ** case["step"]) for part in pair]
        wanted = reference(*(factors[part] for part in pair), *unbiased, SCALE)
        assert torch.allclose(lifted[key].double(), wanted, rtol=3e-7, atol=0), key
