"""Checkpoints that accelerate, Lightning and Fabric, as installed, write now."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.optimizers.states import assert_read


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "layout"), [("accelerate", "accelerate"), ("lightning", "lightning"), ("fabric", "torch")]
)
def test_what_a_trainer_writes_is_read_bit_for_bit(trainer, layout, tmp_path):
    """Every accumulator has its name, bits, steps and decay."""
    script = Path(__file__).with_name("live_runs.py")
    folder = tmp_path / "run"
    done = subprocess.run([sys.executable, script, trainer, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    config = assert_read(folder, load_file(folder / "expected.safetensors")).config
    assert (config.steps, config.optimizer.beta2, config.optimizer.class_) == (3, 0.98, "torch.optim.AdamW")
    assert config.source.layout == layout
