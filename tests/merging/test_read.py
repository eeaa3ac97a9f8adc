"""Reader of one tensor of a Fisher, at the scale of a merge."""

from pathlib import Path

import pytest
import torch

from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging.read import load_tensor
from squisher_mergekit.tensors.safetensors import MemoryStore
from tests.merging.models import entry, models_with_fishers
from tests.merging.reference import assert_squisher, assert_within, merged, reference_at, store_fisher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0.1, 0.3, 0.7])
def test_an_entry_at_adagrads_start_is_exactly_zero(dtype: torch.dtype, start: float) -> None:
    """An entry without any gradient has the start as its dtype rounds it, and becomes exactly 0."""
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
    assert loaded.tensor is not None
    assert loaded.tensor[0].item() == 0.0
    assert loaded.tensor[1].item() * loaded.scale == pytest.approx(2.0 / 7, rel=1e-2)


@pytest.mark.parametrize("scaling", ["raw", "debiased", "per_example"])
def test_scaling(tmp_path: Path, scaling: str) -> None:
    """The scalings are the stored value, the value divided by 1 - beta2^t, and that times the examples of a step."""
    weights, fishers = models_with_fishers(tmp_path, 2)
    for i, (steps, examples) in enumerate(((100, 16), (1200, 48))):
        optimizer = {"class": "torch.optim.AdamW", "beta2": 0.999}
        store_fisher(
            tmp_path / f"m{i}", fishers[i], statistic="ema", steps=steps, bias_corrected=False,
            optimizer=optimizer, examples_per_step=examples,
        )  # fmt: skip
    config = {
        "merge_method": "squisher",
        "models": [entry(tmp_path, 0, fisher_scale=3.0), entry(tmp_path, 1)],
        "parameters": {"scaling": scaling},
    }
    result = merged(config, tmp_path / "out")
    debias = [1 / (1 - 0.999**100), 1 / (1 - 0.999**1200)]
    scales = {"raw": [1.0, 1.0], "debiased": debias, "per_example": [16 * debias[0], 48 * debias[1]]}[scaling]
    scales[0] *= 3.0
    for name, tensor in result.items():
        assert_within(tensor, *reference_at(weights, fishers, scales, name))


def test_adagrads_sum_is_a_mean_less_its_start(tmp_path: Path) -> None:
    """An optimizer's sum loses Adagrad's initial value and is divided by the steps.

    A computed sum is divided by the examples.
    """
    weights, _ = models_with_fishers(tmp_path, 2)
    generator = torch.Generator().manual_seed(3)
    fishers = [{n: torch.rand(t.shape, generator=generator) + 0.5 for n, t in weights[0].items()} for _ in range(2)]
    optimizer = {"class": "torch.optim.Adagrad", "initial_accumulator_value": 0.25}
    store_fisher(tmp_path / "m0", fishers[0], statistic="sum", steps=7, optimizer=optimizer)
    store_fisher(tmp_path / "m1", fishers[1], estimator="empirical", statistic="sum", num_examples=64)
    models = [entry(tmp_path, 0), entry(tmp_path, 1)]
    config = {"merge_method": "squisher", "models": models, "parameters": {"normalize": "none"}}
    result = merged(config, tmp_path / "out")
    means = [{name: (f - 0.25) / 7 for name, f in fishers[0].items()}, {name: f / 64 for name, f in fishers[1].items()}]
    assert_squisher(result, weights, means, (1.0, 1.0))


@pytest.mark.parametrize(("normalize", "estimator"), [("mean", "squisher"), ("l2", "squisher"), ("auto", "empirical")])
def test_normalize(tmp_path: Path, normalize: str, estimator: str) -> None:
    """Each Fisher is divided by its mean or L2 norm over the whole model. auto means mean if one Fisher is computed."""
    weights, _ = models_with_fishers(tmp_path, 2)
    generator = torch.Generator().manual_seed(4)
    fishers = [{n: torch.rand(t.shape, generator=generator) ** 4 for n, t in weights[0].items()} for _ in range(2)]
    store_fisher(tmp_path / "m0", fishers[0], estimator=estimator)
    store_fisher(tmp_path / "m1", fishers[1])
    models = [entry(tmp_path, 0), entry(tmp_path, 1)]
    config = {"merge_method": "squisher", "models": models, "parameters": {"normalize": normalize}}
    result = merged(config, tmp_path / "out")
    flat = [torch.cat([tensor.double().flatten() for tensor in model.values()]) for model in fishers]
    scales = [1 / float(f.norm() if normalize == "l2" else f.mean()) for f in flat]
    for name, tensor in result.items():
        assert_within(tensor, *reference_at(weights, fishers, scales, name))


def test_floor(tmp_path: Path) -> None:
    """`floor` raises every F to that share of the mean of its tensor."""
    weights, _ = models_with_fishers(tmp_path, 2)
    generator = torch.Generator().manual_seed(5)
    fishers = [{n: torch.rand(t.shape, generator=generator) ** 4 for n, t in weights[0].items()} for _ in range(2)]
    for i in range(2):
        store_fisher(tmp_path / f"m{i}", fishers[i])
    models = [entry(tmp_path, 0), entry(tmp_path, 1)]
    result = merged({"merge_method": "squisher", "models": models, "parameters": {"floor": 0.5}}, tmp_path / "out")
    floored = [{n: f.double().clamp_min(0.5 * f.double().mean()) for n, f in model.items()} for model in fishers]
    assert_squisher(result, weights, floored, (1.0, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_floor_is_not_rounded_to_the_dtype_of_the_fisher(dtype: torch.dtype) -> None:
    """The floor is a share of the mean to the precision of float32, also where the Fisher is stored in 16 bits."""
    stored = torch.tensor([0.0, 1e-5, 3e-5, 1e-4, 7e-4]).to(dtype)
    loaded = load_tensor({"w": stored}, "w", scaling="raw", normalize="none", floor=1e-3, fisher_scale=1.0)
    assert loaded.tensor is not None
    expected = stored.double().clamp_min(1e-3 * float(stored.double().mean()))
    torch.testing.assert_close(loaded.tensor.double(), expected, rtol=1e-6, atol=0)
