"""mergekit's in-memory calls with Fishers given as mappings of tensors."""

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts, merge_tensors

from squisher_mergekit.errors import ConfigError, MismatchError, ValuesError
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.tensors.safetensors import MemoryStore
from tests.merging.reference import assert_within, draw_fisher, largest, squisher_reference, ubgm_reference

SHAPES = {"encoder.weight": (7, 13), "encoder.bias": (13,)}
Tensors = dict[str, torch.Tensor]


def _models(count: int) -> tuple[list[Tensors], list[Tensors]]:
    generator = torch.Generator().manual_seed(0)
    weights = [{n: torch.randn(*s, generator=generator) for n, s in SHAPES.items()} for _ in range(count)]
    return weights, [{n: draw_fisher(s, generator) for n, s in SHAPES.items()} for _ in range(count)]


def test_state_dicts() -> None:
    """`merge_state_dicts` merges every tensor by Eq. 13 with plain mappings taken as they are."""
    weights, fishers = _models(3)
    result = merge_state_dicts(weights, "squisher", parameters={"fisher": fishers, "weight": [1.0, 0.5, 2.0]})
    for name in SHAPES:
        thetas = [model[name] for model in weights]
        reference = squisher_reference(thetas, [fisher[name] for fisher in fishers], [1.0, 0.5, 2.0])
        assert_within(result[name], reference, largest(thetas))


def test_state_dicts_by_id_with_a_base() -> None:
    """UBGM takes models and Fishers by id; the base is named by its id."""
    weights, fishers = _models(3)
    keys = ["base", "a", "b"]
    result = merge_state_dicts(
        dict(zip(keys, weights, strict=True)),
        "ubgm_squisher",
        base="base",
        parameters={"fisher": dict(zip(keys, fishers, strict=True)), "prior": 0.5},
    )
    for name in SHAPES:
        (base, *thetas), (base_fisher, *others) = [m[name] for m in weights], [f[name] for f in fishers]
        size = base.double().abs() + sum((theta.double() - base.double()).abs() for theta in thetas)
        assert_within(result[name], ubgm_reference(base, base_fisher, thetas, others, [1.0, 1.0], 0.5), size)


def test_one_tensor_by_name() -> None:
    """`merge_tensors` looks its tensor up by the name it is given."""
    weights, fishers = _models(2)
    name = "encoder.bias"
    thetas = [model[name] for model in weights]
    result = merge_tensors(thetas, "squisher", parameters={"fisher": fishers}, name=name)
    assert_within(result, squisher_reference(thetas, [f[name] for f in fishers], [1.0, 1.0]), largest(thetas))


def test_a_fisher_brings_its_scale() -> None:
    """A Fisher object is debiased by its own steps, as in a merge of files."""
    weights, fishers = _models(2)
    configs = [
        FisherConfig(estimator="squisher", statistic="ema", steps=steps, optimizer={"beta2": 0.99})
        for steps in (3, 200)
    ]
    given = [Fisher(MemoryStore(f), c) for f, c in zip(fishers, configs, strict=True)]
    result = merge_state_dicts(weights, "squisher", parameters={"fisher": given})
    for name in SHAPES:
        thetas = [model[name] for model in weights]
        scaled = [f[name].double() / (1 - 0.99**t) for f, t in zip(fishers, (3, 200), strict=True)]
        assert_within(result[name], squisher_reference(thetas, scaled, [1.0, 1.0]), largest(thetas))


def test_buffers_and_modules() -> None:
    """Modules merge too; integer buffers are copied, and gradients are neither needed nor recorded."""
    torch.manual_seed(0)
    modules = [torch.nn.BatchNorm1d(5) for _ in range(2)]
    fishers = [{name: torch.rand(5) for name in modules[0].state_dict()} for _ in range(2)]
    result = merge_state_dicts(modules, "squisher", parameters={"fisher": fishers})
    assert result["num_batches_tracked"].dtype == torch.int64
    assert not result["weight"].requires_grad


def test_refusals() -> None:
    """Missing mappings, missing tensors, wrong shapes, wrong keys and NaN are refused by name."""
    weights, fishers = _models(2)
    with pytest.raises(ConfigError, match="needs a Fisher for input 0: a mapping"):
        merge_state_dicts(weights, "squisher")
    with pytest.raises(MismatchError, match=r"Fisher of encoder\.bias for every input, but 1 has none"):
        merge_state_dicts(
            weights, "squisher", parameters={"fisher": [fishers[0], {"encoder.weight": torch.ones(7, 13)}]}
        )
    transposed = fishers[1] | {"encoder.weight": fishers[1]["encoder.weight"].t()}
    with pytest.raises(MismatchError, match=r"\[7, 13\].*\[13, 7\]"):
        merge_state_dicts(weights, "squisher", parameters={"fisher": [fishers[0], transposed]})
    with pytest.raises(TypeError, match="wieght"):
        merge_state_dicts(weights, "squisher", parameters={"fisher": fishers, "wieght": 1.0})
    fishers[0]["encoder.bias"][2] = float("nan")
    with pytest.raises(ValuesError, match=r"encoder\.bias in memory has 1 NaN"):
        merge_state_dicts(weights, "squisher", parameters={"fisher": fishers})


def test_missing_average() -> None:
    """With missing='average' a tensor that one mapping lacks is the weighted mean of all."""
    weights, fishers = _models(2)
    del fishers[1]["encoder.bias"]
    parameters = {"fisher": fishers, "weight": [1.0, 3.0], "missing": "average"}
    result = merge_state_dicts(weights, "squisher", parameters=parameters)
    mean = (weights[0]["encoder.bias"].double() + 3 * weights[1]["encoder.bias"].double()) / 4
    assert_within(result["encoder.bias"], mean, mean.abs() + 1)
