"""One tensor of a Fisher, brought to the scale of a merge."""

import pytest
import torch

from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging.read import load_tensor
from squisher_mergekit.tensors.safetensors import MemoryStore


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0.1, 0.3, 0.7])
def test_an_entry_at_adagrads_start_is_exactly_zero(dtype: torch.dtype, start: float) -> None:
    """An entry that never saw a gradient holds the start as its dtype rounds it, and has no information at all."""
    config = FisherConfig.model_validate(
        {
            "estimator": "squisher",
            "statistic": "sum",
            "steps": 7,
            "optimizer": {"class": "torch.optim.Adagrad", "initial_accumulator_value": start},
        }
    )
    stored = torch.tensor([start, start + 2.0]).to(dtype)
    fisher = Fisher(MemoryStore({"w": stored}), config)
    loaded = load_tensor(fisher, "w", scaling="debiased", normalize="none", floor=0.0, fisher_scale=1.0)
    assert loaded["tensor"] is not None
    assert loaded["tensor"][0].item() == 0.0
    assert loaded["tensor"][1].item() * loaded["scale"] == pytest.approx(2.0 / 7, rel=1e-2)
