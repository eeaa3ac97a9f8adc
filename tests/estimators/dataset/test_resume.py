"""Checkpoints of a running estimate: the requests that resume from them."""

import pytest
import torch
from torch import nn

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.estimators.accumulator import FisherAccumulator
from squisher_mergekit.estimators.dataset.resume import EstimateCheckpoint


def _saved(out, request):
    """Write a checkpoint of three batches of a tiny model."""
    accumulator = FisherAccumulator(nn.Linear(2, 1), task="regression")
    accumulator.add((torch.ones(3, 2), torch.zeros(3, 1)))
    EstimateCheckpoint.beside(out, request).save(accumulator, 3)


@pytest.mark.parametrize(("saved", "then"), [("bf16", "fp32"), ("fp32", "fp16"), ("fp16", "bf16")])
def test_another_dtype_of_the_model_does_not_resume(saved, then, tmp_path):
    """The sums of a model in one dtype are not those of another."""
    _saved(tmp_path / "out", {"model_dtype": saved, "seed": 1})
    with pytest.raises(ConfigError, match=f"model_dtype {saved}, not {then}; repeat that call"):
        EstimateCheckpoint.beside(tmp_path / "out", {"model_dtype": then, "seed": 1}).num_batches()


@pytest.mark.parametrize("added", [{"model_dtype": "fp32"}, {"factors": None, "block": 128}])
def test_a_checkpoint_of_an_earlier_version_resumes(added, tmp_path):
    """Fields that earlier versions did not know have their defaults there."""
    _saved(tmp_path / "out", {"seed": 1})
    assert EstimateCheckpoint.beside(tmp_path / "out", {"seed": 1, **added}).num_batches() == 3
